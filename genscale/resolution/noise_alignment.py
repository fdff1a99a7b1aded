"""Noise for regions with detail, before an enlarged result is denoised again (arXiv:2503.18446)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.layers.norm import upcast
from genscale.resolution.base import Sides
from genscale.resolution.frequency import gaussian_blur


def edges(pictures: Tensor, *, low: float = 0.1, high: float = 0.2, sigma: float = 1.4) -> Tensor:
    """Return Canny's edges of pictures: ``(B, 1, H, W)`` float32, 1 on edges and 0 elsewhere.

    A blur, Sobel's gradients, maxima along the gradient, and those above ``high`` with all above
    ``low`` that hang together with them.

    Args:
        pictures: ``(B, C, H, W)`` in [-1, 1]; channels are averaged.
        low: of the gradient's length, in pictures whose black and white are 0 and 1.
        high: likewise.
        sigma: of the blur in pixels.
    """
    grey = (upcast(pictures).mean(1, keepdim=True).float() + 1) / 2
    size = 2 * math.ceil(2 * sigma) + 1
    # the border is continued, or it would be an edge
    margin = size // 2
    padded = F.pad(grey, (margin,) * 4, mode="replicate")
    grey = gaussian_blur(padded, size, sigma)[..., margin:-margin, margin:-margin]
    sobel = grey.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
    kernels = torch.stack((sobel, sobel.T))[:, None]
    across, down = F.conv2d(F.pad(grey, (1,) * 4, mode="replicate"), kernels).split(1, dim=1)
    length = torch.hypot(across, down)
    thin = torch.where(_is_maximum(length, across, down), length, torch.zeros_like(length))
    weak, strong = thin > low, (thin > high).float()
    while True:  # edges grow along weak ones; each round reaches one pixel further
        grown = (F.max_pool2d(strong, 3, stride=1, padding=1) > 0) & weak
        if torch.equal(grown.float(), strong):
            return strong
        strong = torch.maximum(strong, grown.float())


def noise_map(pictures: Tensor, sides: Sides, *, least: float = 0.0, most: float = 1.2) -> Tensor:
    """Return the deviation of noise, ``(B, 1, *sides)``: ``most`` where edges are densest.

    Args:
        pictures: ``(B, C, H, W)`` in [-1, 1].
        sides: height and width of the latents.
        least: where there are no edges.
        most: where they are densest, in each picture.
    """
    density = F.interpolate(edges(pictures), size=sides, mode="area")
    peak = density.amax(dim=(-2, -1), keepdim=True)
    return least + (most - least) * density / peak.clamp_min(1e-12)


def _is_maximum(length: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """Return where the gradient is no shorter than its two neighbours along it."""
    height, width = length.shape[-2:]
    padded = F.pad(length, (1, 1, 1, 1))

    def at(rows: int, columns: int) -> Tensor:
        return padded[..., 1 + rows : 1 + rows + height, 1 + columns : 1 + columns + width]

    angle = torch.atan2(down, across) % math.pi
    sector = torch.round(angle / (math.pi / 4)).long() % 4
    result = torch.zeros_like(length, dtype=torch.bool)
    for number, (rows, columns) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        peak = (length >= at(rows, columns)) & (length > at(-rows, -columns))
        result |= (sector == number) & peak
    return result
