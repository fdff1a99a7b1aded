"""Stochastic solvers with Gaussian transitions of known density."""

from __future__ import annotations

import torch
from torch import Tensor

from genscale import rng
from genscale.errors import ConfigError
from genscale.objectives.base import Denoiser, on
from genscale.rng import Purpose
from genscale.samplers.base import State
from genscale.samplers.grid import GridSampler, Precision, Schedule


class DDIM(GridSampler):
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

    def transition(self, state: State) -> tuple[Tensor, Tensor]:
        """Return the law of the next x: a normal with independent elements.

        Args:
            state: evaluated.

        Returns:
            mean ``(B, ...)``, and standard deviation ``(B,)`` float64 on the CPU; 0 at the last
            step and for finished particles.

        Raises:
            ValueError: a state that is not evaluated.
        """
        if state.clean is None or state.noise is None:
            raise ValueError("The state is not evaluated. Call sampler.evaluate first.")
        now, then = self._between(state)
        noisy = now.sigma > 0
        shrink = torch.where(noisy, then.sigma / now.sigma, 0.0)
        tau = shrink * torch.sqrt(
            (now.sigma**2 - (now.alpha / then.alpha * then.sigma) ** 2).clamp_min(0.0)
        )
        std = self.eta * tau
        kept = torch.sqrt((then.sigma**2 - std**2).clamp_min(0.0))
        mean = on(then.alpha, state.x) * state.clean + on(kept, state.x) * state.noise
        return mean, std.expand(len(state))

    def _move(self, model: Denoiser, state: State, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        mean, std = self.transition(state)
        cost = torch.zeros_like(state.nfe)
        if not bool((std > 0).any()):
            return mean, cost
        if noise is None:
            keys = rng.key(state.seeds, state.lineage, state.step, Purpose.STEP)
            noise = self._noise(mean, keys)
        return mean + on(std, mean) * noise.to(mean), cost
