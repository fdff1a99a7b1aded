"""Pixels as features: no weights, no training, no opinion."""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.errors import ConfigError
from genscale.metrics.features import FeatureNetwork, check_images


class Pixels(FeatureNetwork):
    """Pictures averaged over boxes to a small square, values in [0, 1], flattened.

    A Frechet distance of 8x8 pixels sees colours, layout and missing classes, but no detail.

    Args:
        size: side of the square; None keeps every pixel.
        name: word in metric names.
    """

    tap = "pixels"

    def __init__(self, size: int | None = 8, *, name: str = "pixels") -> None:
        super().__init__()
        if size is not None and size < 1:
            raise ConfigError(f"size={size} is below 1. Give the side of the square in pixels.")
        self.size = size
        self.name = name
        self.resize = "none" if size is None else "box"
        self.taps = {"pixels": 0}  # known once the first pictures have been seen

    @property
    def description(self) -> str:
        """The name in protocols: pixels with their size."""
        return "pixels" if self.size is None else f"pixels_{self.size}x{self.size}"

    @property
    def sha256(self) -> str:
        """Digest of the recipe, which is all there is."""
        return hashlib.sha256(self.description.encode()).hexdigest()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return ``(B, C * size * size)`` float32 in [0, 1]."""
        values = check_images(images).to(torch.float32) / 255.0
        if self.size is not None:
            values = F.adaptive_avg_pool2d(values, self.size)
        values = values.flatten(1)
        self.taps = {"pixels": values.shape[1]}
        return {"pixels": values}
