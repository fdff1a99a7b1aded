"""Does a clip show what its caption asks for, motion included? Read off the pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from genscale.data.sprites.agreement import ClipAgreement, agreement_with, watch
from genscale.data.sprites.grammar import SpriteRequirement, parse_sprites
from genscale.errors import ConfigError, did_you_mean
from genscale.rewards.base import Request, Reward, RewardOutput

TrackingMeasure = Literal["mean", "all", "count", "colour", "shape", "direction", "speed", "steady"]
MEASURES_OF_TRACKS: tuple[TrackingMeasure, ...] = get_args(TrackingMeasure)


class TrackingReward(Reward):
    """The tracker of moving sprites as a reward: it cannot be fooled, only satisfied.

    - ``mean``: mean of the facts that the caption asks for (count, colour, shape, direction,
      speed): a graded reward that a search can climb.
    - ``all``: 1 if everything is as the caption says and nothing jumps, appears, vanishes or
      changes, else 0.
    - ``count``, ``colour``, ``shape``, ``direction``, ``speed``, ``steady``: one of them, see
      :class:`~genscale.data.sprites.agreement.ClipAgreement`.

    Parts are all results (nan where the caption asks for no such thing, or one frame cannot tell)
    and ``objects``, the number in most frames.

    Args:
        measure: what the value is.
        frame_rate: frames a second of the clips; speeds are told by it.

    Raises:
        ConfigError: an unknown measure, or a frame rate that is none.
    """

    needs = frozenset({"caption"})
    clips = True

    def __init__(self, *, measure: TrackingMeasure = "mean", frame_rate: float = 8.0) -> None:
        if measure not in MEASURES_OF_TRACKS:
            raise ConfigError(
                f"reward.measure='{measure}' is no measure of moving sprites. Choose one of "
                f"{', '.join(MEASURES_OF_TRACKS)}.{did_you_mean(measure, MEASURES_OF_TRACKS)}"
            )
        if not 0 < frame_rate < math.inf:
            raise ConfigError(
                f"reward.frame_rate={frame_rate} must be a number of frames a second above 0. "
                "Give that of the clips, for example 8."
            )
        self.measure = measure
        self.frame_rate = frame_rate

    @property
    def label(self) -> str:
        """Name, measure, and frame rate."""
        return f"TrackingReward({self.measure}, {self.frame_rate:g} fps)"

    def problems(self, requests: Sequence[Request]) -> list[str]:
        """Return a sentence for the first caption that cannot be judged."""
        missing = super().problems(requests)
        if missing:
            return missing
        for request in requests:
            try:
                asked = parse_sprites(request.caption or "")
            except ConfigError as error:
                return [f"reward {self.label} judges clips of moving sprites only: {error}"]
            names = {
                "direction": any(group.motion is not None for group in asked.groups),
                "speed": any(group.speed is not None for group in asked.groups),
            }
            if not names.get(self.measure, True):
                return [
                    f"reward {self.label} judges by the {self.measure} that a caption names, but "
                    f"'{request.caption}' names none. Choose measure=mean, which takes what "
                    "applies."
                ]
        return []

    def prepare(self, requests: Sequence[Request]) -> tuple[SpriteRequirement, ...]:
        """Return what each caption asks for.

        Raises:
            ConfigError: a caption that does not follow the grammar of moving sprites.
        """
        return tuple(parse_sprites(request.caption or "") for request in requests)

    def score(
        self, images: Tensor, handle: tuple[SpriteRequirement, ...], index: Tensor
    ) -> RewardOutput:
        """Judge clips ``(B, 3, T, H, H)``, or pictures, in [0, 1]; rounded to 8 bits.

        Raises:
            DataError: clips that are no square RGB.
        """
        values: list[float] = []
        parts: dict[str, list[float]] = {}
        for clip, request in zip(images.detach().cpu(), index.tolist(), strict=True):
            seen = watch(clip, self.frame_rate).reading()
            results = agreement_with(seen, handle[request])
            values.append(self._value(results))
            for name, part in (*results.results().items(), ("objects", float(seen.count))):
                parts.setdefault(name, []).append(math.nan if part is None else part)
        value = images.new_tensor(values, dtype=torch.float32)
        return RewardOutput(
            value,
            {name: images.new_tensor(part, dtype=torch.float32) for name, part in parts.items()},
            ~value.isnan(),
        )

    def _value(self, results: ClipAgreement) -> float:
        part: float | None = getattr(results, self.measure)
        return math.nan if part is None else part
