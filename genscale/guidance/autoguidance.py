"""Guidance by a bad version of the model itself."""

from __future__ import annotations

from collections.abc import Sequence

from genscale.errors import ConfigError
from genscale.guidance.branches import BranchGuidance, Guided, GuidedView, Rows, extrapolate
from genscale.guidance.matched import MatchedView
from genscale.objectives.base import Denoiser, Prediction


class Autoguidance(BranchGuidance):
    """b + w (D - b) with a model D and a weaker one b, both conditional (arXiv:2406.02507, eq. 6).

    The weak model is a smaller or less trained one of the same kind, or another average of the
    same weights; its view may come from another objective, as both say clean and noise. Works
    without conditions too.

    Args:
        weak: view of the weak model.
        scale: w; the paper has 1.4 to 2.1.
        interval: see :class:`~genscale.guidance.branches.BranchGuidance`.

    Raises:
        ConfigError: an impossible number.
    """

    def __init__(
        self, weak: Denoiser, scale: float = 2.0, *, interval: Sequence[float] | None = None
    ) -> None:
        super().__init__(scale, interval=interval)
        self.weak = weak

    def wrap(self, view: Denoiser) -> Denoiser:
        """Return the guided view; scale 1 returns the view itself.

        Raises:
            ConfigError: a weak model of other pictures.
        """
        if self.weak.sample_shape != view.sample_shape:
            raise ConfigError(
                f"The weak model of guidance makes samples of shape {self.weak.sample_shape}, but "
                f"the model's are {view.sample_shape}. Give one trained on the same data."
            )
        if self.scale == 1.0:
            return view
        # a level's time belongs to the model's own process
        same = self.weak.process == view.process
        return GuidedView(self, view, self.weak if same else MatchedView(self.weak))

    def combine(self, own: Prediction, other: Prediction, rows: Rows) -> Guided:
        """Return b + w (D - b) of both estimates."""
        return Guided(
            extrapolate(own.clean, other.clean, rows.weight),
            extrapolate(own.noise, other.noise, rows.weight),
        )
