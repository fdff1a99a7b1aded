"""Noising processes x_t = alpha_t x_0 + sigma_t eps: what levels a model is trained on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from genscale.errors import ConfigError, did_you_mean
from genscale.objectives.base import Level

BetaSchedule = Literal["sd_scaled_linear", "linear"]


class NoiseProcess(ABC):
    """Maps a process time to a level and back; pure functions in float64.

    Time runs from 0 (clean: alpha 1, sigma 0, always exactly) to ``t_max`` (most noise). Samplers
    and guidance call them with CPU tensors; the training loss may call them on its device.
    Processes are frozen and hashable, so that grids can be cached by them.

    Attributes:
        t_max: the time sampling starts at.
        t_min: the smallest time > 0 the network was trained on; grids that stop before 0 end here.
        continues_above: whether networks also answer for levels noisier than that of ``t_max``.
    """

    t_max: float
    t_min: float
    continues_above: ClassVar[bool] = False

    @abstractmethod
    def coefficients(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha, sigma) float64 of times, elementwise; time 0 is exactly (1, 0)."""

    @abstractmethod
    def time_of(self, log_snr: Tensor) -> Tensor:
        """Invert lambda = log(alpha / sigma) to a time."""

    def rates(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Return (d alpha / dt, d sigma / dt) float64 of times, elementwise.

        The velocity of the process is d alpha / dt x_0 + d sigma / dt eps. The default
        differentiates :meth:`coefficients`; processes with short formulas have their own.
        """
        # also where the caller takes no gradients
        with torch.inference_mode(False), torch.enable_grad():
            moment = time.double().clone().detach().requires_grad_()
            alpha, sigma = self.coefficients(moment)
            (alpha_rate,) = torch.autograd.grad(alpha.sum(), moment, retain_graph=True)
            (sigma_rate,) = torch.autograd.grad(sigma.sum(), moment)
        return alpha_rate, sigma_rate

    def straight_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return c such that x / c moves on straight lines from data to noise.

        Solvers of order two and more integrate x / c. The default is alpha: y = x / alpha obeys
        the variance-exploding dy/ds = (y - clean) / s with s = sigma / alpha, the form in which
        EDM (arXiv:2206.00364) and k-diffusion integrate.
        """
        return alpha

    def level(self, time: Tensor | float) -> Level:
        """Return the level at a time: float64 ``(B,)`` or ``(1,)``, a frame each ``(B, F)``."""
        if not isinstance(time, Tensor):
            time = torch.tensor(time, dtype=torch.float64, device="cpu")
        time = time.to(torch.float64)
        time = time if time.dim() else time[None]
        alpha, sigma = self.coefficients(time)
        return Level(alpha, sigma, time)

    def time_at(self, level: Level) -> Tensor:
        """Return this process's time of a level: its own, or that of equal signal-to-noise."""
        return self.time_of(level.log_snr) if level.time is None else level.time


@dataclass(frozen=True)
class LinearFlow(NoiseProcess):
    """Rectified flow (arXiv:2209.03003): alpha = 1 - t, sigma = t, t in [0, 1].

    The path itself is straight, also at t = 1 where alpha vanishes.

    Args:
        t_min: where grids that stop before 0 end.
        t_max: where sampling starts; below 1 for networks whose estimates are singular at pure
            noise.
    """

    t_min: float = 1e-3
    t_max: float = 1.0

    def coefficients(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Return (1 - t, t) in float64."""
        sigma = time.double()
        return 1.0 - sigma, sigma

    def time_of(self, log_snr: Tensor) -> Tensor:
        """Return t = 1 / (1 + exp(lambda))."""
        return torch.sigmoid(-log_snr.double())

    def rates(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Return (-1, 1)."""
        one = torch.ones_like(time, dtype=torch.float64)
        return -one, one

    def straight_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return alpha + sigma, which is 1 on this process: x itself moves straight."""
        return alpha + sigma


@dataclass(frozen=True)
class DiscreteVP(NoiseProcess):
    """The variance-preserving process of DDPM (arXiv:2006.11239) with N steps, in unit time.

    Time is t = n / N in [0, 1], continuous. At whole n the level is exactly that of training,
    alpha_n = sqrt(abar_n) with abar_n = prod_{i <= n} (1 - beta_i), i = 1 .. N. Between them log
    alpha is piecewise linear in t, as in DPM-Solver's discrete schedule (arXiv:2206.00927,
    appendix D); below n = 1 the first segment is continued, bent to reach (1, 0) at t = 0.

    Args:
        betas: ``"sd_scaled_linear"`` is linspace(sqrt 0.00085, sqrt 0.012, N)^2, that of Stable
            Diffusion, U-ViT and DiMR; ``"linear"`` is linspace(1e-4, 0.02, N), that of DDPM and
            DiT.
        num_timesteps: N.
        beta_range: first and last beta, where they are not those above.

    Raises:
        ConfigError: an unknown schedule, fewer than two steps, or betas outside (0, 1) or falling.
    """

    betas: BetaSchedule = "sd_scaled_linear"
    num_timesteps: int = 1000
    beta_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        known = get_args(BetaSchedule)
        if self.betas not in known:
            raise ConfigError(
                f"objective.betas must be one of {', '.join(known)}, but is {self.betas!r}."
                f"{did_you_mean(str(self.betas), known)}"
            )
        if self.num_timesteps < 2:
            raise ConfigError(
                f"objective.num_timesteps must be at least 2, but is {self.num_timesteps}. "
                "The published models have 1000."
            )
        if self.beta_range is not None and not 0.0 < self.beta_range[0] < self.beta_range[1] < 1.0:
            raise ConfigError(
                "objective.beta_range must be [first, last] with 0 < first < last < 1, but is "
                f"{list(self.beta_range)}. Give e.g. [0.0001,0.02]."
            )

    @property
    def t_max(self) -> float:  # type: ignore[override]  # a constant of the process
        """The noise step N."""
        return 1.0

    @property
    def t_min(self) -> float:  # type: ignore[override]  # follows from the number of steps
        """The noise step 1."""
        return 1.0 / self.num_timesteps

    def coefficients(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha, sqrt(1 - alpha^2)) in float64, on the device of ``time``."""
        log_alpha = self._log_alpha(time.double())
        return torch.exp(log_alpha), torch.sqrt(-torch.expm1(2.0 * log_alpha))

    def time_of(self, log_snr: Tensor) -> Tensor:
        """Return the time at which log alpha = -log(1 + exp(-2 lambda)) / 2."""
        target = -0.5 * torch.nn.functional.softplus(-2.0 * log_snr.double())
        table = self._table(target.device)
        upper = torch.searchsorted(-table, -target).clamp(2, self.num_timesteps)
        low, high = table[upper - 1], table[upper]
        place = upper - 1 + (target - low) / (high - low)
        return torch.minimum(place, target / (_SLOPE_AT_ZERO * table[1])) / self.num_timesteps

    def _log_alpha(self, time: Tensor) -> Tensor:
        table = self._table(time.device)
        place = time * self.num_timesteps
        # n / N * N is not always n, but whole steps must meet their knot exactly, and keep the
        # rate of their place
        off = (place - place.round()).detach()
        place = torch.where(off.abs() < 1e-9, place - off, place)
        lower = place.floor().clamp(1, self.num_timesteps - 1).long()
        low, high = table[lower], table[lower + 1]
        log_alpha = low + (place - lower) * (high - low)
        # betas grow, so the continued first segment would pass alpha = 1 before t = 0; the
        # second line lies above it everywhere else
        return torch.minimum(log_alpha, _SLOPE_AT_ZERO * place * table[1])

    def _table(self, device: torch.device) -> Tensor:
        return _log_alpha_table(self.betas, self.num_timesteps, self.beta_range, device)


_SLOPE_AT_ZERO = 1e-2  # of log alpha by step, in units of its first step
_BETA_RANGES = {"sd_scaled_linear": (0.00085, 0.012), "linear": (1e-4, 0.02)}


@lru_cache(maxsize=16)
def _log_alpha_table(
    betas: BetaSchedule,
    num_timesteps: int,
    beta_range: tuple[float, float] | None,
    device: torch.device,
) -> Tensor:
    """Return log alpha_n of n = 0 .. N, float64 ``(N + 1,)``; never written to."""
    first, last = beta_range or _BETA_RANGES[betas]
    # also where the first caller does not: a later one may differentiate, or be on another device
    with torch.inference_mode(False), torch.device("cpu"):
        if betas == "sd_scaled_linear":
            beta = torch.linspace(first**0.5, last**0.5, num_timesteps, dtype=torch.float64) ** 2
        else:
            beta = torch.linspace(first, last, num_timesteps, dtype=torch.float64)
        steps = 0.5 * torch.log1p(-beta).cumsum(0)
        return torch.nn.functional.pad(steps, (1, 0)).to(device)
