"""Rotary positions that span the same range at every scale of a picture (arXiv:2412.01819)."""

from __future__ import annotations

import torch
from torch import Tensor

from genscale.layers.scales import Scales


def scale_rotation(
    scales: Scales,
    head_size: int,
    *,
    theta: float = 10000.0,
    extent: float = 128.0,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines by which the tokens of several scales are turned.

    Column c of w turns the first quarter of the channel pairs by
    c extent / (w - 1) theta^(-4 j / head_size), j = 0 .. head_size / 4 - 1, row r of h the second
    one likewise with h - 1. The first cell of every scale thus lies at 0 and its last one at
    ``extent``; a scale of one cell lies at 0. Turn with :func:`genscale.layers.rope.rotate`.

    Args:
        scales: heights and widths.
        head_size: channels d of one head, a multiple of 4.
        theta: base of the frequencies.
        extent: place of the last cell along each axis.
        device: where to put them.

    Returns:
        ``(sum of h w, d / 2)`` float32 each, scale after scale, row by row.
    """
    exponents = torch.arange(0, head_size, 4, dtype=torch.float32, device=device)
    frequencies = 1.0 / theta ** (exponents / head_size)  # (d / 4,)

    def along(count: int) -> Tensor:
        places = torch.arange(count, dtype=torch.float32, device=device)
        return places[:, None] * (frequencies * (extent / max(count - 1, 1)))

    angles = torch.cat(
        [
            torch.cat(
                (
                    along(width)[None].expand(height, -1, -1),
                    along(height)[:, None].expand(-1, width, -1),
                ),
                dim=-1,
            ).flatten(0, 1)
            for height, width in scales
        ]
    )
    return angles.cos(), angles.sin()
