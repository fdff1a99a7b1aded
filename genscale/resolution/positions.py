"""Tables of positions for other grids than the trained one."""

from __future__ import annotations

import torch
from torch import Tensor

from genscale.layers.position_tables import (
    extend_levels,
    resize_position_table,
    resize_scale_table,
)

__all__ = [
    "extend_levels",
    "patch_places",
    "resize_bias_table",
    "resize_position_table",
    "resize_scale_table",
]


def patch_places(
    count: int, base: int, interpolation: float = 1.0, device: torch.device | None = None
) -> Tensor:
    """Return diffusers' places ``(count,)`` float64 of patches: i base / count / interpolation.

    The first stays at 0, whereas :func:`genscale.layers.embed.grid_places` keeps centres.

    Args:
        count: patches along the side.
        base: patches along the trained side.
        interpolation: of a model trained on a stretched grid.
        device: where to put them.
    """
    dtype = torch.float32 if device is not None and device.type == "mps" else torch.float64
    return torch.arange(count, dtype=dtype, device=device) * (base / count / interpolation)


def resize_bias_table(table: Tensor, trained: int, window: int) -> Tensor:
    """Stretch biases of relative positions over another window, bicubic.

    Args:
        table: ``((2 w0 - 1)^2, heads)``.
        trained: side w0 of the trained window.
        window: side w.

    Returns:
        ``((2 w - 1)^2, heads)``.
    """
    old, new = 2 * trained - 1, 2 * window - 1
    return resize_position_table(table, (old, old), (new, new))
