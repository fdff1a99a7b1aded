"""One step taken several ways: what it leads to, what is seen of that, and what it costs.

A diffusion particle after its step is judged by the clean estimate there, which takes another
evaluation; the particle that is kept needs that anyway. A scale-wise particle is judged by its
running latent, which is a picture already, and other draws of its scale come from the same logits:
only the particles that are kept ask the network again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from genscale.errors import ConfigError
from genscale.objectives.memory import take_rows
from genscale.samplers.base import Sampler, State
from genscale.samplers.blocks import Blocks
from genscale.samplers.next_scale import NextScale
from genscale.samplers.sde import GaussianSampler
from genscale.search.engine import Engine
from genscale.search.ledger import SLACK
from genscale.search.scorer import Scores

_ROUNDING = 1e-5  # of a reward


@dataclass(frozen=True, slots=True)
class StepPrices:
    """Network evaluations of a search that takes each step several ways.

    Attributes:
        first: of a particle that begins.
        proposal: ``(S,)`` float64, of a proposal at step i: the step, and what it is judged by.
        kept: ``(S,)`` float64, of a proposal that is kept, on top.
    """

    first: float
    proposal: Tensor
    kept: Tensor

    @staticmethod
    def of(engine: Engine) -> StepPrices:
        """Return the prices of an engine's steps."""
        costs = engine.costs
        later = torch.cat((costs.evaluate[1:], costs.evaluate.new_zeros(1)))
        first = float(costs.evaluate[0])
        if engine.sampler.family == "scale_wise":
            return StepPrices(first, costs.advance, later)
        return StepPrices(first, costs.advance + later, torch.zeros_like(later))


def unburdened(engine: Engine, state: State) -> State:
    """Return evaluated scale-wise particles without what their network remembers.

    Keys and values are most of such a particle, all draws of a scale share them, and judging a
    draw does not read them: only those that are kept take them up again (:func:`reunited`).
    Diffusion particles stay as they are.
    """
    if engine.sampler.family == "diffusion":
        return state
    return state.replace(memory=None, pending=None)


def reunited(engine: Engine, children: State, parents: State, rows: Tensor) -> State:
    """Give kept proposals the memory of the particles ``rows`` of ``parents`` they came from."""
    if engine.sampler.family == "diffusion":
        return children
    alone = len(rows) == len(parents) and bool((rows == torch.arange(len(parents))).all())
    memory = parents.pending if alone else take_rows(parents.pending, rows)
    return children.replace(memory=memory)


def propose(engine: Engine, state: State, count: int, copy: Tensor | None = None) -> State:
    """Take the step of every particle in ``count`` ways, each with noise of its own.

    The first way is the one that the particle would have gone. What is kept of the result goes
    through :func:`reunited`.

    Args:
        engine: counts the step.
        state: n particles, evaluated once if they are not.
        count: ways a particle.
        copy: ``(n * count,)`` numbers of the ways; None counts from 0.

    Returns:
        ``n * count`` particles, those of one parent together.
    """
    state = engine.evaluate(state)
    rows = torch.arange(len(state)).repeat_interleave(count)
    copies = engine.branch(unburdened(engine, state), rows, copy)
    return engine.advance(copies, engine.sampler.step_noise(engine.model, copies))


def judge(engine: Engine, state: State) -> tuple[State, Scores]:
    """Judge particles by where they seem to go; those that have finished by what they are.

    Returns:
        the particles, of diffusion models evaluated, and their scores row by row. Finished ones
        were offered to the engine.
    """
    diffusion = engine.sampler.family == "diffusion"
    if diffusion:
        state = engine.evaluate(state)
    done = state.step >= engine.sampler.num_steps
    parts, rows = [], []
    for index, finished in ((done.nonzero()[:, 0], True), ((~done).nonzero()[:, 0], False)):
        if len(index) == 0:
            continue
        part = state if len(index) == len(state) else state.select(index)
        if finished:
            scores = engine.score(engine.sampler.finish(part), part.group)
            engine.offer(part, scores)
        else:
            scores = engine.preview(part if diffusion else part.replace(clean=part.x))
        parts.append(scores)
        rows.append(index)
    if len(parts) == 1:
        return state, parts[0]
    return state, Scores.cat(parts).select(torch.cat(rows).argsort())


def random_steps(sampler: Sampler, state: State) -> Tensor:
    """Return which steps ``(S,)`` draw noise: elsewhere all proposals of a particle are equal.

    Args:
        sampler: whose steps.
        state: evaluated particles; the first one is looked at.
    """
    count = sampler.num_steps
    if isinstance(sampler, NextScale | Blocks):
        return torch.tensor([sampler.draws(step) for step in range(count)])
    if not isinstance(sampler, GaussianSampler):
        return torch.full((count,), sampler.stochastic)
    one = state.select(torch.zeros(1, dtype=torch.int64))
    # the spread of a step follows from its levels, wherever the particle stands
    steps = (one.replace(step=torch.full((1,), step)) for step in range(count))
    return torch.tensor([bool((sampler.transition(at)[1] > 0).any()) for at in steps])


def afforded(
    engine: Engine,
    asked: int | None,
    *,
    each: tuple[float, float],
    fixed: tuple[float, float] = (0.0, 0.0),
    setting: str,
) -> int:
    """Return how many of something the budget allows every prompt, ``asked`` at most.

    Args:
        engine: what is left.
        asked: the most; None takes all there is.
        each: evaluations and rewards of one.
        fixed: evaluations and rewards beside.
        setting: where ``asked`` comes from, for the error sentence.

    Returns:
        a number, negative where not even the rest is affordable.

    Raises:
        ConfigError: neither a number nor a limit.
    """
    times = [] if asked is None else [float(asked)]
    for left, price, beside in zip(
        (engine.nfe_left(), engine.rewards_left()), each, fixed, strict=True
    ):
        least = float(left.min())
        if price > 0 and math.isfinite(least):
            times.append(math.floor((least - beside + SLACK) / price))
    if not times:
        raise ConfigError(
            f"The search has no end: neither {setting} nor a budget that it counts against was "
            f"given. Give {setting}=8 or budget.reward_calls=..., say."
        )
    return int(min(times))


def ways_afforded(
    engine: Engine,
    asked: int | None,
    random: Tensor,
    *,
    step: int = 0,
    particles: int = 1,
    setting: str,
) -> int:
    """Return in how many ways the budget allows every particle to take each step; at least one.

    Asked again before every step, it gives later steps what earlier ones could not divide.

    Args:
        engine: what is left, the particles' evaluations at ``step`` being spent.
        asked: the most; None takes all there is.
        random: ``(S,)`` bool, of :func:`random_steps`: others are taken in one way.
        step: where the particles stand.
        particles: a prompt.
        setting: where ``asked`` comes from.

    Raises:
        ConfigError: neither a number nor a limit.
    """
    prices = StepPrices.of(engine)
    judged_at_the_end = not bool(random[-1])
    random, proposal = random[step:], prices.proposal[step:]
    beside = float(prices.kept[step:].sum() + proposal[~random].sum())
    ways = afforded(
        engine,
        asked,
        each=(particles * float(proposal[random].sum()), particles * float(random.sum())),
        fixed=(particles * beside, float(particles * judged_at_the_end)),
        setting=setting,
    )
    return max(1, ways)


def beats(value: Tensor, bar: Tensor) -> Tensor:
    """Return where rewards are higher by more than rounding: equal pictures must not count.

    Two draws can give the same tokens, and rewards of the same picture differ in their last digits
    from batch to batch.
    """
    margin = torch.where(bar.isfinite(), _ROUNDING * bar.abs().clamp(min=1.0), 0.0)
    return value > bar + margin


def check_end(engine: Engine, asked: int | None, setting: str) -> None:
    """Refuse a search that nothing would end.

    Raises:
        ConfigError: neither a number nor a budget.
    """
    budget = engine.budget
    if asked is None and (budget.nfe, budget.reward_calls, budget.seconds) == (None, None, None):
        raise ConfigError(
            f"The search has no end: neither {setting} nor a budget was given. Give {setting}=8 "
            "or budget.nfe=..., say."
        )
