"""Keyed subsets of rows: the same rows for the same seed, anywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from genscale.rng import Purpose, key, permutation


def keyed_rows(count: int, limit: int, seed: int) -> Tensor:
    """Return at most ``limit`` of ``count`` row numbers, ascending; all of them where they fit."""
    if count <= limit:
        return torch.arange(count)
    return permutation(key(seed, Purpose.SUBSET), count)[:limit].sort().values


def stratified_rows(labels: Tensor, limit: int, seed: int) -> Tensor:
    """Return at most ``limit`` row numbers, ascending, with the classes in their proportions.

    Args:
        labels: ``(n,)`` int64.
        limit: number of rows wanted.
        seed: key of the choice within a class.
    """
    count = len(labels)
    if count <= limit:
        return torch.arange(count)
    place = torch.empty(count, dtype=torch.float64)  # a row's place in its class, in (0, 1)
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().flatten()
        order = permutation(key(seed, label, Purpose.SUBSET), len(rows))
        place[rows[order]] = (torch.arange(len(rows), dtype=torch.float64) + 0.5) / len(rows)
    return torch.argsort(place, stable=True)[:limit].sort().values
