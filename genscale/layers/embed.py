"""Embeddings of positions and times."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.layers.position_tables import resize_position_table

PositionResize = Literal["interpolate", "extend"]
"""What fixed positions do on another grid than the trained one; see :func:`grid_places`."""


def grid_places(
    count: int, trained: int, resize: PositionResize, device: torch.device | None = None
) -> Tensor:
    """Return the places ``(count,)`` of the cells along one side of a grid.

    On the trained grid they are 0, 1, ..., count - 1.

    Args:
        count: cells along the side.
        trained: cells along it in training.
        resize: ``"interpolate"`` stretches the grid over the trained one, so that a cell's
            centre keeps its place in the picture; ``"extend"`` keeps the numbers of the cells.
        device: where to put them.

    Returns:
        float64, or float32 on devices that know no float64.
    """
    dtype = torch.float32 if device is not None and device.type == "mps" else torch.float64
    places = torch.arange(count, dtype=dtype, device=device)
    if resize == "extend" or count == trained:
        return places
    return (places + 0.5) * (trained / count) - 0.5


def sincos_positions(rows: Tensor, columns: Tensor, hidden_size: int) -> Tensor:
    """Embed the cells of a grid by sines and cosines (arXiv:1706.03762), half the channels an axis.

    The first half encodes the COLUMN, the second the row, each as [sin(p w) | cos(p w)] with
    w_i = 10000^(-i / (D / 4)), i = 0 .. D / 4 - 1.

    Args:
        rows: ``(H,)`` places of the rows, in the precision to compute in.
        columns: ``(W,)`` places of the columns.
        hidden_size: width D, a multiple of 4.

    Returns:
        ``(H, W, D)`` float32.
    """
    quarter = hidden_size // 4
    exponents = torch.arange(quarter, dtype=rows.dtype, device=rows.device) / quarter
    frequencies = 10000.0**-exponents

    def embed(places: Tensor) -> Tensor:
        angles = places[:, None] * frequencies
        return torch.cat((angles.sin(), angles.cos()), dim=-1).float()

    shape = (len(rows), len(columns), hidden_size // 2)
    return torch.cat(
        (embed(columns)[None].expand(shape), embed(rows)[:, None].expand(shape)), dim=-1
    )


def sinusoid(t: Tensor, size: int) -> Tensor:
    """Embed times as [cos(t w) | sin(t w)], w_i = 10000^(-i / half), half = size // 2.

    Args:
        t: ``(B,)``; fractions are fine.
        size: width of the embedding; an odd one ends in a zero.

    Returns:
        ``(B, size)`` float32.
    """
    half = size // 2
    numbers = torch.arange(half, dtype=torch.float32, device=t.device)
    # in this order: times of 1000 make the last bit of a frequency 1e-4 of an angle
    angles = t.float()[:, None] * torch.exp(-math.log(10000.0) * numbers / half)
    return F.pad(torch.cat((angles.cos(), angles.sin()), dim=-1), (0, size % 2))


class TimeEmbedding(nn.Module):
    """Sinusoid of the time, then linear, SiLU, linear.

    Args:
        hidden_size: width D of the result.
        frequency_size: width of the sinusoid.
        inner_size: width between the layers; default D.
    """

    def __init__(
        self, hidden_size: int, *, frequency_size: int = 256, inner_size: int | None = None
    ) -> None:
        super().__init__()
        inner_size = hidden_size if inner_size is None else inner_size
        self.frequency_size = frequency_size
        self.linear_1 = nn.Linear(frequency_size, inner_size)
        self.linear_2 = nn.Linear(inner_size, hidden_size)

    def forward(self, t: Tensor) -> Tensor:
        """Embed times ``(B,)`` as vectors ``(B, D)``."""
        # the sinusoid is computed in float32 whatever the weights are
        wave = sinusoid(t, self.frequency_size).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(wave)))


class LearnedPositions(nn.Module):
    """A table of one learned vector a grid cell, row by row.

    Args:
        height: rows of the grid the table is trained on.
        width: columns.
        hidden_size: width D of the vectors.
        resize: what to do on another grid. ``"interpolate"`` stretches the table over it
            (bicubic), so that a vector keeps its place in the picture; ``"crop"`` takes the
            top-left corner, so that it keeps its row and column number, and refuses grids larger
            than the table.
    """

    def __init__(
        self,
        height: int,
        width: int,
        hidden_size: int,
        resize: Literal["interpolate", "crop"] = "interpolate",
    ) -> None:
        super().__init__()
        self.height, self.width, self.resize = height, width, resize
        self.table = nn.Parameter(torch.empty(height * width, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the vectors from a normal law of standard deviation 0.02."""
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, height: int, width: int) -> Tensor:
        """Return the vectors ``(height, width, D)`` of a grid.

        Raises:
            ValueError: the grid exceeds the table and ``resize`` is ``"crop"``.
        """
        table = self.table.view(self.height, self.width, -1)
        if (height, width) == (self.height, self.width):
            return table
        if self.resize == "crop":
            if height > self.height or width > self.width:
                raise ValueError(
                    f"The position table holds {self.height} x {self.width} cells but the input "
                    f"has {height} x {width}. Give a smaller input, or build the model with "
                    "position_resize='interpolate'."
                )
            return table[:height, :width]
        grid = (height, width)
        stretched = resize_position_table(self.table, (self.height, self.width), grid)
        return stretched.view(height, width, -1)
