"""Embeddings of positions."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.layers.norm import upcast


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
        stretched = F.interpolate(
            upcast(table).permute(2, 0, 1)[None], size=(height, width), mode="bicubic"
        )
        return stretched[0].permute(1, 2, 0).to(table.dtype)
