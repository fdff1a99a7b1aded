"""Features of clips without weights: fixed random filters in space and time, and simple statistics.

They make FVD and KVD possible where no network is at hand. Such a distance is called
``fvd_clip_lite``; the name FVD alone belongs to I3D.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.metrics.lite import (
    ReferenceScale,
    check_least,
    mean_and_deviation,
    random_filters,
)
from genscale.metrics.subsets import keyed_rows
from genscale.metrics.video.clips import ClipNetwork

_LAGS = (1, 2, 4)  # frames between which changes are measured
_GRID = 4  # changes and colours are also told apart by their place, on a grid of this side
_RECIPE = "clip_lite_1"  # changes when equal settings give other numbers


class ClipLite(ClipNetwork):
    """What keyed random filters and frame differences say of a clip; nothing is trained.

    Clips are averaged over boxes to ``size`` pixels. Two layers of random 3 x 3 x 3 filters follow
    (half of the first layer's sum to zero over time and so see change alone), each map told by
    its mean and standard deviation over the clip. Beside them stand means and deviations of the
    colours, colours on a 4 x 4 grid, strengths of change at lags of 1, 2 and 4 frames with
    their unsteadiness over time, change on the grid, and its sharpness (the mean square over the
    squared mean). All are scaled by the reference's clips, see
    :class:`~genscale.metrics.lite.ReferenceScale`.

    What it can say: whether one data set's models get colours, sharpness, number and place of
    things, amount, smoothness and steadiness of motion right; frozen, shuffled, flickering,
    blurred, noisy, faded and repeated clips are all far from real ones. What it cannot say:
    anything of meaning (which object, whether it keeps its identity beyond colour and size),
    whether a direction is the one asked for, or how two data sets or two resolutions compare.
    Since each number is scaled by the reference, distances of two references never meet in a
    table: the data's digest is a part of the protocol.

    Args:
        size: side that clips are averaged down to; smaller clips stay.
        channels: filters of the first layer; the second has twice as many.
        max_clips: clips of the reference that shift and scale are taken from, at most.
        frames: frames read of a clip; None: all.
        stride: one of how many frames is read.
        seed: key of the filters.
        clips_a_pass: clips seen at once.
        name: word in metric names.

    Raises:
        ConfigError: a number is too small.
    """

    tap = "clip"
    first: Tensor
    second: Tensor

    def __init__(
        self,
        *,
        size: int = 32,
        channels: int = 16,
        max_clips: int = 500,
        frames: int | None = None,
        stride: int = 1,
        seed: int = 0,
        clips_a_pass: int = 16,
        name: str = "clip_lite",
    ) -> None:
        super().__init__(name, frames, stride)
        given = {
            "size": size,
            "channels": channels,
            "max_clips": max_clips,
            "clips_a_pass": clips_a_pass,
        }
        least = {"size": 8, "channels": 2, "max_clips": 2, "clips_a_pass": 1}
        check_least(name, given, least)
        self.size = size
        self.channels = channels
        self.max_clips = max_clips
        self.seed = seed
        self.clips_a_pass = clips_a_pass
        self.resize = f"box_at_most_{size}"
        filters = 2 * (channels + 2 * channels)
        statistics = 2 * 3 + 3 * _GRID**2 + 2 * len(_LAGS) + _GRID**2 + 1
        self.taps = {"clip": filters + statistics}
        first, second = _filters(channels, seed)
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("second", second, persistent=False)
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
            "max_clips": self.max_clips,
            "frames": self.frames,
            "stride": self.stride,
            "seed": self.seed,
        }

    @property
    def sha256(self) -> str:
        """Digest of the data's fingerprint and the settings."""
        return self.scale.digest

    def prepare(self) -> None:
        """Raise a ``ConfigError`` unless real clips have been seen."""
        self.scale.check()

    @torch.no_grad()
    def fit(self, images: Tensor, labels: Tensor | None, fingerprint: str) -> None:
        """Take shift and scale from real clips; a second call with the same data does nothing.

        Args:
            images: uint8 ``(n, 1 or 3, T, H, W)``.
            labels: not read.
            fingerprint: digest of the data.
        """
        if self.scale.is_fitted(fingerprint, self.settings):
            return
        rows = keyed_rows(len(images), self.max_clips, self.seed).to(images.device)
        self.scale.fit(self._raw(images[rows]), fingerprint, self.settings)

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return ``clip`` ``(B, num_features)`` float32 of clips ``(B, 1 or 3, T, H, W)``."""
        return {"clip": self.scale(self._raw(images))}

    def _raw(self, clips: Tensor) -> Tensor:
        """Return the numbers as they are, ``(B, num_features)``."""
        clips = self.window(clips).to(self.first.device)
        with torch.autocast(clips.device.type, enabled=False):
            return torch.cat([self._look(part) for part in clips.split(self.clips_a_pass)])

    def _look(self, clips: Tensor) -> Tensor:
        values = clips.to(self.first) / 255.0
        height, width = clips.shape[3:]
        if max(height, width) > self.size:
            side = (clips.shape[2], min(height, self.size), min(width, self.size))
            values = F.adaptive_avg_pool3d(values, side)
        return torch.cat((_responses(values, self.first, self.second), _statistics(values)), dim=1)


def _filters(channels: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw both layers; half of the first one's filters see change over time alone."""
    first = random_filters((channels, 3, 3, 3, 3), 0, seed)
    first = first - first.mean(dim=(1, 2, 3, 4), keepdim=True)
    moving = first[: channels // 2]
    first[: channels // 2] = moving - moving.mean(dim=2, keepdim=True)
    return first.float(), random_filters((2 * channels, channels, 3, 3, 3), 1, seed).float()


def _responses(values: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return mean and deviation of every map of both layers, ``(B, 6 * channels)``."""
    padded = F.pad(values, (1, 1, 1, 1, 1, 1), mode="replicate")  # the clip's edge is no change
    maps = F.relu(F.conv3d(padded, first, stride=(1, 2, 2)))
    deeper = F.relu(F.conv3d(F.pad(maps, (1,) * 6, mode="replicate"), second, stride=2))
    return torch.cat((*mean_and_deviation(maps), *mean_and_deviation(deeper)), dim=1)


def _statistics(values: Tensor) -> Tensor:
    """Return statistics of colour and change of clips ``(B, 3, T, h, w)`` in [0, 1]."""
    grid = F.adaptive_avg_pool2d(values.mean(dim=2), _GRID).flatten(1)
    told = [*mean_and_deviation(values), grid]
    change = values.new_zeros(0)
    for lag in reversed(_LAGS):
        lag = min(lag, values.shape[2] - 1)
        change = (values[:, :, lag:] - values[:, :, :-lag]).abs().mean(dim=1)  # (B, T - lag, h, w)
        strength = change.mean(dim=(2, 3))
        told += [strength.mean(dim=1, keepdim=True), strength.std(1, correction=0, keepdim=True)]
    told.append(F.adaptive_avg_pool2d(change.mean(dim=1), _GRID).flatten(1))
    mean = change.flatten(1).mean(dim=1, keepdim=True)
    square = change.flatten(1).square().mean(dim=1, keepdim=True)
    told.append((square / mean.square().clamp(min=1e-8)).clamp(max=1e4).log1p())
    return torch.cat(told, dim=1)
