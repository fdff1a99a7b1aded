"""Feynman-Kac steering: particles that are weighed by their reward on the way, and resampled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from genscale import rng
from genscale.errors import ConfigError
from genscale.rewards.base import Reward
from genscale.rng import Purpose
from genscale.samplers.base import Sampler, State
from genscale.search.base import Search
from genscale.search.best_of_n import samples_afforded
from genscale.search.engine import Engine
from genscale.search.names import check_name
from genscale.search.official_fk import OfficialPopulation
from genscale.search.population import Population
from genscale.search.potentials import PotentialName, check_potential
from genscale.search.resampling import Scheme, check_scheme, normalise, resample
from genscale.search.scorer import best_first
from genscale.search.tempering import TemperingName, auto_strength, check_tempering

Returns = Literal["argmax_reward", "argmax_weight", "weighted_sample", "all"]
Compat = Literal["official"]
_BASE = 1 << 20  # number of the first of the samples that auto looks at: beyond all particles


class FeynmanKac(Search):
    """Particle steering to p(x_0) exp(strength r(x_0)) (arXiv:2501.06848), on any sampler.

    P particles a prompt follow the model. At checkpoints their clean estimates are decoded and
    judged, weights are multiplied by a potential of the rewards so far, and where the weights have
    become uneven, particles with small ones give way to copies of others, which part from then on
    by the noise of their steps. At the end the weights are exact for the target, whatever the
    potential; see :mod:`genscale.search.potentials`. Scale-wise models are steered alike: after a
    scale the picture so far is judged, and copies draw other tokens of the finer scales.

    Strength 0 is plain sampling, and so is one particle: nothing is judged on the way.

    Args:
        particles: P; None takes as many as the budget allows.
        strength: lambda, in units of one over the reward; ``auto`` finds for each prompt the one at
            which half of its ``base_samples`` plain samples count.
        potential: ``difference``, ``max``, ``sum``, ``rt`` or ``is``.
        interval: steps between checkpoints; None makes it a tenth of the steps.
        steps: checkpoints themselves, 0 being the first step; None takes every interval-th.
        window: shares of the steps between which there are checkpoints: rewards of early estimates
            say little.
        threshold: resample where the effective sample size is below this share of P; 1 always.
        resampling: ``ssp``, ``systematic``, ``stratified``, ``residual`` or ``multinomial``.
        tempering: let the strength grow: ``linear``, ``geometric``, or ``adaptive``, as fast as the
            effective sample size keeps to the threshold; None has all of it from the first.
        base_samples: plain samples a prompt that ``auto`` looks at; they compete for the best.
        returns: ``argmax_reward``, the best seen; ``argmax_weight``; ``weighted_sample``, a draw
            from the target; or ``all`` particles, best first, with their log-weights in the
            result's ``extra``.
        compat: ``official`` weighs as the published program does, with what it gets wrong; see
            :mod:`genscale.search.official_fk`. It draws multinomially, and threshold 1 is its
            run that always resamples, any other its adaptive one.

    Raises:
        ConfigError: an unknown name or an impossible number.
    """

    needs_noise: ClassVar[bool] = True
    needs_potential: ClassVar[bool] = True
    grows: ClassVar[str | None] = "particles"

    def __init__(
        self,
        particles: int | None = 4,
        *,
        strength: float | Literal["auto"] = 10.0,
        potential: PotentialName = "difference",
        interval: int | None = None,
        steps: Sequence[int] | None = None,
        window: tuple[float, float] = (0.0, 1.0),
        threshold: float = 0.5,
        resampling: Scheme = "ssp",
        tempering: TemperingName | None = None,
        base_samples: int = 8,
        returns: Returns = "argmax_reward",
        compat: Compat | None = None,
    ) -> None:
        check_population(particles, strength, threshold, resampling, tempering, returns)
        check_potential(potential)
        if interval is not None and interval < 1:
            raise ConfigError(
                f"search.interval must be at least 1 step, but is {interval}. null makes it a "
                "tenth of the sampler's steps."
            )
        low, high = window
        if not 0.0 <= low < high <= 1.0:
            raise ConfigError(
                f"search.window must be two shares of the steps with 0 <= first < second <= 1, but "
                f"is {list(window)}. [0, 1] leaves none out."
            )
        if base_samples < 2:
            raise ConfigError(
                f"search.base_samples must be at least 2, but is {base_samples}. A single sample "
                "says nothing of how rewards differ."
            )
        check_name("search.compat", compat, get_args(Compat), optional=True)
        if compat is not None and (tempering is not None or strength == "auto"):
            raise ConfigError(
                "search.compat=official knows neither tempering nor strength=auto. Give a number "
                "as search.strength, and search.tempering=null."
            )
        self.particles = particles
        self.strength: float | Literal["auto"] = "auto" if strength == "auto" else float(strength)
        self.potential = potential
        self.interval = interval
        self.steps = None if steps is None else tuple(sorted(set(steps)))
        self.window = (float(low), float(high))
        self.threshold = float(threshold)
        self.resampling = resampling
        self.tempering = tempering
        self.base_samples = base_samples
        self.returns = returns
        self.compat = compat

    @property
    def returns_many(self) -> bool:
        """Whether all particles are returned."""
        return self.returns == "all"

    @property
    def label(self) -> str:
        """The name, and everything that changes the results."""
        if self.steps is not None:
            when = f"at {list(self.steps)}"
        else:
            when = f"every {'tenth' if self.interval is None else self.interval}"
            if self.window != (0.0, 1.0):
                when += f" in {list(self.window)}"
        auto = f"auto of {self.base_samples}"
        strength = auto if self.strength == "auto" else format(self.strength, "g")
        words = [
            "budget" if self.particles is None else str(self.particles),
            self.potential,
            f"strength {strength}",
            when,
            f"ESS {self.threshold:g}",
            self.resampling,
        ]
        words += [f"{self.tempering} tempering"] if self.tempering else []
        words += [self.returns] if self.returns != "argmax_reward" else []
        words += [self.compat] if self.compat else []
        return f"FeynmanKac({', '.join(words)})"

    def problems(self, sampler: Sampler, reward: Reward | None = None) -> list[str]:
        """Return a sentence for everything that keeps this search from this sampler and reward."""
        found = super().problems(sampler, reward)
        outside = [i for i in self.steps or () if not 0 <= i < sampler.num_steps]
        if outside:
            found.append(
                f"search.steps must lie in 0 to {sampler.num_steps - 1}, the sampler's steps, but "
                f"has {outside}. Leave them out, or give search.interval."
            )
        return found

    def checkpoints(self, num_steps: int) -> list[int]:
        """Return the steps before which particles are judged, of a sampler's ``num_steps``.

        Not before the last one by itself: there the estimate is as good as the sample, and copies
        have no noise left to part by.
        """
        if self.potential == "is":
            return []
        if self.steps is not None:
            return list(self.steps)
        every = max(1, num_steps // 10) if self.interval is None else self.interval
        low, high = (share * num_steps for share in self.window)
        return [i for i in range(every, num_steps - 1, every) if low <= i <= high]

    def explore(self, engine: Engine) -> dict[str, Tensor]:
        """Sample with all particles side by side, from checkpoint to checkpoint."""
        num_steps = engine.sampler.num_steps
        steps = self.checkpoints(num_steps)
        strength = self._strength(engine, len(steps) + 1)
        count = max(1, samples_afforded(engine, self.particles, rewards=len(steps) + 1))
        steered = count > 1 and bool((strength > 0).any())
        population = self._population(engine, count, strength, steered)
        state = engine.start(count)
        engine.record("start", state)
        for step in steps if steered else ():
            state = engine.evaluate(engine.run(state, until=step))
            values = engine.preview(state).value
            population.weigh(values.view(-1, count), step / num_steps)
            state, _ = select(engine, state, population, values)
        return conclude(engine, engine.run(state), population, self.returns)

    def _strength(self, engine: Engine, rewards: int) -> Tensor:
        """Return lambda of each prompt ``(G,)``; for ``auto``, from samples it pays for."""
        if self.strength != "auto":
            return torch.full((engine.num_prompts,), float(self.strength), dtype=torch.float64)
        affords = samples_afforded(
            engine, None if self.particles is None else _BASE, rewards=rewards
        )
        count = min(self.base_samples, affords // 2)
        if count < 2 or self.particles == 1:
            return torch.zeros(engine.num_prompts, dtype=torch.float64)
        state = engine.start(count, first=_BASE)
        scores = engine.finish(state)
        engine.record("start", state, value=scores.value)
        return auto_strength(scores.value.view(-1, count))

    def _population(
        self, engine: Engine, count: int, strength: Tensor, steered: bool
    ) -> Population:
        if self.compat == "official" and steered:
            return OfficialPopulation(
                engine.num_prompts,
                count,
                strength,
                potential=self.potential,
                adaptive=self.threshold < 1.0,
            )
        return Population(
            engine.num_prompts,
            count,
            strength,
            potential=self.potential,
            scheme=self.resampling,
            threshold=self.threshold,
            tempering=self.tempering,
        )


def check_population(
    particles: int | None,
    strength: float | str,
    threshold: float,
    resampling: str,
    tempering: str | None,
    returns: str,
) -> None:
    """Refuse settings of weighted particles that make no sense.

    Raises:
        ConfigError: an unknown name or an impossible number.
    """
    if particles is not None and particles < 1:
        raise ConfigError(
            f"search.particles must be at least 1, but is {particles}. null takes as many as the "
            "budget allows."
        )
    if strength != "auto" and (isinstance(strength, str) or not 0.0 <= strength < math.inf):
        raise ConfigError(
            f"search.strength must be a number that is not negative, or auto, but is {strength!r}. "
            "0 is plain sampling."
        )
    if not 0.0 < threshold <= 1.0:
        raise ConfigError(
            f"search.threshold must be a share of the particles in (0, 1], but is {threshold}. 0.5 "
            "is usual; 1 resamples at every checkpoint."
        )
    check_scheme(resampling)
    check_tempering(tempering)
    check_name("search.returns", returns, get_args(Returns))


def select(
    engine: Engine, state: State, population: Population, values: Tensor
) -> tuple[State, Tensor]:
    """Resample where the weights ask for it.

    Args:
        engine: of the search.
        state: all particles, prompt by prompt, at one step.
        population: their weights.
        values: ``(n,)`` rewards known of them, for the genealogy.

    Returns:
        the particles that live on, and the rows ``(n,)`` they were.
    """
    ancestors = population.resample(_uniforms(engine, population, int(state.step[0])))
    rows = _rows(ancestors)
    moved = not torch.equal(rows, torch.arange(len(rows)))
    if moved:
        state = engine.branch(state, rows)
    engine.record("resample" if moved else "keep", state, parents=rows, value=values[rows])
    return state, rows


def conclude(
    engine: Engine, state: State, population: Population, returns: Returns
) -> dict[str, Tensor]:
    """Judge finished particles, weigh them for the last time, and settle what is returned.

    Args:
        engine: of the search.
        state: all particles, finished, prompt by prompt.
        population: their weights.
        returns: what to return of them.

    Returns:
        what to report: see :meth:`~genscale.search.population.Population.record`, with
        ``log_weights`` and ``rewards`` ``(G, P)`` best first, as the last generation of the
        genealogy is.
    """
    num_steps = engine.sampler.num_steps
    scores = engine.score(engine.sampler.finish(state), state.group)
    count = len(state) // engine.num_prompts
    ancestors = population.end(
        scores.value.view(-1, count), _uniforms(engine, population, num_steps)
    )
    first = torch.arange(engine.num_prompts)[:, None] * count
    plain = not bool((population.strength > 0).any())
    if plain and returns != "all":  # the reward has no say: the plain sample
        engine.settle(state, scores, (first + torch.arange(min(engine.top, count))).flatten())
    rows = _rows(ancestors)
    state, scores = state.select(rows), scores.select(rows)
    order = best_first(engine.scorer.compare(scores), scores.group, count)
    state, scores = state.select(order), scores.select(order)
    engine.record("finish", state, parents=rows[order], value=scores.value)
    extra = population.record()
    log_weights = extra["log_weights"].gather(1, order.view(-1, count) - first)
    extra |= {"log_weights": log_weights, "rewards": scores.value.view(-1, count)}
    if returns == "all":
        engine.settle(state, scores, torch.arange(len(state)))
    elif plain:
        pass
    elif returns == "argmax_reward":
        engine.offer(state, scores)
    elif returns == "argmax_weight":
        best = best_first(log_weights.flatten(), scores.group, min(engine.top, count))
        engine.settle(state, scores, best)
    else:
        keys = rng.key(engine.seeds, num_steps, Purpose.CHOICE)
        draws = resample(normalise(log_weights), rng.uniform(keys, (1,)), "systematic", engine.top)
        engine.settle(state, scores, (first + draws).flatten())
    return extra


def _uniforms(engine: Engine, population: Population, step: int) -> Tensor:
    keys = rng.key(engine.seeds, step, Purpose.RESAMPLE)
    return rng.uniform(keys, (population.uniforms,))


def _rows(ancestors: Tensor) -> Tensor:
    """Return the rows ``(G * P,)`` of a packed state that places ``(G, P)`` in each prompt are."""
    prompts, count = ancestors.shape
    return (ancestors + torch.arange(prompts)[:, None] * count).flatten()
