"""Search over paths: noise trajectories a little, solve them further, keep the best."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from genscale.errors import ConfigError
from genscale.objectives.base import Family
from genscale.rewards.base import Reward
from genscale.samplers.base import Sampler, State
from genscale.samplers.grid import GridSampler
from genscale.search.base import Search
from genscale.search.engine import Engine
from genscale.search.proposals import afforded, judge
from genscale.search.scorer import best_first


class SearchOverPaths(Search):
    """N paths; each round noises M copies of every path and keeps the N best (arXiv:2501.09732).

    1. Solve N noises from pure noise to level ``start``.
    2. Noise M copies of each by ``forward`` with the exact kernel of the process.
    3. Solve them by ``backward``, which is more; look at where they seem to go.
    4. Keep the N best of a prompt, and go on with 2 until nothing is left to solve.

    Levels are t in [0, 1] of the linear flow; on other processes they mean the level of equal
    signal-to-noise ratio, t = sigma / (alpha + sigma). Each is rounded to the nearest step of the
    sampler's grid; a round goes back at least one step where ``forward`` is positive, and gains
    at least one. A ``backward`` segment takes as many evaluations as the grid has there.

    With R rounds from step i_r back to u_r and on to d_r, and one evaluation a step, it costs
    N i_1 + sum_r N M (d_r - u_r) + (R - 1) N M evaluations, the last term for the looks, and R N M
    rewards; see :meth:`price`. Without a choice, M = 1, nothing is looked at but the N samples.

    Args:
        paths: N; fewer where the budget asks for it.
        width: M, fewer where the budget asks for it; None takes as many as it allows.
        start: level at which the search begins, in (0, 1).
        forward: by how much copies are noised; 0 does not noise them.
        backward: by how much they are solved.
        elite: let every path compete un-noised, too.

    Raises:
        ConfigError: numbers out of range.
    """

    families = frozenset[Family]({"diffusion"})
    needs_renoise = True
    grows: ClassVar[str | None] = "width"

    def __init__(
        self,
        paths: int = 2,
        *,
        width: int | None = 4,
        start: float = 0.8,
        forward: float = 0.1,
        backward: float = 0.2,
        elite: bool = False,
    ) -> None:
        if paths < 1 or (width is not None and width < 1):
            raise ConfigError(
                f"search.paths and search.width must be at least 1, but are {paths} and {width}. "
                "width=null takes as many as the budget allows."
            )
        if not (0.0 < start < 1.0 and 0.0 <= forward < backward <= 1.0):
            raise ConfigError(
                "search.start must lie in (0, 1), and search.forward in [0, search.backward), but "
                f"they are start={start}, forward={forward}, backward={backward}. 0.8, 0.1 and 0.2 "
                "are usual."
            )
        self.paths = paths
        self.width = width
        self.start = float(start)
        self.forward = float(forward)
        self.backward = float(backward)
        self.elite = elite

    @property
    def label(self) -> str:
        """The name and everything that changes its results."""
        width = "budget" if self.width is None else self.width
        levels = f"{self.start:g} +{self.forward:g} -{self.backward:g}"
        return f"SearchOverPaths(N {self.paths}, M {width}, {levels}{', elite' * self.elite})"

    def problems(self, sampler: Sampler, reward: Reward | None = None) -> list[str]:
        """Also refuse copies that would stay equal."""
        found = super().problems(sampler, reward)
        if not found and self.forward == 0.0 and self.width != 1 and not sampler.stochastic:
            found.append(
                "search SearchOverPaths with forward=0 makes copies that stay equal, because "
                f"sampler {sampler.label} draws no noise. Use search.forward=0.1, say."
            )
        return found

    def rounds(self, engine: Engine) -> list[tuple[int, int, int]]:
        """Return (at, up, down) of every round: the step it begins at, goes back to, ends at."""
        sampler = engine.sampler
        assert isinstance(sampler, GridSampler)  # problems() has refused others
        level = sampler.levels(engine.model.process)
        times = level.sigma / (level.alpha + level.sigma)
        last = sampler.num_steps

        def nearest(time: float) -> int:
            return int((times - time).abs().argmin())

        found: list[tuple[int, int, int]] = []
        at = min(max(1, nearest(self.start)), last)
        while at < last:
            noisier = float(times[at]) + self.forward
            up = min(nearest(noisier), at - 1) if self.forward > 0.0 else at
            target = noisier - self.backward
            down = last if target <= float(times[-1]) else max(at + 1, nearest(target))
            found.append((at, up, down))
            at = down
        return found

    def price(self, engine: Engine, paths: int, width: int) -> tuple[float, int]:
        """Return the evaluations and rewards of a prompt with so many paths and copies."""
        costs, last = engine.costs, engine.sampler.num_steps
        look = torch.cat((costs.evaluate, costs.evaluate.new_zeros(1))).tolist()
        rounds, rivals = self.rounds(engine), width + int(self.elite)
        nfe, rewards = costs.between(0, rounds[0][0] if rounds else last), 0
        known = False
        for at, up, down in rounds:
            stays = up == at
            if (stays or self.elite) and not known:
                nfe += look[at]
            nfe += width * (costs.between(up, down) - look[at] * stays)
            nfe += (costs.between(at, down) - look[at]) * self.elite
            known = rivals > 1
            if known:
                nfe += rivals * look[down]
                rewards += rivals
        return nfe * paths, (rewards or 1) * paths

    def least(self, engine: Engine) -> tuple[float, int]:
        """Return the evaluations and rewards of one path, one copy a round."""
        if not isinstance(engine.sampler, GridSampler):  # problems() refuses it
            return super().least(engine)
        return self.price(engine, 1, 1)

    def explore(self, engine: Engine) -> None:
        """Solve, noise, look, select, until all is solved."""
        paths, width = self._afforded(engine)
        rounds = self.rounds(engine)
        state = engine.start(paths)
        engine.record("start", state)
        state = engine.run(state, rounds[0][0] if rounds else None)
        judged = width + int(self.elite) > 1  # else there is nothing to choose from
        for at, up, down in rounds:
            rivals, parents = self._rivals(engine, state, width, at, up, down)
            if not judged:
                state = rivals
                continue
            rivals, scores = judge(engine, rivals)
            best = best_first(engine.scorer.compare(scores), rivals.group, paths)
            state = rivals.select(best)
            engine.record("keep", state, parents=parents[best], value=scores.value[best])
        if not (judged and rounds):
            engine.finish(state)

    def _rivals(
        self, engine: Engine, state: State, width: int, at: int, up: int, down: int
    ) -> tuple[State, Tensor]:
        """Return the copies of every path, solved, and the rows they come from."""
        assert isinstance(engine.sampler, GridSampler)  # problems() has refused others
        every = torch.arange(len(state))
        rows = every.repeat_interleave(width)
        if self.elite or up == at:
            state = engine.evaluate(state)  # once for all that stay
        copies = engine.branch(state, rows)
        if up < at:
            copies = engine.sampler.renoise(copies, up)
        copies = engine.run(copies, down)
        if not self.elite:
            return copies, rows
        # beside copies that stay, the path itself is one more
        number = torch.full_like(every, width if up == at else 0)
        kept = engine.run(engine.branch(state, every, number), down)
        return State.cat([copies, kept]), torch.cat((rows, every))

    def _afforded(self, engine: Engine) -> tuple[int, int]:
        """Return N and M as the budget allows them; fewer paths before there is nothing to choose.

        Noised once and not chosen from, a path only loses what it had.
        """
        nfe, rewards = float(engine.nfe_left().min()), float(engine.rewards_left().min())
        some = 1 if self.elite or self.width == 1 else 2
        fitting = [
            (count, copies)
            for copies in (some, 1)
            for count in range(self.paths, 0, -1)
            for price in (self.price(engine, count, copies),)
            if price[0] <= nfe and price[1] <= rewards
        ]
        paths, copies = fitting[0] if fitting else (1, 1)
        if copies < some:
            return paths, copies
        two, three = self.price(engine, paths, 2), self.price(engine, paths, 3)
        each = three[0] - two[0], float(three[1] - two[1])
        fixed = two[0] - 2 * each[0], two[1] - 2 * each[1]
        width = afforded(engine, self.width, each=each, fixed=fixed, setting="search.width")
        return paths, max(copies, width)
