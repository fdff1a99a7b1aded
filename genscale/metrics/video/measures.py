"""Measures that give every clip numbers of its own, collected as one torchmetrics metric."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from genscale.metrics.single import SampleMeasure, SampleMetrics
from genscale.metrics.video.clips import check_clips


class ClipMeasure(SampleMeasure):
    """A number of a clip by itself, with no reference; averaged over clips."""

    unfit = "no clip has enough frames"

    @abstractmethod
    def of_clips(self, clips: Tensor, captions: Sequence[str] | None) -> Tensor:
        """Look at clips.

        Args:
            clips: uint8 ``(B, 1 or 3, T, H, W)``.
            captions: one a clip; None without any.

        Returns:
            ``(B, len(columns))`` float64; NaN where a clip has no such number.
        """

    def look(self, samples: Tensor, captions: Sequence[str] | None) -> Tensor:
        """Look at clips; see :meth:`of_clips`."""
        return self.of_clips(samples, captions)


class ClipMetrics(SampleMetrics):
    """Several measures of single clips ``(B, 1 or 3, T, H, W)``."""

    kind = "clip"

    def check_kind(self, samples: Tensor) -> None:
        """Raise a ``DataError`` unless they are clips."""
        check_clips(samples, "A measure of clips")
