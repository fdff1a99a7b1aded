"""Nearest neighbours in bounded memory, with distances that tie exactly where vectors do.

Squared distances come from one matrix product a block, |x|^2 + |y|^2 - 2 x . y, which is fast but
rounds. Wherever rounding could change an answer, the distance is recomputed directly as
sum (x - y)^2, a function of the pair alone; so equal pairs give equal numbers, a point and its
copy are at distance 0, and counts do not depend on block sizes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from genscale.errors import ConfigError

_BLOCK = 2048  # rows and columns of a block: 34 MB of float64
# Bound of the rounding of the matrix-product form, relative to |x|^2 + |y|^2.
_ROUNDING = 1e-12


def squared_norms(x: Tensor) -> Tensor:
    """Return ``(n,)`` squared lengths of the rows."""
    return x.square().sum(dim=1)


def direct_squared_distance(x: Tensor, y: Tensor) -> Tensor:
    """Return sum (x - y)^2 over the last axis; symmetric to the last bit."""
    return (x - y).square().sum(dim=-1)


def blocks(count: int, size: int = _BLOCK) -> Iterator[slice]:
    """Yield the slices that cut ``0 .. count - 1`` into blocks."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def approximate_squared(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return all squared distances ``(n, m)`` and the bound ``(n, m)`` of their rounding."""
    scale = squared_norms(x)[:, None] + squared_norms(y)[None]
    return (scale - 2.0 * (x @ y.T)).clamp_(min=0), scale.mul_(_ROUNDING)


def nearest_squared(
    x: Tensor, y: Tensor, k: int, *, exclude_self: bool = False
) -> tuple[Tensor, Tensor]:
    """Find the k nearest rows of ``y`` for every row of ``x``.

    Args:
        x: ``(n, d)`` float64.
        y: ``(m, d)`` float64.
        k: number of neighbours.
        exclude_self: row i of ``y`` is not a neighbour of row i of ``x`` (x and y are one set;
            copies of the row elsewhere do count).

    Returns:
        Squared distances ``(n, k)``, ascending, and the row numbers ``(n, k)`` in ``y``.

    Raises:
        ConfigError: if there are fewer than k candidates.
    """
    available = len(y) - (1 if exclude_self else 0)
    if not 1 <= k <= available:
        raise ConfigError(
            f"{k} nearest neighbours were asked for among {available} points. "
            "Generate more samples or lower the number of neighbours."
        )
    # a few more candidates than asked for: near-ties at the edge are settled by direct distances
    wanted = min(k + 4, available)
    distances = x.new_empty(len(x), k)
    rows = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    for part in blocks(len(x)):
        candidates = _candidates(x[part], y, wanted, part.start if exclude_self else None)
        exact = torch.stack(
            [direct_squared_distance(x[part], y[column]) for column in candidates.T], dim=1
        )
        exact, order = exact.sort(dim=1, stable=True)
        distances[part] = exact[:, :k]
        rows[part] = candidates.gather(1, order[:, :k])
    return distances, rows


def _candidates(x: Tensor, y: Tensor, wanted: int, first_row: int | None) -> Tensor:
    """Return ``(n, wanted)`` rows of ``y`` closest to each row of ``x``, by rounded distances."""
    best = x.new_full((len(x), 0), 0.0)
    best_rows = torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
    for part in blocks(len(y)):
        squared, _ = approximate_squared(x, y[part])
        numbers = torch.arange(part.start, part.stop, device=x.device)
        if first_row is not None:
            own = torch.arange(first_row, first_row + len(x), device=x.device)
            squared.masked_fill_(own[:, None] == numbers[None], float("inf"))
        best = torch.cat((best, squared), dim=1)
        best_rows = torch.cat((best_rows, numbers.expand(len(x), -1)), dim=1)
        best, order = best.topk(min(wanted, best.shape[1]), dim=1, largest=False)
        best_rows = best_rows.gather(1, order)
    return best_rows


def inside_blocks(
    points: Tensor, centres: Tensor, squared_radii: Tensor, *, strict: bool
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield, block by block, which points lie in which balls.

    Args:
        points: ``(n, d)`` float64.
        centres: ``(m, d)`` float64.
        squared_radii: ``(m,)`` from direct distances.
        strict: inside means distance < radius instead of <=.

    Yields:
        The slice of the points, the slice of the balls, and a bool block of that shape.
    """
    for rows in blocks(len(points)):
        for columns in blocks(len(centres)):
            squared, bound = approximate_squared(points[rows], centres[columns])
            radii = squared_radii[columns]
            inside = squared < radii if strict else squared <= radii
            unsure = ((squared - radii).abs_() <= bound).nonzero()
            for pairs in unsure.split(_BLOCK):
                i, j = pairs[:, 0], pairs[:, 1]
                exact = direct_squared_distance(points[rows][i], centres[columns][j])
                inside[i, j] = exact < radii[j] if strict else exact <= radii[j]
            yield rows, columns, inside
