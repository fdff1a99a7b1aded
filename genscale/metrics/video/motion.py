"""How clips move, as VBench measures it: smoothness by interpolation, dynamic degree by flow.

VBench (arXiv:2311.17982), Apache-2.0, interpolates with AMT-S and takes flow from RAFT. Neither
comes with this package: both measures take any callable, whose name stands in the protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genscale.errors import ConfigError, DataError
from genscale.metrics.protocol import Setting
from genscale.metrics.video.measures import ClipMeasure

Interpolator = Callable[[Tensor, Tensor], Tensor]
"""Frames ``(B, C, H, W)`` before and after, float in [0, 1], to the frame between."""

Flow = Callable[[Tensor, Tensor], Tensor]
"""Frames ``(B, C, H, W)`` before and after, float in [0, 1], to flow ``(B, 2, H, W)`` in pixels."""


def linear_interpolator(before: Tensor, after: Tensor) -> Tensor:
    """Return the mean of two frames: the least that an interpolator has to beat.

    With it, :class:`MotionSmoothness` measures how linear brightness runs in time, which punishes
    fast motion; it is no stand-in for AMT-S.
    """
    return (before + after) / 2.0


class MotionSmoothness(ClipMeasure):
    """(255 - mean |I - I^|) / 255 over every second frame, guessed from its two neighbours.

    Args:
        interpolator: guesses the frame between two.
        method: how protocols name it, e.g. ``amt_s``.
        name: of the metric.
    """

    def __init__(
        self,
        interpolator: Interpolator = linear_interpolator,
        *,
        method: str = "linear",
        name: str = "motion_smoothness",
    ) -> None:
        if method == "linear" and interpolator is not linear_interpolator:
            raise ConfigError(
                "MotionSmoothness was given an interpolator without a name. Give method=<its name>."
            )
        self.interpolator = interpolator
        self.method = method
        self.name = name

    @property
    def description(self) -> str:
        """The interpolator."""
        return f"interpolation by {self.method}"

    def of_clips(self, clips: Tensor, captions: Sequence[str] | None) -> Tensor:
        """Return the score of each clip; three frames are the least."""
        guessed = (clips.shape[2] - 1) // 2
        if guessed == 0:
            return torch.full((len(clips), 1), torch.nan, dtype=torch.float64)
        frames = clips.float() / 255.0
        scores = torch.zeros(len(clips), dtype=torch.float64, device=clips.device)
        for t in range(1, 2 * guessed, 2):  # one pair at a time: interpolators are large
            between = self.interpolator(frames[:, :, t - 1], frames[:, :, t + 1])
            error = (between.clamp(0.0, 1.0) * 255.0 - clips[:, :, t].float()).abs()
            scores += error.mean(dim=(1, 2, 3)).double()
        return 1.0 - (scores / guessed / 255.0)[:, None]


@dataclass(frozen=True, slots=True)
class MoveRule:
    """When a clip counts as moving.

    Attributes:
        threshold: flow in pixels that a pair of frames has to exceed.
        count: how many pairs have to.
    """

    threshold: float
    count: int

    @classmethod
    def of(cls, num_frames: int, height: int, width: int) -> MoveRule:
        """Return VBench's rule for clips of this many frames (sampled at 8 a second)."""
        # halves go to the even number, as in the published program
        return cls(6.0 * min(height, width) / 256.0, round(4 * num_frames / 16))

    def moves(self, strengths: Tensor) -> Tensor:
        """Return bool ``(...)`` of flow strengths ``(..., T - 1)``."""
        exceeding = (strengths > self.threshold).sum(dim=-1)
        return (exceeding >= self.count) & (strengths.shape[-1] > 0)


def flow_strength(flow: Tensor) -> Tensor:
    """Return the mean of the 5 % largest magnitudes of flow ``(..., 2, H, W)``, shape ``(...)``.

    Raises:
        DataError: fields are smaller than 20 pixels, of which 5 % are none.
    """
    magnitudes = flow.square().sum(dim=-3).sqrt().flatten(-2)
    largest = int(0.05 * magnitudes.shape[-1])
    if largest == 0:
        raise DataError(
            f"5 % of a flow field of {magnitudes.shape[-1]} pixels are none; at least 20 pixels "
            "were expected. Give larger frames."
        )
    return magnitudes.topk(largest, dim=-1).values.mean(dim=-1)


class DynamicDegree(ClipMeasure):
    """Share of clips that move, by an injected optical flow.

    Args:
        flow: of two frames.
        method: how protocols name it, e.g. ``raft_things_20``.
        frame_rate: of the clips; they are thinned to about 8 frames a second first.
        name: of the metric.

    Raises:
        ConfigError: the frame rate is not positive.
    """

    unfit = "no clip has two frames at 8 a second"

    def __init__(
        self, flow: Flow, *, method: str, frame_rate: float, name: str = "dynamic_degree"
    ) -> None:
        if not frame_rate > 0:
            raise ConfigError(
                f"DynamicDegree needs the frames a second of the clips, but frame_rate={frame_rate}"
                " was given. Give a positive number."
            )
        self.flow = flow
        self.method = method
        self.interval = max(1, round(frame_rate / 8.0))
        self.name = name

    @property
    def description(self) -> str:
        """The flow."""
        return f"moves by {self.method}"

    @property
    def settings(self) -> tuple[Setting, ...]:
        """One of how many frames is looked at."""
        return (("interval", self.interval),)

    def of_clips(self, clips: Tensor, captions: Sequence[str] | None) -> Tensor:
        """Return 1 for each clip that moves, else 0."""
        thinned = clips[:, :, :: self.interval].float() / 255.0
        frames = thinned.shape[2]
        if frames < 2:
            return torch.full((len(clips), 1), torch.nan, dtype=torch.float64)
        strengths = [
            flow_strength(self.flow(thinned[:, :, t], thinned[:, :, t + 1]))
            for t in range(frames - 1)
        ]
        rule = MoveRule.of(frames, *clips.shape[3:])
        return rule.moves(torch.stack(strengths, dim=1)).double()[:, None]
