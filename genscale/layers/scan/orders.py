"""Orders in which a scan visits the cells of a grid, as cached index tables."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

ScanKind = Literal["continuous", "cross"]
SCAN_KINDS: tuple[str, ...] = get_args(ScanKind)


@lru_cache(maxsize=128)
def scan_orders(
    kind: ScanKind, height: int, width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return four orders of a grid's cells and their inverses, made once a grid and device.

    | kind | orders |
    |---|---|
    | ``cross`` | rows; columns; both backwards (VMamba, arXiv:2401.10166) |
    | ``continuous`` | the same in turns, so that each step goes to a neighbour (arXiv:2408.02615) |

    The continuous orders are: rows downwards from the top left; rows upwards from the bottom left;
    columns rightwards from the bottom left; columns leftwards from the bottom right. They turn at
    every edge. Where the number of rows is even the second is the first backwards, and where the
    number of columns is, the fourth is the third; on odd numbers the second starts at the bottom
    right and the fourth at the top right, so that this holds there too.

    Args:
        kind: see the table.
        height: rows of the grid.
        width: columns.
        device: where the tables are put.

    Returns:
        Orders ``(4, L)`` int64: the cell (row times width plus column) visited at every step; and
        inverses ``(4, L)``: the step that visits every cell.
    """
    # kept longer than any inference mode around this call; torch.compile looks through the cache
    # and makes the tables part of its graph, which leaves the sides of the grid open
    with torch.inference_mode(False):
        cells = torch.arange(height * width, device=device).view(height, width)
        if kind == "cross":
            rows, columns = cells.flatten(), cells.T.flatten()
            orders = torch.stack((rows, columns, rows.flip(0), columns.flip(0)))
        else:
            rows, columns = _turn(cells).flatten(), _turn(cells.flip(0).T).flatten()
            orders = torch.stack((rows, rows.flip(0), columns, columns.flip(0)))
        return orders, orders.argsort(dim=1)


def _turn(lines: Tensor) -> Tensor:
    """Reverse every second line."""
    turned = lines.clone()
    turned[1::2] = lines[1::2].flip(1)
    return turned


class _PermuteRows(torch.autograd.Function):
    """Rows in another order; the gradient is gathered too, where plain indexing would scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return permute_rows(grads[0], inverse, order), None, None


def permute_rows(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Return ``x[order]`` along the first axis, for a permutation whose inverse is known."""
    result: Tensor = _PermuteRows.apply(x, order, inverse)
    return result
