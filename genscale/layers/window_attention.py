"""Self-attention inside shifted windows of a grid (Swin, arXiv:2103.14030)."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.layers.attention import attend


@lru_cache(maxsize=128)
def relative_index(
    table_window: int, height: int, width: int, device: torch.device
) -> tuple[int, Tensor]:
    """Return the rows of a bias table for all pairs of cells of a window.

    Args:
        table_window: side w of the largest window; the table has (2 w - 1)^2 rows.
        height: rows of the window, at most w.
        width: columns.
        device: where the index is put.

    Returns:
        The number of cells and int64 ``(cells * cells,)``, query by query.
    """
    with torch.inference_mode(False):  # kept longer than any such mode around this call
        rows = torch.arange(height, device=device).repeat_interleave(width)
        columns = torch.arange(width, device=device).repeat(height)
        down = rows[:, None] - rows + table_window - 1
        right = columns[:, None] - columns + table_window - 1
        return height * width, (down * (2 * table_window - 1) + right).flatten()


@lru_cache(maxsize=128)
def window_mask(
    size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], device: torch.device
) -> Tensor | None:
    """Return which cells of a window see each other, or None where all do.

    Cells that the cyclic shift brought together from opposite edges do not, nor do real cells
    and those that fill the grid up to whole windows.

    Args:
        size: rows and columns of the grid, before it is filled up.
        window: rows and columns of a window.
        shift: rows and columns by which the filled-up grid is rolled to the top left.
        device: where the mask is put.

    Returns:
        ``(windows, cells, cells)`` float32, 0 or minus infinity.
    """
    filled = [-(-length // side) * side for length, side in zip(size, window, strict=True)]
    if not any(shift) and filled == list(size):
        return None
    with torch.inference_mode(False):
        kinds = []
        for length, total, offset in zip(size, filled, shift, strict=True):
            place = torch.arange(total, device=device).roll(-offset)
            # 1: wrapped around the edge; 2: no real cell
            kinds.append(torch.where(place >= length, 2, (place < offset).long()))
        rows, columns = kinds
        kind = torch.where((rows[:, None] == 2) | (columns == 2), 9, 2 * rows[:, None] + columns)
        windows = split_windows(kind[None, :, :, None], window)[0, :, :, 0]
        apart = windows[:, :, None] != windows[:, None]
        return torch.zeros(apart.shape, device=device).masked_fill_(apart, -torch.inf)


def split_windows(x: Tensor, window: tuple[int, int]) -> Tensor:
    """Cut a grid ``(B, H, W, C)`` into windows ``(B, windows, cells, C)``."""
    x = x.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def join_windows(x: Tensor, window: tuple[int, int], height: int) -> Tensor:
    """Undo :func:`split_windows` for a grid of ``height`` rows."""
    x = x.unflatten(2, window).unflatten(1, (height // window[0], -1))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class WindowAttention(nn.Module):
    """Multi-head attention inside windows, with a learned bias a relative position and head.

    A grid that is no larger than a window is one window and is not shifted. Grids of other sides
    are filled up to whole windows with cells that nothing attends to.

    Args:
        hidden_size: width C.
        num_heads: heads; C must be a multiple of it.
        window_size: side w of a window.
        shifted: roll the grid by half a window, so that windows straddle those of the block
            before.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, window_size: int, *, shifted: bool = False
    ) -> None:
        super().__init__()
        self.num_heads, self.window_size, self.shifted = num_heads, window_size, shifted
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)
        self.bias_table = nn.Parameter(torch.empty((2 * window_size - 1) ** 2, num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the bias table from a normal law of standard deviation 0.02."""
        nn.init.trunc_normal_(self.bias_table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the cells of a grid ``(B, H, W, C)`` inside windows."""
        size = x.shape[1], x.shape[2]
        rows, row_shift, more_rows = self._fit(size[0])
        columns, column_shift, more_columns = self._fit(size[1])
        window, shift = (rows, columns), (row_shift, column_shift)
        # padding by nothing and rolling by nothing would copy the grid
        if more_rows or more_columns:
            x = F.pad(x, (0, 0, 0, more_columns, 0, more_rows))
        if any(shift):
            x = torch.roll(x, (-row_shift, -column_shift), dims=(1, 2))
        x = split_windows(x, window)
        # windows are folded into heads, so that the bias broadcasts over the batch uncopied
        q, k, v = (
            self.qkv(x)
            .unflatten(3, (3, self.num_heads, -1))
            .permute(3, 0, 1, 4, 2, 5)
            .flatten(2, 3)
            .unbind(0)
        )  # (B, windows * h, cells, d)
        bias = self._bias(x.device, size, window, shift).expand(x.shape[1], -1, -1, -1)
        y = attend(q, k, v, mask=bias.flatten(0, 1)[None].to(q.dtype))
        y = y.unflatten(1, (-1, self.num_heads)).transpose(2, 3).flatten(3)
        y = join_windows(self.out(y), window, size[0] + more_rows)
        if any(shift):
            y = torch.roll(y, shift, dims=(1, 2))
        return y[:, : size[0], : size[1]]

    def _fit(self, side: int) -> tuple[int, int, int]:
        """Return a window's side, the shift and the number of cells to add along one axis."""
        if side <= self.window_size:
            return side, 0, 0
        return self.window_size, self.window_size // 2 * self.shifted, -side % self.window_size

    def _bias(
        self,
        device: torch.device,
        size: tuple[int, int],
        window: tuple[int, int],
        shift: tuple[int, int],
    ) -> Tensor:
        """Return what is added to the logits: ``(windows or 1, h, cells, cells)``."""
        cells, index = relative_index(self.window_size, *window, device)
        # an embedding and not an index: its gradient is summed in a fixed order on a GPU too
        bias = F.embedding(index, self.bias_table).view(cells, cells, -1).permute(2, 0, 1)[None]
        mask = window_mask(size, window, shift, device)
        return bias if mask is None else bias + mask[:, None].to(bias.dtype)
