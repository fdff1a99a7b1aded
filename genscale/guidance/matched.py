"""A view that reads levels by their signal-to-noise ratio alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from genscale.conditioning.base import Conditioning
from genscale.objectives.base import Denoiser, Level, Prediction


class MatchedView(Denoiser):
    """Hides the time of levels, which belongs to another process than this view's.

    Args:
        view: asked at the time of equal signal-to-noise ratio of its own process.
    """

    def __init__(self, view: Denoiser) -> None:
        self.view = view
        self.process = view.process
        self.sample_shape = view.sample_shape
        self.device = view.device

    def begin(self, batch: int, shape: tuple[int, ...]) -> Any:
        """Return the memory of videos that begin, as the view has it."""
        return self.view.begin(batch, shape)

    def __call__(
        self, x: Tensor, level: Level, cond: Conditioning, memory: Any = None
    ) -> Prediction:
        """Estimate clean sample and noise of ``x``."""
        return self.view(x, Level(level.alpha, level.sigma), cond, memory)
