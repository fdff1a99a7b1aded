"""Ordering candidates that a judge can only compare two at a time.

``beats`` is told pairs of candidates and returns the probabilities that the first of each is the
better one. An even duel goes to the one that comes first. Every function returns a number a
candidate; the highest is the best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from genscale import rng
from genscale.rng import Purpose

Beats = Callable[[list[tuple[int, int]]], list[float]]


def champion_ladder(values: Sequence[float], beats: Beats) -> list[float]:
    """Let every candidate challenge the best so far: N - 1 duels, one after the other.

    Later champions come first, then those that never were one, by their values.
    """
    order = [_below_one(value) - 1.0 for value in values]
    champion = 0
    order[0] = reigns = 0.0
    for challenger in range(1, len(values)):
        (wins,) = beats([(challenger, champion)])
        if wins > 0.5:
            champion, reigns = challenger, reigns + 1.0
            order[champion] = reigns
    return order


def tournament(values: Sequence[float], beats: Beats) -> list[float]:
    """Play rounds of neighbours until one is left: N - 1 duels in about log2 N rounds.

    Candidates come by the rounds they lived through, then by their values. The last of an odd
    number goes on without a duel.
    """
    order = [_below_one(value) for value in values]
    left = list(range(len(values)))
    while len(left) > 1:
        pairs = list(zip(left[::2], left[1::2], strict=False))
        chances = beats([(second, first) for first, second in pairs])
        winners = [
            second if chance > 0.5 else first
            for (first, second), chance in zip(pairs, chances, strict=True)
        ]
        left = winners + left[2 * len(pairs) :]
        for candidate in left:
            order[candidate] += 1.0
    return order


def against_references(
    values: Sequence[float], beats: Beats, *, count: int, seed: int, request: int
) -> list[float]:
    """Compare every candidate with the same few, drawn among them; the mean chance to win.

    Against itself a candidate has an even chance.

    Args:
        values: of the candidates; their number alone matters.
        beats: the judge.
        count: candidates to draw.
        seed: of the draw.
        request: number of what was asked; requests draw apart.
    """
    total = len(values)
    keys = rng.key(seed, request, torch.arange(total), Purpose.CHOICE)
    drawn = torch.argsort(keys, stable=True)[:count].tolist()
    pairs = [(i, j) for j in drawn for i in range(total) if i != j]
    sums = [0.5 if i in drawn else 0.0 for i in range(total)]
    for (i, _), chance in zip(pairs, beats(pairs), strict=True):
        sums[i] += chance
    return [each / max(1, len(drawn)) for each in sums]


def all_pairs(values: Sequence[float], beats: Beats) -> list[float]:
    """Compare all with all, N (N - 1) / 2 duels; the mean chance to win.

    Where everyone meets everyone, a Bradley-Terry fit orders by the same sums.
    """
    total = len(values)
    pairs = [(i, j) for j in range(total) for i in range(j + 1, total)]
    sums = [0.0] * total
    for (i, j), chance in zip(pairs, beats(pairs), strict=True):
        sums[i] += chance
        sums[j] += 1.0 - chance
    return [each / max(1, total - 1) for each in sums]


def _below_one(value: float) -> float:
    """Map any number to (0, 1), in order: it only decides among equals."""
    return 0.5 + math.atan(value) / math.pi * (1.0 - 1e-12)
