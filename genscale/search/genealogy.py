"""Who descends from whom: the tree of a search, for reports and to make a winner again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Generation:
    """The particles after one selection.

    Attributes:
        event: what happened: ``start``, ``resample``, ``keep``, ``move``, ``finish``.
        group: ``(n,)`` int64 prompts.
        parents: ``(n,)`` int64 rows of the generation before; -1 for one that begins.
        step: ``(n,)`` int64 steps taken.
        value: ``(n,)`` float64 rewards known of them, NaN where none is.
        seeds: ``(n,)`` int64.
        lineage: ``(n,)`` int64.
    """

    event: str
    group: Tensor
    parents: Tensor
    step: Tensor
    value: Tensor
    seeds: Tensor
    lineage: Tensor


@dataclass(slots=True)
class Genealogy:
    """All generations of a search, in order."""

    generations: list[Generation] = field(default_factory=list)

    def alive(self, number: int = -1) -> Tensor:
        """Return how many distinct ancestors of the first generation each prompt still has.

        Args:
            number: of the generation looked at.
        """
        last = self.generations[number]
        rows = torch.arange(len(last.group))
        stop = number % len(self.generations)
        for generation in reversed(self.generations[1 : stop + 1]):
            # one that begins later is its own ancestor, apart from all others
            parents = generation.parents[rows.clamp(min=0)]
            rows = torch.where(rows < 0, rows, torch.where(parents < 0, -2 - rows, parents))
        groups = sorted(set(last.group.tolist()))
        return torch.tensor([len(set(rows[last.group == g].tolist())) for g in groups])

    def trace(self, row: int) -> list[dict[str, Any]]:
        """Return the ancestors of a row of the last generation, first to last.

        With seed, lineage and step of each, the sample can be made again without a search.
        """
        found: list[dict[str, Any]] = []
        for generation in reversed(self.generations):
            if row < 0:
                break
            found.append(
                {
                    "event": generation.event,
                    "step": int(generation.step[row]),
                    "seed": int(generation.seeds[row]),
                    "lineage": int(generation.lineage[row]),
                    "reward": float(generation.value[row]),
                }
            )
            row = int(generation.parents[row])
        return found[::-1]

    def record(self, prompt: int) -> list[dict[str, Any]]:
        """Return one prompt's tree as plain containers; parents are numbers within the prompt."""
        tree: list[dict[str, Any]] = []
        place: Tensor | None = None
        for generation in self.generations:
            rows = (generation.group == prompt).nonzero()[:, 0]
            parents = generation.parents[rows]
            if place is not None:
                parents = torch.where(parents < 0, -1, place[parents.clamp(min=0)])
            tree.append(
                {
                    "event": generation.event,
                    "step": generation.step[rows].tolist(),
                    "parents": parents.tolist(),
                    "reward": [
                        None if value != value else value
                        for value in generation.value[rows].tolist()
                    ],
                }
            )
            place = torch.full((len(generation.group),), -1)
            place[rows] = torch.arange(len(rows))
        return tree
