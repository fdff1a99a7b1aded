"""CFG++: guided towards the data, re-noised without guidance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genscale.errors import ConfigError
from genscale.guidance.branches import BranchGuidance, Guided, GuidedView, Rows, extrapolate
from genscale.objectives.base import Denoiser, Level, Prediction
from genscale.objectives.schedule import NoiseProcess


class ClassifierFreePlusPlus(BranchGuidance):
    """CFG++ (arXiv:2406.08070): clean = u + lambda (c - u), noise = that of u.

    The two estimates no longer describe x, so it acts in solvers that re-noise by the noise
    estimate (``ddim``, ``euler``, ``euler_ancestral``); solvers that carry x along
    (``dpmpp_*``, ``dpm_fast``) see the guided clean estimate alone.

    Args:
        scale: lambda in [0, 1]; 0.6 is about as strong as classifier-free guidance of 7.5.
        interval: see :class:`~genscale.guidance.branches.BranchGuidance`; outside, the
            conditional branch alone.

    Raises:
        ConfigError: an impossible number.
    """

    def __init__(self, scale: float = 0.6, *, interval: Sequence[float] | None = None) -> None:
        super().__init__(scale, interval=interval)
        if scale > 1.0:
            raise ConfigError(
                f"guidance.scale of CFG++ must lie in [0, 1], but is {scale}. 0.6 is usual; for "
                "scales above 1 use guidance=cfg."
            )

    @property
    def active(self) -> bool:
        """Scale 1 re-noises without the condition."""
        return True

    def wrap(self, view: Denoiser) -> Denoiser:
        """Return the guided view; here scale 1 guides too."""
        return GuidedView(self, view)

    def guides(self, level: Level, process: NoiseProcess) -> Tensor:
        """Return which rows lie in the interval: scale 1 needs the noise of u as well."""
        outside = torch.zeros_like(level.alpha)
        guided = self._inside(outside, level, process) == 0.0
        return guided.flatten(1).any(1) if guided.dim() > 1 else guided

    def combine(self, own: Prediction, other: Prediction, rows: Rows) -> Guided:
        """Return the extrapolated clean and the unconditional noise estimate."""
        return Guided(extrapolate(own.clean, other.clean, rows.weight), other.noise)
