"""L-BFGS for many small problems at once, each with its own memory and its own step length."""

from __future__ import annotations

import torch
from torch import Tensor

_ENOUGH = 1e-4  # of the foretold decrease, for a step to be taken (Armijo)
_CURVED = 1e-10  # of |y|^2: less curvature than that is noise
_SHORTEST, _LONGEST = 0.1, 0.5  # what a refused step may shrink to


class RowLBFGS:
    """Minimise one function a row; every call of :meth:`step` hands in one evaluation of each.

    A step is taken where the function falls by a part of what its slope foretells; otherwise it is
    tried again, shorter, by the parabola through what is known. There is no curvature condition:
    pairs of too little curvature are not remembered, so that every evaluation, which is a whole
    trajectory here, moves or shortens.

    Args:
        rows: ``(n, D)`` where they begin.
        rate: length of the first step along the gradient, and factor of the later ones.
        history: pairs to remember a row.
    """

    def __init__(self, rows: Tensor, *, rate: float = 1.0, history: int = 3) -> None:
        self.rate = rate
        self.place, self.gradient = rows.clone(), torch.zeros_like(rows)
        self.value = rows.new_full((len(rows),), torch.inf)
        self.direction = torch.zeros_like(rows)
        self.length = torch.ones_like(self.value)
        self.moves = rows.new_zeros((history, *rows.shape))  # newest last
        self.changes = torch.zeros_like(self.moves)
        self.weights = self.moves.new_zeros(history, len(rows))  # 1 / (s y); 0: no pair

    def step(self, tried: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        """Return where to evaluate next, ``(n, D)``.

        Args:
            tried: ``(n, D)`` where the functions were evaluated: what was returned last.
            value: ``(n,)``.
            gradient: ``(n, D)``.
        """
        slope = (self.direction * self.gradient).sum(1)
        first = self.value.isinf()
        good = first | (value <= self.value + _ENOUGH * self.length * slope)
        self._remember(tried, gradient, good & ~first)
        fall = value - self.value - self.length * slope
        shorter = (-0.5 * slope * self.length / fall).nan_to_num(nan=_SHORTEST)
        self.length = torch.where(good, self.rate, self.length * shorter.clamp(_SHORTEST, _LONGEST))
        rows = good[:, None]
        self.place = torch.where(rows, tried, self.place)
        self.gradient = torch.where(rows, gradient, self.gradient)
        self.value = torch.where(good, value, self.value)
        self.direction = torch.where(rows, self._ahead(), self.direction)
        return self.place + self.length[:, None] * self.direction

    def _remember(self, tried: Tensor, gradient: Tensor, taken: Tensor) -> None:
        move, change = tried - self.place, gradient - self.gradient
        curvature = (move * change).sum(1)
        kept = taken & (curvature > _CURVED * change.square().sum(1))
        for memory, new in (
            (self.moves, move),
            (self.changes, change),
            (self.weights, torch.where(kept, 1.0 / curvature, 0.0)),
        ):
            mask = kept if memory.dim() == 2 else kept[:, None]
            shifted = torch.cat((memory[1:], new[None]))
            memory.copy_(torch.where(mask, shifted, memory))

    def _ahead(self) -> Tensor:
        """Return -H g by the two loops over the pairs (Nocedal and Wright, algorithm 7.4)."""
        ahead = -self.gradient
        shares = []
        for move, change, weight in self._pairs(newest_first=True):
            share = weight * (move * ahead).sum(1)
            ahead = ahead - share[:, None] * change
            shares.append(share)
        newest = self.changes[-1].square().sum(1) * self.weights[-1]
        known = newest > 0
        size = self.gradient.norm(dim=1).clamp(min=torch.finfo(ahead.dtype).tiny)
        ahead = ahead * torch.where(known, 1.0 / newest, 1.0 / size)[:, None]
        for (move, change, weight), share in zip(
            self._pairs(newest_first=False), reversed(shares), strict=True
        ):
            back = weight * (change * ahead).sum(1)
            ahead = ahead + (share - back)[:, None] * move
        return ahead

    def _pairs(self, *, newest_first: bool) -> list[tuple[Tensor, Tensor, Tensor]]:
        pairs = list(zip(self.moves, self.changes, self.weights, strict=True))
        return pairs[::-1] if newest_first else pairs
