"""Zero-order search: walk through start noises by comparing neighbours (arXiv:2501.09732)."""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from genscale import rng
from genscale.errors import ConfigError, did_you_mean
from genscale.rewards.base import Reward
from genscale.rng import Purpose
from genscale.samplers.base import Sampler
from genscale.search.base import Search
from genscale.search.engine import Engine
from genscale.search.neighbours import deaf_to_noise, neighbours
from genscale.search.noises import own_noises, run_noises
from genscale.search.proposals import beats, check_end
from genscale.search.scorer import Scores

Accept = Literal["always", "improve"]


class ZeroOrder(Search):
    """Sample N neighbours of a pivot noise, go on from the best, K times.

    Neighbours lie on the sphere through the pivot, see :mod:`genscale.search.neighbours`. The first
    pivot is the noise of the plain sample, so one sample is the plain one. Diffusion models are
    searched by their start noise, and that of every step where steps draw noise; scale-wise ones by
    the normal numbers behind their token draws.

    With n_0 evaluations a sample, K rounds cost (1 + K N) n_0 evaluations and 1 + K N rewards: a
    pivot's score is remembered. Each restart of ``improve`` adds n_0 and 1. A prompt that cannot
    pay a whole round takes as many neighbours as it can.

    Args:
        neighbours: N.
        rounds: K; None goes on while the budget lasts.
        cosine: lambda in [0, 1) of the paper, of the angle between pivot and neighbour: near 1 the
            search is local, 0 is as good as random.
        accept: ``always`` goes on from the best neighbour, as in the paper. ``improve`` does so
            where it beats the pivot, and else begins again from a fresh noise.

    Raises:
        ConfigError: numbers out of range.
    """

    grows: ClassVar[str | None] = "rounds"

    def __init__(
        self,
        neighbours: int = 4,
        *,
        rounds: int | None = 8,
        cosine: float = 0.95,
        accept: Accept = "always",
    ) -> None:
        if neighbours < 1 or (rounds is not None and rounds < 1):
            raise ConfigError(
                "search.neighbours and search.rounds must be at least 1, but are "
                f"{neighbours} and {rounds}. rounds=null goes on while the budget lasts."
            )
        if not 0.0 <= cosine < 1.0:
            raise ConfigError(
                f"search.cosine must lie in [0, 1), but is {cosine}. 0.95 keeps neighbours near."
            )
        if accept not in get_args(Accept):
            raise ConfigError(
                f"search.accept must be one of {', '.join(get_args(Accept))}, but is {accept!r}."
                f"{did_you_mean(str(accept), get_args(Accept))}"
            )
        self.neighbours = neighbours
        self.rounds = rounds
        self.cosine = float(cosine)
        self.accept = accept

    @property
    def label(self) -> str:
        """The name and everything that changes its results."""
        rounds = "budget" if self.rounds is None else self.rounds
        return f"ZeroOrder(N {self.neighbours}, K {rounds}, {self.cosine:g}, {self.accept})"

    def problems(self, sampler: Sampler, reward: Reward | None = None) -> list[str]:
        """Also refuse samplers that noise does not move."""
        return super().problems(sampler, reward) + deaf_to_noise(type(self).__name__, sampler)

    def explore(self, engine: Engine) -> None:
        """Sample the pivots' neighbours, a round in one batch, and move the pivots."""
        check_end(engine, self.rounds, "search.rounds")
        size = self.neighbours + 1  # slot 0 is the pivot
        noise, seeds = own_noises(engine, engine.seeds), engine.seeds.clone()
        parents = torch.full_like(seeds, -1)
        pivots: Scores | None = None  # of prompts whose pivot was sampled
        number = 0
        while self.rounds is None or number < self.rounds:
            wanted = torch.ones(len(seeds), size, dtype=torch.bool)
            if pivots is not None:
                wanted[pivots.group, 0] = False
            affordable = engine.each_affords(nfe=engine.costs.total, rewards=1)
            wanted &= wanted.cumsum(1) <= affordable[:, None]
            rows = wanted.flatten().nonzero()[:, 0]
            if len(rows) == 0:
                return
            around = self._around(engine, noise, number)
            state = run_noises(engine, around, seeds, wanted)
            scores = engine.finish(state)
            event = "move" if number else "start"
            engine.record(event, state, parents=parents[state.group], value=scores.value)

            remembered = 0 if pivots is None else len(pivots)
            pool = scores if pivots is None else Scores.cat((pivots, scores))
            slot = torch.cat((torch.zeros(remembered, dtype=torch.int64), rows % size))
            moved, stuck = self._choose(engine, pool, slot)
            group = pool.group[moved]
            taken = rows[moved - remembered].to(noise.device)
            noise[group.to(noise.device)] = around.flatten(0, 1)[taken]
            parents[group] = moved - remembered
            pivots = pool.select(moved)
            number += 1
            if len(stuck) > 0:
                parents[stuck] = -1
                seeds[stuck] = engine.particle_seeds(1, first=number)[stuck]
                fresh = stuck.to(noise.device)
                noise[fresh] = own_noises(engine, seeds)[fresh]

    def _around(self, engine: Engine, noise: Tensor, number: int) -> Tensor:
        """Return every prompt's pivot and its neighbours ``(G, N + 1, K, ...)``.

        Each of the K noises of a neighbour lies on the sphere through the pivot's own.
        """
        places = torch.arange(self.neighbours)[None]
        keys = rng.key(engine.seeds[:, None], number, places, Purpose.NEIGHBOUR)
        directions = rng.normal(keys.to(noise.device), tuple(noise.shape[1:]))
        near = [
            neighbours(noise[:, k], directions[:, :, k], self.cosine) for k in range(noise.shape[1])
        ]
        return torch.cat((noise[:, None], torch.stack(near, 2)), 1)

    def _choose(self, engine: Engine, pool: Scores, slot: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of ``pool`` that are the next pivots, and the prompts to begin again.

        Prompts that could pay no neighbour are in neither.
        """
        # all that compete are ordered together: some rewards rank them among each other
        order = engine.scorer.compare(pool)
        moved, stuck = [], []
        for prompt in range(engine.num_prompts):
            mine = (pool.group == prompt).nonzero()[:, 0]
            near, pivot = mine[slot[mine] > 0], mine[slot[mine] == 0]
            if len(near) == 0:
                continue
            best = near[order[near].argmax()]
            if self.accept == "always" or bool(beats(order[best], order[pivot])):
                moved.append(int(best))
            else:
                stuck.append(prompt)
        return torch.tensor(moved, dtype=torch.int64), torch.tensor(stuck, dtype=torch.int64)
