"""Rotary positions in frames, rows and columns of a video (arXiv:2104.09864, arXiv:2503.20314)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Rotation = tuple[Tensor, Tensor]


def axis_pairs(head_size: int) -> tuple[int, int, int]:
    """Return how many channel pairs of a head turn with the frame, the row and the column.

    Of c = d / 2 pairs, rows and columns get c // 3 each and frames the rest.
    """
    third = head_size // 2 // 3
    return head_size // 2 - 2 * third, third, third


class VideoRoPE(nn.Module):
    """Turns tokens by their frame, row and column; nothing is learned.

    Pair j of the n pairs of an axis turns by place theta^(-j / n). Turn with
    :func:`genscale.layers.rope.rotate`.

    Args:
        head_size: channels d of one head.
        theta: base of the frequencies.
    """

    def __init__(self, head_size: int, *, theta: float = 10000.0) -> None:
        super().__init__()
        self.head_size, self.theta = head_size, theta

    def frequencies(self, axis: int, device: torch.device) -> Tensor:
        """Return by how much the pairs of an axis (frames, rows, columns) turn a place: ``(n,)``.

        They are float64, as angles of a thousand frames leave float32 few digits behind the point,
        or float32 on devices that know no float64.
        """
        count = axis_pairs(self.head_size)[axis]
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return self.theta ** -(torch.arange(count, dtype=dtype, device=device) / count)

    def rotation(self, frames: Tensor, rows: Tensor, columns: Tensor) -> Rotation:
        """Return cosines and sines for tokens at given places; any number is a place.

        Args:
            frames: places along time, of any shape.
            rows: places along the height, broadcastable to ``frames``.
            columns: places along the width, likewise.

        Returns:
            ``(..., d / 2)`` float32 each, shaped as the places broadcast together.
        """
        angles = []
        for axis, place in enumerate(torch.broadcast_tensors(frames, rows, columns)):
            frequencies = self.frequencies(axis, frames.device)
            angles.append(place.to(frequencies.dtype)[..., None] * frequencies)
        joined = torch.cat(angles, dim=-1)
        return joined.cos().float(), joined.sin().float()

    def grid_rotation(self, frames: Tensor, rows: Tensor, columns: Tensor) -> Rotation:
        """Return cosines and sines ``(F h w, d / 2)`` of whole frames, frame by frame, row by row.

        Args:
            frames: ``(F,)`` places along time.
            rows: ``(h,)`` places of the rows.
            columns: ``(w,)`` places of the columns.
        """
        cosine, sine = self.rotation(frames[:, None, None], rows[:, None], columns)
        return cosine.flatten(0, 2), sine.flatten(0, 2)
