"""More noising processes: variance exploding, trigonometric, and VP in continuous time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from genscale.errors import ConfigError
from genscale.objectives.schedule import NoiseProcess


@dataclass(frozen=True)
class VarianceExploding(NoiseProcess):
    """alpha = 1, sigma = sigma_max t^rho (EDM, arXiv:2206.00364).

    EDM's networks are told sigma itself; time only orders the levels. With rho = 7 a grid uniform
    in time is EDM's own with sigma_min 0, with 1 it is uniform in sigma, and with 1/2 in sigma^2.
    Networks answer above ``sigma_max`` too (stochastic samplers may step there), at times > 1.

    Args:
        sigma_min: the smallest sigma of sampling grids.
        sigma_max: the sigma sampling starts at.
        rho: exponent.

    Raises:
        ConfigError: sigmas that are not 0 < sigma_min < sigma_max, or a rho that is not positive.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    continues_above = True

    def __post_init__(self) -> None:
        if not 0.0 < self.sigma_min < self.sigma_max < math.inf:
            raise ConfigError(
                "objective.sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max, but are "
                f"{self.sigma_min} and {self.sigma_max}. EDM has 0.002 and 80."
            )
        if not 0.0 < self.rho < math.inf:
            raise ConfigError(f"rho must be positive, but is {self.rho}. EDM has 7.")

    @property
    def t_max(self) -> float:  # type: ignore[override]  # a constant of the process
        """The time of ``sigma_max``."""
        return 1.0

    @property
    def t_min(self) -> float:  # type: ignore[override]  # follows from the sigmas
        """The time of ``sigma_min``."""
        return float((self.sigma_min / self.sigma_max) ** (1.0 / self.rho))

    def coefficients(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Return (1, sigma_max t^rho) in float64."""
        time = time.double()
        return torch.ones_like(time), self.sigma_max * time**self.rho

    def time_of(self, log_snr: Tensor) -> Tensor:
        """Return t = (exp(-lambda) / sigma_max)^(1 / rho)."""
        return (torch.exp(-log_snr.double()) / self.sigma_max) ** (1.0 / self.rho)

    def rates(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Return (0, rho sigma_max t^(rho - 1))."""
        time = time.double()
        return torch.zeros_like(time), self.rho * self.sigma_max * time ** (self.rho - 1.0)


@dataclass(frozen=True)
class TrigonometricVP(NoiseProcess):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): the GVP interpolant of SiT (arXiv:2401.08740).

    Args:
        t_min: where grids that stop before 0 end.
        t_max: where sampling starts; below 1 for networks whose estimates are singular there.
    """

    t_min: float = 1e-3
    t_max: float = 1.0

    def coefficients(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Return (cos, sin) of pi t / 2 in float64; alpha is exactly 0 at t = 1."""
        angle = 0.5 * math.pi * time.double()
        # the cosine of the rounded pi / 2 is 6e-17
        alpha = torch.where(time == 1.0, torch.zeros_like(angle), torch.cos(angle))
        return alpha, torch.sin(angle)

    def time_of(self, log_snr: Tensor) -> Tensor:
        """Return t = 2 / pi atan(exp(-lambda))."""
        return torch.atan(torch.exp(-log_snr.double())) * (2.0 / math.pi)

    def rates(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Return pi / 2 (-sin, cos)."""
        alpha, sigma = self.coefficients(time)
        return -0.5 * math.pi * sigma, 0.5 * math.pi * alpha

    def straight_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return alpha + sigma: x divided by it moves straight, and it never vanishes."""
        return alpha + sigma


@dataclass(frozen=True)
class ContinuousVP(NoiseProcess):
    """The VP equation in continuous time (arXiv:2011.13456): beta(t) linear, t in [0, 1].

    alpha = exp(-(beta_max - beta_min) t^2 / 4 - beta_min t / 2), sigma = sqrt(1 - alpha^2). It is
    the VP path of SiT and the noise schedule of EDM's "vp" ablation.

    Args:
        beta_min: beta at t = 0.
        beta_max: beta at t = 1.
        t_min: where grids that stop before 0 end.

    Raises:
        ConfigError: betas that are not 0 < beta_min < beta_max.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-3

    def __post_init__(self) -> None:
        if not 0.0 < self.beta_min < self.beta_max < math.inf:
            raise ConfigError(
                "beta_min and beta_max must satisfy 0 < beta_min < beta_max, but are "
                f"{self.beta_min} and {self.beta_max}. 0.1 and 20 are usual."
            )

    @property
    def t_max(self) -> float:  # type: ignore[override]  # a constant of the process
        """The noisiest time; alpha is small there, not 0."""
        return 1.0

    def coefficients(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha, sqrt(1 - alpha^2)) in float64."""
        time = time.double()
        slope = self.beta_max - self.beta_min
        log_alpha = -0.25 * slope * time**2 - 0.5 * self.beta_min * time
        return torch.exp(log_alpha), torch.sqrt(-torch.expm1(2.0 * log_alpha))

    def time_of(self, log_snr: Tensor) -> Tensor:
        """Return the root of slope t^2 / 4 + beta_min t / 2 = -log alpha."""
        target = 0.5 * torch.nn.functional.softplus(-2.0 * log_snr.double())
        slope = self.beta_max - self.beta_min
        # 2 c / (b + sqrt(b^2 + 4 a c)) does not cancel near 0
        root = torch.sqrt(0.25 * self.beta_min**2 + slope * target)
        return 2.0 * target / (0.5 * self.beta_min + root)

    def rates(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Return beta / 2 (-alpha, alpha^2 / sigma); the second is infinite at t = 0."""
        alpha, sigma = self.coefficients(time)
        beta = self.beta_min + (self.beta_max - self.beta_min) * time.double()
        return -0.5 * beta * alpha, 0.5 * beta * alpha**2 / sigma
