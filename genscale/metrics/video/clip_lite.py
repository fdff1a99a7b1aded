"""Features of clips without weights: fixed random filters in space and time, and simple statistics.

They make FVD and KVD possible where no network is at hand. Such a distance is called
``fvd_clip_lite``; the name FVD alone belongs to I3D.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.errors import ConfigError
from genscale.metrics.features import extract
from genscale.metrics.subsets import keyed_rows
from genscale.metrics.video.clips import ClipNetwork
from genscale.rng import Purpose, key, normal

_LAGS = (1, 2, 4)  # frames between which changes are measured
_GRID = 4  # changes and colours are also told apart by their place, on a grid of this side
_SMALLEST = 1e-4  # a feature that varies less than this over the reference is left as it is
_RECIPE = "clip_lite_1"  # changes when equal settings give other numbers


class ClipLite(ClipNetwork):
    """What keyed random filters and frame differences say of a clip; nothing is trained.

    Clips are averaged over boxes to ``size`` pixels. Two layers of random 3 x 3 x 3 filters follow
    (half of the first layer's sum to zero over time and so see change alone), each map told by
    its mean and standard deviation over the clip. Beside them stand means and deviations of the
    colours, colours on a 4 x 4 grid, strengths of change at lags of 1, 2 and 4 frames with
    their unsteadiness over time, change on the grid, and its sharpness (the mean square over the
    squared mean). Every number is shifted and scaled to mean 0 and variance 1 over the reference's
    clips.

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
    mean: Tensor
    scale: Tensor
    first: Tensor
    second: Tensor

    def __init__(
        self,
        *,
        size: int = 32,
        channels: int = 16,
        max_clips: int = 2000,
        frames: int | None = None,
        stride: int = 1,
        seed: int = 0,
        clips_a_pass: int = 16,
        name: str = "clip_lite",
    ) -> None:
        super().__init__(name, frames, stride)
        smallest = {"size": 8, "channels": 2, "max_clips": 2, "clips_a_pass": 1}
        given = {
            "size": size,
            "channels": channels,
            "max_clips": max_clips,
            "clips_a_pass": clips_a_pass,
        }
        for setting, least in smallest.items():
            if given[setting] < least:
                raise ConfigError(
                    f"'{name}' needs {setting} of at least {least}, but {setting}="
                    f"{given[setting]} was given. Give a larger number."
                )
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
        self.register_buffer("mean", torch.zeros(self.num_features), persistent=False)
        self.register_buffer("scale", torch.ones(self.num_features), persistent=False)
        self._sha256 = ""

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
        self.prepare()
        return self._sha256

    def prepare(self) -> None:
        """Raise a ``ConfigError`` unless real clips have been seen."""
        if not self._sha256:
            raise ConfigError(
                f"The feature network '{self.name}' has not seen real clips, which its numbers are "
                "scaled by. Call fit(clips, None, fingerprint) first, or give a reference of clips."
            )

    @torch.no_grad()
    def fit(self, images: Tensor, labels: Tensor | None, fingerprint: str) -> None:
        """Take shift and scale from real clips; a second call with the same data does nothing.

        Args:
            images: uint8 ``(n, 1 or 3, T, H, W)``.
            labels: not read.
            fingerprint: digest of the data.
        """
        recipe = json.dumps({"data": fingerprint, **self.settings}, sort_keys=True)
        digest = hashlib.sha256(recipe.encode()).hexdigest()
        if digest == self._sha256:
            return
        self._sha256 = digest
        rows = keyed_rows(len(images), self.max_clips, self.seed)
        self.mean.zero_()
        self.scale.fill_(1.0)
        values = extract(self, images[rows.to(images.device)], ("clip",))["clip"].double()
        deviation = values.std(dim=0, correction=0)
        self.mean.copy_(values.mean(dim=0))
        self.scale.copy_(torch.where(deviation > _SMALLEST, deviation, 1.0))

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return ``clip`` ``(B, num_features)`` float32 of clips ``(B, 1 or 3, T, H, W)``."""
        self.prepare()
        with torch.autocast(images.device.type, enabled=False):
            raw = [self._look(part) for part in self.window(images).split(self.clips_a_pass)]
            return {"clip": (torch.cat(raw) - self.mean) / self.scale}

    def _look(self, clips: Tensor) -> Tensor:
        values = clips.to(self.first) / 255.0
        height, width = clips.shape[3:]
        if max(height, width) > self.size:
            side = (clips.shape[2], min(height, self.size), min(width, self.size))
            values = F.adaptive_avg_pool3d(values, side)
        return torch.cat((_responses(values, self.first, self.second), _statistics(values)), dim=1)


def _filters(channels: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw both layers of unit-variance filters; none answers to an even grey that stays."""
    first = normal(key(seed, 0, Purpose.NETWORK), (channels, 3, 3, 3, 3), dtype=torch.float64)
    first = first - first.mean(dim=(1, 2, 3, 4), keepdim=True)
    moving = first[: channels // 2]
    first[: channels // 2] = moving - moving.mean(dim=2, keepdim=True)
    shape = (2 * channels, channels, 3, 3, 3)
    second = normal(key(seed, 1, Purpose.NETWORK), shape, dtype=torch.float64)
    return tuple(  # type: ignore[return-value]
        (each * math.sqrt(2.0 / each[0].numel()) / each.std()).float() for each in (first, second)
    )


def _responses(values: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return mean and deviation of every map of both layers, ``(B, 6 * channels)``."""
    padded = F.pad(values, (1, 1, 1, 1, 1, 1), mode="replicate")  # the clip's edge is no change
    maps = F.relu(F.conv3d(padded, first, stride=(1, 2, 2)))
    deeper = F.relu(F.conv3d(F.pad(maps, (1,) * 6, mode="replicate"), second, stride=2))
    told = []
    for each in (maps, deeper):
        flat = each.flatten(2)
        told += [flat.mean(dim=2), flat.std(dim=2, correction=0)]
    return torch.cat(told, dim=1)


def _statistics(values: Tensor) -> Tensor:
    """Return statistics of colour and change of clips ``(B, 3, T, h, w)`` in [0, 1]."""
    flat = values.flatten(2)
    grid = F.adaptive_avg_pool2d(values.mean(dim=2), _GRID).flatten(1)
    told = [flat.mean(dim=2), flat.std(dim=2, correction=0), grid]
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
