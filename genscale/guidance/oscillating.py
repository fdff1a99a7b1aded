"""Oscillating guidance: a high and a low weight take turns."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from genscale.errors import ConfigError
from genscale.guidance.branches import GuidedView
from genscale.guidance.cfg import ClassifierFree
from genscale.objectives.base import Denoiser, Level
from genscale.objectives.schedule import NoiseProcess

_TOLERANCE = 1e-9  # of log(alpha / sigma), for levels that were rounded


class Oscillating(ClassifierFree):
    """Classifier-free guidance whose weight alternates after a warm phase (arXiv:2210.02303).

    The first steps have the high weight, which settles what is seen; from then on the low one and
    the high one take turns, which keeps colours from burning. The weight belongs to the level: an
    evaluation between two levels of the sampler's grid has that of the noisier one, and the second
    evaluation of a step (Heun's corrector) that of the step it leads to. With such samplers
    ``every`` = 2 lets whole steps have one weight.

    Args:
        scale: the high weight.
        low: the low weight; 1 leaves out the second branch there.
        warm_up: first steps, which have the high weight.
        every: steps until the weight changes.
        interval: guide only at process times t with lo < t <= hi; see
            :class:`~genscale.guidance.branches.BranchGuidance`.

    Raises:
        ConfigError: an impossible number.
    """

    def __init__(
        self,
        scale: float = 8.0,
        *,
        low: float = 1.0,
        warm_up: int = 10,
        every: int = 1,
        interval: Sequence[float] | None = None,
    ) -> None:
        super().__init__(scale, interval=interval)
        if not 0.0 <= low < math.inf:
            raise ConfigError(
                f"guidance.low must be finite and not negative, but is {low}. 1 means no guidance."
            )
        for name, value, least in (("warm_up", warm_up, 0), ("every", every, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(
                    f"guidance.{name} must be a whole number of at least {least}, but is "
                    f"{value!r}. Give a number of steps."
                )
        self.low = float(low)
        self.warm_up = warm_up
        self.every = every
        self._begins: Tensor | None = None  # log(alpha / sigma) at which steps begin, rising

    @property
    def label(self) -> str:
        """The name, and how it oscillates."""
        turns = f" and {self.low:g} in turns of {self.every} after {self.warm_up} steps"
        return super().label + turns

    @property
    def active(self) -> bool:
        """Whether either weight guides."""
        return self.scale != 1.0 or self.low != 1.0

    def along(self, levels: Level | None) -> Oscillating:
        """Return this guidance with the levels at which a sampler's steps begin.

        Raises:
            ConfigError: the sampler has no levels of its own.
        """
        if levels is None:
            raise ConfigError(
                "Oscillating guidance changes its weight from step to step, but this sampler has "
                "no grid of levels. Use guidance=cfg, or another sampler."
            )
        known = copy.copy(self)
        known._begins = levels.log_snr
        return known

    def wrap(self, view: Denoiser) -> Denoiser:
        """Return the guided view; the view itself where no weight guides.

        Raises:
            ConfigError: the sampler's levels are not known.
        """
        if not self.active:
            return view
        if self._begins is None:
            raise ConfigError(
                "Oscillating guidance does not know the sampler's steps yet. Sample through a "
                "GenerationPipeline, or wrap guidance.along(sampler.levels(view.process))."
            )
        return GuidedView(self, view)

    def scale_at(self, level: Level, process: NoiseProcess) -> Tensor:
        """Return w of each row of a level, float64 on the CPU; exactly 1 where nothing guides."""
        assert self._begins is not None
        place = torch.searchsorted(self._begins, level.log_snr + _TOLERANCE, right=True) - 1
        turn = (place - self.warm_up).div(self.every, rounding_mode="floor")
        is_low = (place >= self.warm_up) & (turn % 2 == 0)
        scale = torch.where(is_low, self.low, self.scale).to(level.alpha.dtype)
        return self._inside(scale, level, process)
