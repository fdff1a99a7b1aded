"""Rotary positions that span the same range at every scale of a picture (arXiv:2412.01819)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genscale.layers.scales import Scales


class ScaleRoPE(nn.Module):
    """Turns the tokens of several scales by row and column; nothing is learned.

    Column c of w turns the first quarter of the channel pairs by
    c extent / (w - 1) theta^(-4 j / head_size), j = 0 .. head_size / 4 - 1, row r of h the second
    one likewise with h - 1. The first cell of every scale thus lies at 0 and its last one at
    ``extent``; a scale of one cell lies at 0. Turn with :func:`genscale.layers.rope.rotate`.

    Args:
        head_size: channels d of one head, a multiple of 4.
        theta: base of the frequencies.
        extent: place of the last cell along each axis.
    """

    def __init__(self, head_size: int, *, theta: float = 10000.0, extent: float = 128.0) -> None:
        super().__init__()
        self.head_size, self.theta, self.extent = head_size, theta, extent

    def cell_angles(self, scale: int, axis: int, count: int, device: torch.device) -> Tensor:
        """Return by how much one cell turns the pairs of an axis: ``(d / 4,)`` float32.

        Args:
            scale: number of the scale.
            axis: 0 for rows, 1 for columns.
            count: cells of that scale along the axis.
            device: where to put them.
        """
        exponents = torch.arange(0, self.head_size, 4, dtype=torch.float32, device=device)
        frequencies = 1.0 / self.theta ** (exponents / self.head_size)
        return frequencies * (self.extent / max(count - 1, 1))

    def rotation(
        self, scales: Scales, device: torch.device, *, first: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Return cosines and sines by which tokens are turned.

        Args:
            scales: heights and widths.
            device: where to put them.
            first: number of the first of these scales.

        Returns:
            ``(sum of h w, d / 2)`` float32 each, scale after scale, row by row.
        """

        def along(scale: int, axis: int, count: int) -> Tensor:
            places = torch.arange(count, dtype=torch.float32, device=device)
            return places[:, None] * self.cell_angles(scale, axis, count, device)

        angles = torch.cat(
            [
                torch.cat(
                    (
                        along(number, 1, width)[None].expand(height, -1, -1),
                        along(number, 0, height)[:, None].expand(-1, width, -1),
                    ),
                    dim=-1,
                ).flatten(0, 1)
                for number, (height, width) in enumerate(scales, first)
            ]
        )
        return angles.cos(), angles.sin()
