"""Stochastic solvers with Gaussian transitions of known density."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor

from genscale.errors import ConfigError
from genscale.objectives.base import Denoiser, Level, on
from genscale.samplers.base import State
from genscale.samplers.grid import GridSampler, Precision, Schedule, estimates


class GaussianSampler(GridSampler):
    """A solver whose steps are draws from normals with independent elements."""

    @property
    def stochastic(self) -> bool:
        """Whether steps draw noise."""
        return True

    @abstractmethod
    def transition(self, state: State) -> tuple[Tensor, Tensor]:
        """Return the law of the next x: a normal with independent elements.

        Args:
            state: evaluated.

        Returns:
            mean ``(B, ...)``, and standard deviation: ``(B,)`` float64 on the CPU, or shaped as
            the mean where elements differ. It is 0 for deterministic steps.

        Raises:
            ValueError: a state that is not evaluated.
        """

    def log_prob(
        self, state: State, x: Tensor, *, reduce: Literal["sum", "mean"] = "sum"
    ) -> Tensor:
        """Return the log-density of a next x ``(B, ...)`` under :meth:`transition`.

        Args:
            state: evaluated, before the step.
            x: what the step led to.
            reduce: over the elements of a sample; Flow-GRPO (arXiv:2505.05470) takes the mean.

        Returns:
            ``(B,)`` float64 on x's device; 0 for deterministic steps, which have no density and
            add nothing to the likelihood of a trajectory.
        """
        mean, std = self.transition(state)
        spread = std.to(device=x.device, dtype=torch.float64)
        if std.dim() == 1:
            spread = spread.view(-1, *([1] * (x.dim() - 1)))
        random = spread > 0
        safe = torch.where(random, spread, 1.0)
        off = (x.double() - mean.double()) / safe
        log_density = -0.5 * off.square() - torch.log(safe) - 0.5 * math.log(2.0 * math.pi)
        log_density = torch.where(random, log_density, 0.0).flatten(1)
        return log_density.sum(1) if reduce == "sum" else log_density.mean(1)

    def _move(self, model: Denoiser, state: State, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        mean, std = self.transition(state)
        cost = torch.zeros_like(state.nfe)
        if std.dim() > 1:
            return mean + std * self._step_noise(state, noise), cost
        if not bool((std > 0).any()):
            return mean, cost
        return mean + on(std, mean) * self._step_noise(state, noise), cost


def ddim_law(now: Level, then: Level, eta: float) -> tuple[Tensor, Tensor]:
    """Return what of the noise estimate is kept, and the standard deviation of new noise.

    The next x is alpha' clean + kept noise + std z; see :class:`DDIM`. Elementwise, so that frames
    may have levels of their own.
    """
    noisy = now.sigma > 0
    shrink = torch.where(noisy, then.sigma / now.sigma, 0.0)
    tau = shrink * torch.sqrt(
        (now.sigma**2 - (now.alpha / then.alpha * then.sigma) ** 2).clamp_min(0.0)
    )
    std = eta * tau
    return torch.sqrt((then.sigma**2 - std**2).clamp_min(0.0)), std


class DDIM(GaussianSampler):
    """The DDIM family on any process (arXiv:2010.02502, eq. 12): first order, one evaluation.

    x' = alpha' clean + sqrt(sigma'^2 - eta^2 tau^2) noise + eta tau z, with
    tau^2 = (sigma'^2 / sigma^2) (sigma^2 - (alpha / alpha')^2 sigma'^2).

    eta 0 is the Euler step. eta 1 is the exact posterior of the forward process given the clean
    estimate: ancestral DDPM sampling on VP, "Euler ancestral" on VE, and a marginal-preserving
    stochastic sampler on flows, also at their start, where alpha is 0. The last step ends at the
    clean level and adds no noise.

    Args:
        steps: N, also the number of evaluations.
        eta: in [0, 1].
        schedule: see :class:`~genscale.samplers.grid.GridSampler`.
        shift: see there.
        precision: see there.

    Raises:
        ConfigError: an unknown name or an impossible number.
    """

    def __init__(
        self,
        steps: int = 50,
        *,
        eta: float = 0.0,
        schedule: Schedule = "linear",
        shift: float = 1.0,
        precision: Precision = "float32",
    ) -> None:
        super().__init__(steps, schedule=schedule, shift=shift, precision=precision)
        if not 0.0 <= eta <= 1.0:
            raise ConfigError(
                f"sampler.eta must lie in [0, 1], but is {eta}. 0 is deterministic, 1 ancestral."
            )
        self.eta = float(eta)

    @property
    def stochastic(self) -> bool:
        """Whether steps draw noise."""
        return self.eta > 0.0

    def transition(self, state: State) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation ``(B,)`` of the next x; see the class."""
        clean, noise = estimates(state)
        now, then = self._between(state)
        kept, std = ddim_law(now, then, self.eta)
        mean = on(then.alpha, state.x) * clean + on(kept, state.x) * noise
        return mean, std.expand(len(state))
