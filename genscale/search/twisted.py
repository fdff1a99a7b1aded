"""Twisted particle filters: each step is pulled along the reward's gradient, and weighed for it."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from genscale.errors import ConfigError
from genscale.objectives.base import Family, on
from genscale.objectives.memory import map_tensors
from genscale.samplers.base import State
from genscale.samplers.sde import GaussianSampler
from genscale.search.base import Search
from genscale.search.best_of_n import samples_afforded
from genscale.search.cost import BACKWARD
from genscale.search.engine import Engine
from genscale.search.frozen import frozen
from genscale.search.particles import Returns, check_population, conclude, select
from genscale.search.population import Population
from genscale.search.resampling import Scheme
from genscale.search.scorer import Scores
from genscale.search.tempering import TemperingName, scheduled


class TwistedSMC(Search):
    """Particles whose steps follow the reward's gradient, weighed exactly.

    With the twist log psi_t(x_t) = lambda_t r(clean estimate of x_t), a step of the model
    N(mean, std^2) is proposed from N(mean + std^2 lambda grad r, std^2), the gradient being towards
    x_t through network and decoder, and

        log w += log p(x_s | x_t) - log q(x_s | x_t) + log psi_s(x_s) - log psi_t(x_t),

    where the finished sample has log psi = strength r(x_0). The weights are exact for
    p(x_0) exp(strength r(x_0)) whatever the gradients are; good ones keep them even.

    Without tempering and with systematic resampling it is TDS (arXiv:2306.17775); with
    ``geometric`` tempering and SSP it is DAS (arXiv:2501.05803), whose published strength is one
    over its KL coefficient. In both, a step from t to s is pulled with the strength of s.

    One gradient a particle and step is taken micro-batch by micro-batch, so that activations take
    memory for one of them. A single particle has no weights to speak of, and is a guided sample.

    Args:
        particles: P; None takes as many as the budget allows.
        strength: lambda, in units of one over the reward; 0 is plain sampling.
        tempering: let the strength grow: ``geometric``, ``linear``, or ``adaptive``, as fast as the
            effective sample size keeps to the threshold; None has all of it from the first.
        gamma: growth of geometric tempering in a hundredth of the steps.
        threshold: resample where the effective sample size is below this share of P; 1 always.
        resampling: ``ssp``, ``systematic``, ``stratified``, ``residual`` or ``multinomial``.
        returns: ``argmax_reward``, ``argmax_weight``, ``weighted_sample`` or ``all``; see
            :class:`~genscale.search.particles.FeynmanKac`.

    Raises:
        ConfigError: an unknown name or an impossible number.
    """

    families: ClassVar[frozenset[Family]] = frozenset({"diffusion"})
    needs_noise: ClassVar[bool] = True
    needs_transition: ClassVar[bool] = True
    needs_gradient: ClassVar[bool] = True
    needs_potential: ClassVar[bool] = True
    grows: ClassVar[str | None] = "particles"

    def __init__(
        self,
        particles: int | None = 4,
        *,
        strength: float = 10.0,
        tempering: TemperingName | None = None,
        gamma: float = 0.008,
        threshold: float = 0.5,
        resampling: Scheme = "ssp",
        returns: Returns = "argmax_reward",
    ) -> None:
        if isinstance(strength, str):
            raise ConfigError(
                f"search.strength must be a number, but is {strength!r}. search=fk search.strength="
                "auto finds one."
            )
        check_population(particles, strength, threshold, resampling, tempering, returns)
        if not gamma > 0.0:
            raise ConfigError(
                f"search.gamma must be positive, but is {gamma}. 0.008 reaches the full strength "
                "near 87 % of the steps."
            )
        self.particles = particles
        self.strength = float(strength)
        self.tempering = tempering
        self.gamma = float(gamma)
        self.threshold = float(threshold)
        self.resampling = resampling
        self.returns = returns

    @property
    def label(self) -> str:
        """The name, and everything that changes the results."""
        words = [
            "budget" if self.particles is None else str(self.particles),
            f"strength {self.strength:g}",
            f"ESS {self.threshold:g}",
            self.resampling,
        ]
        if self.tempering is not None:
            gamma = f" {self.gamma:g}" if self.tempering == "geometric" else ""
            words.append(f"{self.tempering}{gamma} tempering")
        words += [self.returns] if self.returns != "argmax_reward" else []
        return f"TwistedSMC({', '.join(words)})"

    def least(self, engine: Engine) -> tuple[float, int]:
        """Return the evaluations and rewards a prompt that one particle takes."""
        if self.strength == 0.0:
            return super().least(engine)
        backward = BACKWARD * float(engine.costs.evaluate.sum())
        return engine.costs.total + backward, engine.sampler.num_steps + 1

    def explore(self, engine: Engine) -> dict[str, Tensor]:
        """Move all particles step by step: gradient, weight, selection, proposal."""
        nfe, rewards = self.least(engine)
        count = samples_afforded(engine, self.particles, nfe=nfe, rewards=rewards)
        population = Population(
            engine.num_prompts,
            count,
            torch.full((engine.num_prompts,), self.strength, dtype=torch.float64),
            scheme=self.resampling,
            threshold=self.threshold,
            tempering=self.tempering,
            gamma=self.gamma,
        )
        state = engine.start(count)
        engine.record("start", state)
        if self.strength == 0.0:
            return conclude(engine, engine.run(state), population, self.returns)
        with frozen(engine.model, engine.scorer.decode, engine.scorer.reward):
            for step in range(engine.sampler.num_steps):
                state = self._step(engine, state, population, step)
        return conclude(engine, state, population, self.returns)

    def _step(self, engine: Engine, state: State, population: Population, step: int) -> State:
        num_steps, shape = engine.sampler.num_steps, population.log_weights.shape
        state, scores, slopes = reward_slopes(engine, state)
        population.weigh(scores.value.view(shape), step / num_steps)
        state, rows = select(engine, state, population, scores.value)
        share = population.share
        if self.tempering in ("geometric", "linear"):  # that of the level the step goes to
            following = scheduled(self.tempering, (step + 1) / num_steps, self.gamma)
            share = torch.full_like(share, following)
        pull = on((self.strength * share)[state.group], slopes)
        state, log_ratio = pulled(engine, state, pull * slopes[rows.to(slopes.device)])
        population.add(log_ratio.view(shape))
        return state


def pulled(engine: Engine, state: State, push: Tensor) -> tuple[State, Tensor]:
    """Take one step proposed from N(mean + std^2 push, std^2).

    Args:
        engine: of the search, with a sampler of known transitions.
        state: evaluated.
        push: ``(n, ...)`` gradient of the log-twist.

    Returns:
        the state after the step, and log p - log q of what was drawn, ``(n,)`` float64 on the CPU.
    """
    sampler = engine.sampler
    assert isinstance(sampler, GaussianSampler)  # needs_transition
    with torch.no_grad():
        mean, std = sampler.transition(state)
        wide = push.double()
        variance = std.double().square() if std.dim() > 1 else on(std.square(), wide)
        after = engine.advance(state)
        shift = variance * wide
        # x = mean + std z goes to x + shift, where log p - log q = -((x - mean) + shift / 2) push
        log_ratio = -(after.x.double() - mean.double() + 0.5 * shift) * wide
        x = after.x + shift.to(after.x.dtype)
    return after.replace(x=x), log_ratio.flatten(1).sum(1).cpu()


def reward_slopes(engine: Engine, state: State) -> tuple[State, Scores, Tensor]:
    """Evaluate particles, judge their clean estimates, and ask which way the reward grows.

    The way back goes through decoder and network, one micro-batch at a time, and is counted. A
    gradient that is not finite is taken as 0, which the weights account for.

    Args:
        engine: of the search.
        state: not evaluated.

    Returns:
        the evaluated state, the scores of its clean estimates, and ``(n, ...)`` gradients of the
        rewards to x.

    Raises:
        BudgetSpent: the budget does not allow it.
        ConfigError: the decoder or the reward keeps gradients back.
    """
    price = engine.costs.evaluate[state.step] * (1.0 + BACKWARD)
    engine.allow(state.group, nfe=float(price.max()), judged=True)

    def work(rows: Tensor) -> tuple[State, Scores, Tensor]:
        part = state.select(rows)
        with torch.inference_mode(False), torch.enable_grad():
            x = part.x.detach().clone().requires_grad_()
            after = engine.sampler.evaluate(engine.model, part.replace(x=x))
            assert after.clean is not None
            images = engine.scorer.decode(after.clean).float()
            scores, loss = engine.scorer.score_with_loss(after.clean, images, part.group)
            if not loss.requires_grad:
                raise ConfigError(
                    f"The gradient of reward {engine.scorer.reward.label} does not reach the "
                    "sample: the decoder or the reward keeps it back. Choose search=fk, which "
                    "needs none."
                )
            (slope,) = torch.autograd.grad(-loss.sum(), x)
        after = _detached(after)
        engine.count(part, after)
        engine.count(part, after, backward=True)
        for counter in ("decodes", "reward_calls"):
            engine.meter.add(counter, part.group)
        finite = on(slope.flatten(1).isfinite().all(1), slope) > 0
        return after, scores, torch.where(finite, slope, 0.0)

    parts = engine.each(len(state), "gradient", work)
    states, scores, slopes = zip(*parts, strict=True)
    state, found = State.cat(list(states)), Scores.cat(scores)
    engine.offer(state, found, finished=False)
    return state, found, torch.cat(slopes)


def _detached(state: State) -> State:
    """Return the state without what gradients would need."""
    fields = ("x", "clean", "noise", "variance", "history", "memory", "pending")
    return state.replace(
        **{name: map_tensors(getattr(state, name), torch.Tensor.detach) for name in fields}
    )
