"""Which moments of a video a clip shows, and how its frames are brought to one size.

A clip of T frames at r frames a second shows the moments s, s + 1/r, ..., s + (T - 1)/r. It begins
at a whole number of the video's own frame periods, and all moments are taken a quarter of a period
later: containers round times to thousandths, and a moment on the border between two frames would
show one or the other by accident.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from genscale.data.video_reader import VideoInfo
from genscale.errors import ConfigError, DataError

SHORT = ("error", "drop", "loop", "hold")
CROPS = ("center", "random", "squash")
FILTERS = ("antialias", "area")
BEGINS = ("middle", "first")
Short = Literal["error", "drop", "loop", "hold"]
Crop = Literal["center", "random", "squash"]
Filter = Literal["antialias", "area"]
Begin = Literal["middle", "first"]
_SLACK = 1e-6  # seconds: float rounding of a duration must not cost a clip


@dataclass(frozen=True, slots=True)
class ClipTimes:
    """The law by which moments are chosen from a video.

    Args:
        num_frames: frames of a clip, T.
        frame_rates: frames a second to choose from; empty takes each video's own.
        short: what happens where a video is shorter than a clip: ``"error"`` and ``"drop"`` refuse
            it here, ``"loop"`` goes on at its beginning, ``"hold"`` shows the last frame again.
        begin: where the fixed clip lies: in the ``"middle"``, or it is the ``"first"``.

    Raises:
        ConfigError: if a value is out of range.
    """

    num_frames: int
    frame_rates: tuple[float, ...] = ()
    short: Short = "error"
    begin: Begin = "middle"

    def __post_init__(self) -> None:
        if self.num_frames < 1:
            raise ConfigError(
                f"data.num_frames={self.num_frames} is below 1. Give the frames of a clip."
            )
        wrong = [r for r in self.frame_rates if not (r > 0 and math.isfinite(r))]
        if wrong:
            raise ConfigError(
                f"data.frame_rate={wrong[0]} must be above 0 frames a second. Give one number, "
                "several to draw from, or null for each video's own."
            )

    def fits(self, info: VideoInfo) -> bool:
        """Say whether a video is long enough for a clip at one of the frame rates."""
        return bool(self._fitting(info))

    def fixed(self, info: VideoInfo) -> tuple[list[float], float]:
        """Return the moments of a video's fixed clip and its frame rate.

        Of several frame rates the first counts that the video is long enough for.

        Raises:
            DataError: it is too short; the sentence is about "it", the caller names the file.
        """
        rate = self._rates(info)[0]
        choices = self._begins(info, rate)
        return self._moments(info, rate, (choices - 1) // 2 if self.begin == "middle" else 0)

    def drawn(self, info: VideoInfo, draws: tuple[float, float]) -> tuple[list[float], float]:
        """Return the moments of a clip drawn at random and its frame rate.

        Args:
            info: of the video.
            draws: two uniform numbers in [0, 1): they choose among the frame rates that the video
                is long enough for, and among the frames where the clip can begin.

        Raises:
            DataError: as above.
        """
        rates = self._rates(info)
        rate = rates[int(draws[0] * len(rates))]
        return self._moments(info, rate, int(draws[1] * self._begins(info, rate)))

    def _span(self, info: VideoInfo, rate: float) -> float:
        """Return the seconds from a clip's beginning to its last moment."""
        return (self.num_frames - 1) / rate + _phase(info, rate)

    def _fitting(self, info: VideoInfo) -> list[float]:
        rates = self.frame_rates or (info.frame_rate,)
        return [rate for rate in rates if self._span(info, rate) < info.duration + _SLACK]

    def _rates(self, info: VideoInfo) -> list[float]:
        """Return the frame rates to choose from, or raise where the video is too short for all."""
        fitting = self._fitting(info)
        if fitting:
            return fitting
        quickest = max(self.frame_rates or (info.frame_rate,))
        if self.short in ("loop", "hold"):
            return [quickest]
        raise DataError(
            f"it lasts {info.duration:.2f} s, and {self.num_frames} frames at {quickest:g} a "
            f"second take {self._span(info, quickest):.2f} s. Choose data.short=drop, loop or "
            "hold, fewer frames or a higher data.frame_rate."
        )

    def _begins(self, info: VideoInfo, rate: float) -> int:
        """Return the number of frames that a clip can begin with."""
        spare = info.duration - self._span(info, rate)
        return max(1, math.floor((spare + _SLACK) * info.frame_rate) + 1)

    def _moments(self, info: VideoInfo, rate: float, begin: int) -> tuple[list[float], float]:
        first = begin / info.frame_rate + _phase(info, rate)
        moments = [first + i / rate for i in range(self.num_frames)]
        latest = max(info.duration - _SLACK, 0.0)
        if self.short == "loop":
            return [m if m <= latest else m % info.duration for m in moments], rate
        return [min(m, latest) for m in moments], rate


def _phase(info: VideoInfo, rate: float) -> float:
    return 0.25 / max(rate, info.frame_rate)


def fit_frames(
    frames: Tensor,
    height: int,
    width: int,
    *,
    crop: Crop = "center",
    place: float = 0.5,
    resize: Filter = "antialias",
) -> Tensor:
    """Crop frames to the shape wanted and resize them.

    Args:
        frames: uint8 ``(T, C, H, W)``.
        height: wanted.
        width: wanted.
        crop: ``"center"`` and ``"random"`` cut the largest part of the wanted proportions,
            ``"squash"`` nothing: proportions are then lost.
        place: 0 to 1, where along the longer side a random crop lies.
        resize: ``"antialias"``: bilinear, widened where frames shrink; ``"area"``: means of the
            pixels covered where frames shrink on both sides, else bilinear.

    Returns:
        uint8 ``(T, C, height, width)``, rounded half up.
    """
    have_height, have_width = frames.shape[2:]
    if crop != "squash":
        scale = min(have_height / height, have_width / width)
        keep_height = min(have_height, max(1, round(height * scale)))
        keep_width = min(have_width, max(1, round(width * scale)))
        share = place if crop == "random" else 0.5
        top = round((have_height - keep_height) * share)
        left = round((have_width - keep_width) * share)
        frames = frames[:, :, top : top + keep_height, left : left + keep_width]
        have_height, have_width = keep_height, keep_width
    if (have_height, have_width) == (height, width):
        return frames.contiguous()
    shrinks = height <= have_height and width <= have_width
    if resize == "area" and shrinks:
        resized = F.interpolate(frames.float(), size=(height, width), mode="area")
    else:
        resized = F.interpolate(
            frames.float(),
            size=(height, width),
            mode="bilinear",
            align_corners=False,
            antialias=height < have_height or width < have_width,
        )
    return (resized + 0.5).floor_().clamp_(0, 255).to(torch.uint8)


def with_luma(frames: Tensor, channels: int) -> Tensor:
    """Return RGB frames ``(T, 3, H, W)`` with 3 channels, or 1: BT.601 luma, as Pillow's."""
    if channels == 3:
        return frames
    red, green, blue = frames.int().unbind(1)
    luma = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16
    return luma.to(torch.uint8).unsqueeze(1)
