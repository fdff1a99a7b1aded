"""Noising processes x_t = alpha_t x_0 + sigma_t eps: what levels a model is trained on."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from genscale.objectives.base import Level


class NoiseProcess(ABC):
    """Maps a process time to a level and back; pure functions in float64 on the CPU.

    Time runs from 0 (clean: alpha 1, sigma 0, always exactly) to ``t_max`` (most noise).

    Attributes:
        t_max: the time sampling starts at.
        t_min: the smallest time > 0 the network was trained on; grids that stop before 0 end here.
    """

    t_max: float
    t_min: float

    @abstractmethod
    def coefficients(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha, sigma) float64 of times, elementwise; time 0 is exactly (1, 0)."""

    @abstractmethod
    def time_of(self, log_snr: Tensor) -> Tensor:
        """Invert lambda = log(alpha / sigma) to a time."""

    def level(self, time: Tensor | float) -> Level:
        """Return the level at a time (float64, any batch shape ``(B,)`` or ``(1,)``)."""
        time = torch.as_tensor(time, dtype=torch.float64).reshape(-1)
        alpha, sigma = self.coefficients(time)
        return Level(alpha, sigma, time)
