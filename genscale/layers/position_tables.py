"""Learned tables of positions, for other grids than the trained one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.layers.norm import upcast

Grid = tuple[int, int]
"""Rows and columns."""


def resize_position_table(
    table: Tensor, trained: Grid, grid: Grid, *, extras: int = 0, keep_variance: bool = False
) -> Tensor:
    """Stretch a learned table over another grid, bicubic and in float32.

    Args:
        table: ``(..., extras + H0 W0, D)``, row by row.
        trained: H0 and W0.
        grid: H and W.
        extras: rows at the front that belong to no cell; they are kept.
        keep_variance: scale the result to the variance of the table, which interpolation lowers.

    Returns:
        ``(..., extras + H W, D)``.

    Raises:
        ValueError: a table of another number of rows.
    """
    if table.shape[-2] != extras + trained[0] * trained[1]:
        raise ValueError(
            f"A table of {extras} rows and a grid of {trained[0]} x {trained[1]} must have "
            f"{extras + trained[0] * trained[1]} rows, but has {table.shape[-2]}. Give the grid "
            "it was trained on."
        )
    if trained == grid:
        return table
    front, cells = table.split([extras, table.shape[-2] - extras], dim=-2)
    picture = upcast(cells).reshape(-1, *trained, table.shape[-1]).permute(0, 3, 1, 2)
    wide = F.interpolate(picture, size=grid, mode="bicubic", align_corners=False, antialias=False)
    if keep_variance:
        wide = wide * (picture.std() / wide.std().clamp_min(1e-12))
    rows = wide.permute(0, 2, 3, 1).reshape(*table.shape[:-2], -1, table.shape[-1])
    return torch.cat((front, rows.to(table.dtype)), dim=-2)


def resize_scale_table(table: Tensor, trained: Sequence[Grid], scales: Sequence[Grid]) -> Tensor:
    """Stretch a table over the scales of a scale-wise model, inside each scale.

    Scales beyond the trained ones stretch the last trained one. Without training this serves to
    about 1.5 times the trained side.

    Args:
        table: ``(..., sum of h w, D)``, scale after scale.
        trained: heights and widths of the table's scales.
        scales: heights and widths wanted, at least one.
    """
    parts = table.split([height * width for height, width in trained], dim=-2)
    last = len(parts) - 1
    return torch.cat(
        [
            resize_position_table(parts[min(k, last)], trained[min(k, last)], grid)
            for k, grid in enumerate(scales)
        ],
        dim=-2,
    )


def extend_levels(table: Tensor, count: int) -> Tensor:
    """Return ``count`` rows of a table ``(K, D)`` of levels; the last one serves all beyond."""
    return table[torch.arange(count, device=table.device).clamp(max=len(table) - 1)]
