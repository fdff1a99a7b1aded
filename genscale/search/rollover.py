"""Rollover budget forcing: spend more where a step is hard to better (arXiv:2503.19385)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from genscale.errors import ConfigError
from genscale.rewards.base import Reward
from genscale.samplers.base import Sampler, State
from genscale.search.base import Search
from genscale.search.engine import Engine
from genscale.search.ledger import SLACK
from genscale.search.proposals import (
    StepPrices,
    afforded,
    beats,
    judge,
    propose,
    random_steps,
    reunited,
    unburdened,
    ways_afforded,
)
from genscale.search.scorer import best_first


@dataclass(slots=True)
class _Books:
    """What is kept of every prompt; tensors ``(G,)``.

    Attributes:
        bar: the reward to beat, r*.
        rolled: proposals left over from earlier steps.
        tried: proposals of the step at hand.
        random: ``(S,)`` which steps draw noise.
        quota: proposals a step, Q.
    """

    bar: Tensor
    rolled: Tensor
    tried: Tensor
    random: Tensor
    quota: int


class Rollover(Search):
    """Draw proposals of a step until one beats the best reward so far, and save what is left.

    1. Look at n_0 start noises; go on from the best, whose reward is the bar r*.
    2. At every step draw one proposal after the other. The first above r* is taken, r* is raised
       to it, and what is left of the quota rolls over to the next step. Where the quota ends
       first, the best proposal of the step is taken.
    3. The last step that draws noise spends everything left, and takes the best.

    All prompts go together, each at a step of its own. With T steps of one evaluation, the last
    without noise, a diffusion model's sample costs n_0 + Q (T - 1) evaluations and as many rewards
    and 1. Scale-wise models draw again from the same logits: n_0 + T - 1 evaluations, and
    n_0 + Q T rewards.

    The defaults are those of the authors: 500 evaluations on ten steps.

    Args:
        starts: n_0; fewer where the budget asks for it.
        quota: Q, fewer where the budget asks for it; None divides the budget evenly, and the last
            step has what that leaves.
        bar: r* at the beginning; None takes the reward of the best start.

    Raises:
        ConfigError: numbers out of range.
    """

    needs_noise = True
    grows: ClassVar[str | None] = "quota"

    def __init__(
        self, starts: int = 25, *, quota: int | None = 47, bar: float | None = None
    ) -> None:
        if starts < 1 or (quota is not None and quota < 1):
            raise ConfigError(
                f"search.starts and search.quota must be at least 1, but are {starts} and {quota}. "
                "quota=null divides the budget evenly over the steps."
            )
        self.starts = starts
        self.quota = quota
        self.bar = bar

    @property
    def label(self) -> str:
        """The name and everything that changes its results."""
        bar = "" if self.bar is None else f", bar {self.bar:g}"
        return f"Rollover({self.starts} starts, Q {self.quota or 'budget'}{bar})"

    def problems(self, sampler: Sampler, reward: Reward | None = None) -> list[str]:
        """Also refuse rewards that say nothing across steps."""
        found = super().problems(sampler, reward)
        if reward is not None and not reward.potential:
            found.append(
                f"search Rollover compares rewards of different steps, but {reward.label} ranks "
                "candidates among each other. Choose a reward with values of its own."
            )
        return found

    def least(self, engine: Engine) -> tuple[float, int]:
        """Return the evaluations and rewards of one start and one proposal a step."""
        return engine.costs.total, len(engine.costs) + 2

    def explore(self, engine: Engine) -> dict[str, Tensor]:
        """Move every prompt at its own pace until all have arrived."""
        state, bar = self._begin(engine)
        random = random_steps(engine.sampler, state)
        quota = ways_afforded(engine, self.quota, random, setting="search.quota")
        zero = torch.zeros_like(state.step)
        books = _Books(bar, zero.clone(), zero.clone(), random, quota)
        best: State | None = None  # proposals of the steps at hand, one a prompt that has any
        value = torch.zeros(0, dtype=torch.float64)
        while bool((state.step < len(random)).any()):
            active = (state.step < len(random)).nonzero()[:, 0]
            parents = unburdened(engine, state).select(active)
            children, seen = self._draw(engine, parents, books)
            pool = children if best is None else State.cat([best, children])
            value = torch.cat((value, seen))
            chosen = best_first(value, pool.group, 1)
            best, value = pool.select(chosen), value[chosen]
            taken = self._settle(engine, best, value, books)
            if bool(taken.any()):
                winners = best.select(taken.nonzero()[:, 0])
                moved = engine.evaluate(reunited(engine, winners, state, winners.group))
                state = state.put(moved.group, moved)
                known = torch.full((len(state),), torch.nan, dtype=torch.float64)
                known[moved.group] = value[taken]
                engine.record("move", state, parents=torch.arange(len(state)), value=known)
            left = (~taken).nonzero()[:, 0]
            best, value = best.select(left) if len(left) else None, value[left]
        return {"bar": books.bar}

    def _begin(self, engine: Engine) -> tuple[State, Tensor]:
        """Return the best start of every prompt, evaluated, and the bars."""
        first = float(engine.costs.evaluate[0])
        starts = afforded(
            engine,
            self.starts,
            each=(first, 1.0),
            fixed=(engine.costs.total - first, len(engine.costs) + 1.0),
            setting="search.starts",
        )
        state = engine.evaluate(engine.start(max(1, starts)))
        engine.record("start", state)
        bar = torch.full((engine.num_prompts,), self.bar or 0.0, dtype=torch.float64)
        if len(state) == engine.num_prompts and self.bar is not None:
            return state, bar
        scores = engine.preview(state)
        best = best_first(scores.value, scores.group, 1)
        state, value = state.select(best), scores.value[best]
        engine.record("keep", state, parents=best, value=value)
        return state, value if self.bar is None else bar

    def _draw(self, engine: Engine, state: State, books: _Books) -> tuple[State, Tensor]:
        """Return one proposal a particle and its reward; -inf where none is needed."""
        group = state.group
        children = propose(engine, state, 1, books.tried[group])
        if engine.sampler.family == "diffusion":
            children = engine.evaluate(children)
        books.tried[group] += 1
        value = torch.full((len(children),), -torch.inf, dtype=torch.float64)
        # where a step draws no noise there is nothing to choose, but what it finishes is judged
        matters = books.random[state.step] | (children.step >= engine.sampler.num_steps)
        rows = matters.nonzero()[:, 0]
        if len(rows) > 0:
            value[rows] = judge(engine, children.select(rows))[1].value
        return children, value

    def _settle(self, engine: Engine, best: State, value: Tensor, books: _Books) -> Tensor:
        """Return which prompts take the best proposal of their step, and write the books."""
        group, at = best.group, best.step - 1
        random = books.random[at]
        last = at == int(books.random.nonzero().max())
        limit = torch.where(random, books.quota + books.rolled[group], 1)
        if self.quota is None:  # what the division left
            limit = torch.where(last, 1 << 30, limit)
        tried = books.tried[group]
        better = random & ~last & beats(value, books.bar[group])
        taken = better | (tried >= limit) | ~self._affords_another(engine, group, at, books.random)
        books.bar[group] = torch.where(better, value, books.bar[group])
        over = torch.where(better, limit - tried, 0)
        books.rolled[group] = torch.where(taken & random, over, books.rolled[group])
        books.tried[group] = torch.where(taken, 0, tried)
        return taken

    def _affords_another(self, engine: Engine, group: Tensor, at: Tensor, random: Tensor) -> Tensor:
        """Return whether prompts can pay one more proposal and, after it, the way to the end."""
        prices = StepPrices.of(engine)
        step = prices.proposal + prices.kept
        rest = step.flip(0).cumsum(0).flip(0)  # from a step to the end
        judged = random.double()
        judged[-1] = 1.0  # what is finished is judged
        rewards = judged.flip(0).cumsum(0).flip(0)
        enough = engine.nfe_left()[group] + SLACK >= rest[at]
        return enough & (engine.rewards_left()[group] >= rewards[at])
