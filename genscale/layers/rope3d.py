"""Rotary positions in frames, rows and columns of a video (arXiv:2104.09864, arXiv:2503.20314)."""

from __future__ import annotations

import torch
from torch import Tensor


def axis_pairs(head_size: int) -> tuple[int, int, int]:
    """Return how many channel pairs of a head turn with the frame, the row and the column.

    Of c = d / 2 pairs, rows and columns get c // 3 each and frames the rest.
    """
    third = head_size // 2 // 3
    return head_size // 2 - 2 * third, third, third


def video_rotation(
    frames: Tensor, rows: Tensor, columns: Tensor, head_size: int, *, theta: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines for tokens at given places; any number is a place.

    Pair j of the n pairs of an axis turns by place theta^(-j / n). Turn with
    :func:`genscale.layers.rope.rotate`.

    Args:
        frames: places along time, of any shape.
        rows: places along the height, broadcastable to ``frames``.
        columns: places along the width, likewise.
        head_size: channels d of one head.
        theta: base of the frequencies.

    Returns:
        ``(..., d / 2)`` float32 each, shaped as the places broadcast together.
    """
    # angles of a thousand frames leave float32 few digits behind the point
    dtype = torch.float32 if frames.device.type == "mps" else torch.float64
    places = torch.broadcast_tensors(frames, rows, columns)
    angles = []
    for place, count in zip(places, axis_pairs(head_size), strict=True):
        exponents = torch.arange(count, dtype=dtype, device=frames.device) / count
        angles.append(place.to(dtype)[..., None] * theta**-exponents)
    joined = torch.cat(angles, dim=-1)
    return joined.cos().float(), joined.sin().float()


def grid_rotation(
    frames: Tensor,
    grid: tuple[int, int],
    head_size: int,
    *,
    theta: float = 10000.0,
    sides: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines ``(F h w, d / 2)`` of whole frames, frame by frame, row by row.

    Args:
        frames: ``(F,)`` places along time.
        grid: rows h and columns w of the tokens of a frame.
        head_size: channels d of one head.
        theta: base of the frequencies.
        sides: places of the rows ``(h,)`` and of the columns ``(w,)``; default 0, 1, ...
    """
    rows, columns = (
        (torch.arange(n, device=frames.device) for n in grid) if sides is None else sides
    )
    cosine, sine = video_rotation(
        frames[:, None, None], rows[:, None], columns, head_size, theta=theta
    )
    return cosine.flatten(0, 2), sine.flatten(0, 2)
