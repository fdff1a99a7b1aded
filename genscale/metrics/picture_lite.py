"""Features of pictures without weights or labels: fixed random filters and simple statistics."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.metrics.features import FeatureNetwork, as_rgb
from genscale.metrics.lite import (
    ReferenceScale,
    check_least,
    mean_and_deviation,
    random_filters,
)
from genscale.metrics.subsets import keyed_rows

_GRID = 4  # colours are also told apart by their place, on a grid of this side
_RECIPE = "picture_lite_1"  # changes when equal settings give other numbers


class PictureLite(FeatureNetwork):
    """What keyed random filters say of a picture; nothing is trained, no labels are needed.

    Pictures are averaged over boxes to ``size`` pixels. Means and deviations over the picture of
    two layers of random filters and of the colours, and colours on a 4 x 4 grid, are scaled by the
    reference (see :class:`~genscale.metrics.lite.ReferenceScale`).

    It sees colours, sharpness, noise, number and size of things, and their rough place; it knows
    nothing of meaning, and its distances compare models of one data set only.

    Args:
        size: side that pictures are averaged down to; smaller ones stay.
        channels: filters of the first layer; the second has twice as many.
        max_images: pictures of the reference that the scales are taken from, at most.
        seed: key of the filters.
        name: word in metric names.

    Raises:
        ConfigError: a number is too small.
    """

    tap = "picture"
    first: Tensor
    second: Tensor

    def __init__(
        self,
        *,
        size: int = 32,
        channels: int = 16,
        max_images: int = 2000,
        seed: int = 0,
        name: str = "picture_lite",
    ) -> None:
        super().__init__()
        given = {"size": size, "channels": channels, "max_images": max_images}
        check_least(name, given, {"size": 8, "channels": 2, "max_images": 2})
        self.name = name
        self.size = size
        self.channels = channels
        self.max_images = max_images
        self.seed = seed
        self.resize = f"box_at_most_{size}"
        self.taps = {"picture": 6 * channels + 2 * 3 + 3 * _GRID**2}
        first = random_filters((channels, 3, 3, 3), 0, seed)
        # an even colour is told by the statistics; filters see what changes over the picture
        first = first - first.mean(dim=(2, 3), keepdim=True)
        self.register_buffer("first", first.float(), persistent=False)
        second = random_filters((2 * channels, channels, 3, 3), 1, seed)
        self.register_buffer("second", second.float(), persistent=False)
        self.scale = ReferenceScale(self.num_features, name)

    @property
    def description(self) -> str:
        """The name in protocols."""
        return f"{_RECIPE}_{self.num_features}"

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that, beside the data, decides the numbers."""
        return {
            "recipe": _RECIPE,
            "size": self.size,
            "channels": self.channels,
            "max_images": self.max_images,
            "seed": self.seed,
        }

    @property
    def sha256(self) -> str:
        """Digest of the data's fingerprint and the settings."""
        return self.scale.digest

    def prepare(self) -> None:
        """Raise a ``ConfigError`` unless real pictures have been seen."""
        self.scale.check()

    @torch.no_grad()
    def fit(self, images: Tensor, labels: Tensor | None, fingerprint: str) -> None:
        """Take the scales from real pictures; labels are not read."""
        if self.scale.is_fitted(fingerprint, self.settings):
            return
        rows = keyed_rows(len(images), self.max_images, self.seed).to(images.device)
        raw = torch.cat([self._raw(part) for part in images[rows].split(256)])
        self.scale.fit(raw, fingerprint, self.settings)

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return ``picture`` ``(B, num_features)`` float32."""
        return {"picture": self.scale(self._raw(images))}

    def _raw(self, images: Tensor) -> Tensor:
        values = as_rgb(images).to(self.first) / 255.0
        height, width = values.shape[2:]
        if max(height, width) > self.size:
            side = (min(height, self.size), min(width, self.size))
            values = F.adaptive_avg_pool2d(values, side)
        with torch.autocast(values.device.type, enabled=False):
            maps = F.relu(F.conv2d(_edged(values), self.first))
            deeper = F.relu(F.conv2d(_edged(maps), self.second, stride=2))
        told = [*mean_and_deviation(maps), *mean_and_deviation(deeper), *mean_and_deviation(values)]
        return torch.cat((*told, F.adaptive_avg_pool2d(values, _GRID).flatten(1)), dim=1)


def _edged(x: Tensor) -> Tensor:
    """Repeat the outermost pixels: a picture's edge is no edge in it."""
    return F.pad(x, (1, 1, 1, 1), mode="replicate")
