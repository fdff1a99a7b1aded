"""Colours as one luma and two chroma channels, ITU-R BT.601 as restoration papers have it.

Y = 16 + 65.481 R + 128.553 G + 24.966 B over 255 for R, G, B in [0, 1], so that Y is in
[16, 235] / 255 (MATLAB's rgb2ycbcr).
"""

from __future__ import annotations

import torch
from torch import Tensor

_MATRIX = (
    (65.481, 128.553, 24.966),
    (-37.797, -74.203, 112.0),
    (112.0, -93.786, -18.214),
)
_OFFSET = (16.0, 128.0, 128.0)


def rgb_to_ycbcr(images: Tensor) -> Tensor:
    """Return Y, Cb, Cr ``(B, 3, H, W)`` in [0, 1] of RGB pictures of that shape in [0, 1]."""
    matrix, offset = _constants(images)
    return torch.einsum("kc,bchw->bkhw", matrix, images) + offset


def ycbcr_to_rgb(images: Tensor) -> Tensor:
    """Return the RGB pictures that :func:`rgb_to_ycbcr` maps to ``images``, not clipped."""
    matrix, offset = _constants(images)
    return torch.einsum("kc,bchw->bkhw", torch.linalg.inv(matrix), images - offset)


def _constants(images: Tensor) -> tuple[Tensor, Tensor]:
    matrix = torch.tensor(_MATRIX, dtype=images.dtype, device=images.device)
    offset = torch.tensor(_OFFSET, dtype=images.dtype, device=images.device)
    return matrix / 255.0, offset.view(3, 1, 1) / 255.0
