"""Guidance by a bad version of the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from genscale.errors import ConfigError
from genscale.guidance.branches import BranchGuidance, Guided, GuidedView, Rows, extrapolate
from genscale.guidance.matched import MatchedView
from genscale.objectives.base import Denoiser, Prediction


class WeakSettings(NamedTuple):
    """Which weak model is meant; see :class:`Autoguidance`."""

    run: str | None
    checkpoint: str | int | None
    weights: str


class Autoguidance(BranchGuidance):
    """b + w (D - b) with a model D and a weaker one b, both conditional (arXiv:2406.02507, eq. 6).

    The weak model is a smaller or less trained one of the same kind, or another average of the
    same weights; its view may come from another objective, as both say clean and noise. Works
    without conditions too.

    A config cannot hold a model, but says where one is: then the pipeline loads it and hands it
    over with :meth:`led_by`.

    Args:
        weak: view of the weak model; None where the settings below name it.
        scale: w; the paper has 1.4 to 2.1.
        interval: see :class:`~genscale.guidance.branches.BranchGuidance`.
        weak_run: run folder or exported folder of the weak model; None for that of the model.
        weak_checkpoint: ``latest``, a step, or a file; None for the model's own checkpoint in the
            same run, and for the latest of another.
        weak_weights: ``ema``, ``raw``, or another average's name.
        weak_name: what protocols call a weak model that is given as a view.

    Raises:
        ConfigError: an impossible number.
    """

    def __init__(
        self,
        weak: Denoiser | None = None,
        scale: float = 2.0,
        *,
        interval: Sequence[float] | None = None,
        weak_run: str | None = None,
        weak_checkpoint: str | int | None = None,
        weak_weights: str = "ema",
        weak_name: str = "",
    ) -> None:
        super().__init__(scale, interval=interval)
        self.weak = weak
        self.settings = WeakSettings(weak_run, weak_checkpoint, weak_weights)
        self.weak_name = weak_name

    def led_by(self, weak: Denoiser, name: str) -> Autoguidance:
        """Return this guidance with its weak model.

        Args:
            weak: its view.
            name: what protocols call it.
        """
        run, checkpoint, weights = self.settings
        return Autoguidance(
            weak,
            self.scale,
            interval=self.interval,
            weak_run=run,
            weak_checkpoint=checkpoint,
            weak_weights=weights,
            weak_name=name,
        )

    @property
    def label(self) -> str:
        """The name, and that of the weak model."""
        return f"Autoguidance by {self.weak_name}" if self.weak_name else "Autoguidance"

    def wrap(self, view: Denoiser) -> Denoiser:
        """Return the guided view; scale 1 returns the view itself.

        Raises:
            ConfigError: a weak model of other pictures, or none.
        """
        if self.weak is None:
            raise ConfigError(
                "Autoguidance has no weak model yet: a view of one was expected. Sample through a "
                "GenerationPipeline, which loads guidance.weak_run, or give weak=..."
            )
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
