"""DPM-Solver++ of order 2 with ancestral noise: 2S ancestral."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genscale.errors import ConfigError
from genscale.objectives.base import Denoiser, Level, on
from genscale.samplers.base import State
from genscale.samplers.grid import GridSampler, Precision, Schedule, either, estimates
from genscale.samplers.ode import euler_step
from genscale.samplers.schedules import noise_ratio


class DPMSolver2S(GridSampler):
    """Single-step DPM-Solver++ of order 2 to a level below the next, then noise up to it.

    In s = sigma / alpha the step from s to s' is split: s_up = min(s', eta s' sqrt(1 - s'^2 /
    s^2)) is noise, and the solver goes to s_down = sqrt(s'^2 - s_up^2), through the midpoint in
    log s (arXiv:2211.01095, algorithm 1 with r = 1/2; k-diffusion's "DPM++ 2S a"). Two evaluations
    a step, one for the last: 2 N - 1.

    From pure noise (alpha 0, on flows) no step can be taken in log s: there two steps of order 1
    meet at the middle of process time, at the same cost.

    Args:
        steps: N.
        eta: 0 is deterministic, 1 ancestral.
        schedule: see :class:`~genscale.samplers.grid.GridSampler`.
        shift: see there.
        precision: see there.

    Raises:
        ConfigError: an unknown name or an impossible number.
    """

    def __init__(
        self,
        steps: int = 25,
        *,
        eta: float = 1.0,
        schedule: Schedule = "linear",
        shift: float = 1.0,
        precision: Precision = "float32",
    ) -> None:
        super().__init__(steps, schedule=schedule, shift=shift, precision=precision)
        if not 0.0 <= eta < math.inf:
            raise ConfigError(
                f"sampler.eta must be finite and not negative, but is {eta}. 0 is deterministic, "
                "1 ancestral."
            )
        self.eta = float(eta)

    @property
    def stochastic(self) -> bool:
        """Whether steps draw noise."""
        return self.eta > 0.0

    def nfe(self, i: int, j: int) -> int:
        """Network evaluations from step i to step j: 2 a step, 1 for the last of all."""
        self._check_range(i, j)
        return 2 * (j - i) - int(i < j == self.num_steps)

    def _move(self, model: Denoiser, state: State, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        now, then = self._between(state)
        clean, eps = estimates(state)
        x, cost = euler_step(clean, eps, then), torch.zeros_like(state.nfe)
        index = (then.sigma > 0).expand(len(x)).nonzero()[:, 0]
        if len(index) == 0:
            return x, cost
        fresh = self._step_noise(state, noise)
        if len(index) == len(x):
            return self._step(model, state, now, then, fresh)
        rows = index.to(x.device)
        part, spent = self._step(
            model, state.select(index), now.select(index), then.select(index), fresh[rows]
        )
        return x.index_copy(0, rows, part), cost.index_copy(0, index, spent)

    def _step(
        self, model: Denoiser, state: State, now: Level, then: Level, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        x, (clean, _) = state.x, estimates(state)
        s, s_then = noise_ratio(now), noise_ratio(then)
        up = torch.minimum(s_then, self.eta * s_then * torch.sqrt(1.0 - (s_then / s) ** 2))
        down = torch.sqrt((s_then**2 - up**2).clamp_min(0.0))
        pure = now.alpha == 0
        process = model.process
        middle_time = 0.5 * (process.time_at(now) + process.time_at(then))
        log_middle = torch.where(pure, 0.0, -0.5 * (torch.log(s) + torch.log(down)))
        middle = process.level(torch.where(pure, middle_time, process.time_of(log_middle)))
        there = _first_order(x, clean, now, middle)
        out = model(there, middle, state.cond, state.pending)
        base, begin = torch.where(on(pure.double(), x) > 0, there, x), either(pure, middle, now)
        below = Level(then.alpha, then.alpha * down)
        moved = _first_order(base, out.clean, begin, below)
        return moved + on(then.alpha * up, x) * noise, out.cost


def _first_order(x: Tensor, clean: Tensor, begin: Level, end: Level) -> Tensor:
    """Return (sigma' / sigma) x + alpha' (1 - e^-h) clean; h is infinite from pure noise."""
    keep = end.sigma / begin.sigma
    # alpha' e^-h is alpha sigma' / sigma, without a logarithm of 0
    return on(keep, x) * x + on(end.alpha - begin.alpha * keep, x) * clean
