"""Measures that give every picture a number of its own: seams, repetition."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from genscale.metrics.features import check_images
from genscale.metrics.single import SampleMeasure, SampleMetrics


class PictureMeasure(SampleMeasure):
    """A number of a picture by itself, with no reference; averaged over pictures."""

    unfit = "no picture is large enough"

    @abstractmethod
    def of_pictures(self, images: Tensor) -> Tensor:
        """Look at pictures.

        Args:
            images: uint8 ``(B, 1 or 3, H, W)``.

        Returns:
            ``(B, len(columns))`` float64; NaN where a picture has no such number.
        """

    def look(self, samples: Tensor, captions: Sequence[str] | None) -> Tensor:
        """Look at pictures, whatever they were made for; see :meth:`of_pictures`."""
        return self.of_pictures(samples)


class PictureMetrics(SampleMetrics):
    """Several measures of single pictures ``(B, 1 or 3, H, W)``."""

    kind = "picture"

    def check_kind(self, samples: Tensor) -> None:
        """Raise a ``DataError`` unless they are pictures."""
        check_images(samples)
