"""One-step solvers of the probability-flow equation: Euler, Heun, and DPM-Solver-2."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.objectives.base import Denoiser, Level, Prediction, on
from genscale.objectives.memory import with_latest
from genscale.objectives.schedule import NoiseProcess
from genscale.samplers.base import State
from genscale.samplers.churn import ChurnSampler
from genscale.samplers.grid import Precision, Schedule, estimates


def euler_step(clean: Tensor, noise: Tensor, then: Level) -> Tensor:
    """Return alpha' clean + sigma' noise, the Euler step of every process.

    On a flow it is x + (sigma' - sigma)(noise - clean); on VE and VP processes it is Euler in
    y = x / alpha by s = sigma / alpha, where dy/ds = noise. Both equal DDIM with eta 0
    (arXiv:2010.02502), and neither divides by alpha, which is 0 at a flow's start.
    """
    return on(then.alpha, clean) * clean + on(then.sigma, clean) * noise


class Euler(ChurnSampler):
    """First order, one evaluation a step; see :func:`euler_step`."""

    def _solve(self, model: Denoiser, state: State) -> tuple[Tensor, Tensor]:
        _, then = self._between(state)
        clean, eps = estimates(state)
        return euler_step(clean, eps, then), torch.zeros_like(state.nfe)


class _TwoStage(ChurnSampler):
    """A step to a second level, an evaluation there, and a step with both slopes."""

    def nfe(self, i: int, j: int) -> int:
        """Network evaluations from step i to step j: 2 a step, 1 for the last of all."""
        self._check_range(i, j)
        return 2 * (j - i) - int(i < j == self.num_steps)

    def _advance(self, model: Denoiser, state: State, noise: Tensor | None) -> State:
        watched = _Watched(model)
        after = super()._advance(watched, state, noise)
        if watched.memory is None:
            return after
        _, then = self._between(state)
        index = (then.sigma > 0).expand(len(state)).nonzero()[:, 0]
        return after.replace(memory=with_latest(after.memory, watched.memory, index))

    @abstractmethod
    def _second(self, process: NoiseProcess, now: Level, then: Level) -> tuple[Level, float]:
        """Return the level of the second evaluation, and the weight of its slope."""

    def _solve(self, model: Denoiser, state: State) -> tuple[Tensor, Tensor]:
        now, then = self._between(state)
        clean, eps = estimates(state)
        x, cost = euler_step(clean, eps, then), torch.zeros_like(state.nfe)
        # a level without noise has no slope
        index = (then.sigma > 0).expand(len(x)).nonzero()[:, 0]
        if len(index) == len(x):
            return self._correct(model, state, x, now, then)
        if len(index) > 0:
            rows = index.to(x.device)
            part, spent = self._correct(
                model, state.select(index), x[rows], now.select(index), then.select(index)
            )
            x, cost = x.index_copy(0, rows, part), cost.index_copy(0, index, spent)
        return x, cost

    def _correct(
        self, model: Denoiser, state: State, x: Tensor, now: Level, then: Level
    ) -> tuple[Tensor, Tensor]:
        """Mix the slope of the step that led to ``x`` with the slope at the second level."""
        clean, eps = estimates(state)
        second, weight = self._second(model.process, now, then)
        there = x if second is then else euler_step(clean, eps, second)
        end = model(there, second, state.cond, state.pending)
        scale_now, scale_then = (
            model.process.straight_scale(level.alpha, level.sigma) for level in (now, then)
        )
        # x / scale = a clean + b eps with (a, b) on a straight line: a share of each's change
        part_a = weight * scale_then * (then.alpha / scale_then - now.alpha / scale_now)
        part_b = weight * scale_then * (then.sigma / scale_then - now.sigma / scale_now)
        x = x + on(part_a, x) * (end.clean - clean) + on(part_b, x) * (end.noise - eps)
        return x, end.cost


class _Watched(Denoiser):
    """A view, and what the network handed back at its latest call."""

    def __init__(self, view: Denoiser) -> None:
        self.view = view
        self.memory: Any = None
        self.process, self.sample_shape, self.device = view.process, view.sample_shape, view.device

    def __call__(
        self, x: Tensor, level: Level, cond: Conditioning, memory: Any = None
    ) -> Prediction:
        prediction = self.view(x, level, cond, memory)
        self.memory = prediction.memory
        return prediction


class Heun(_TwoStage):
    """Second order: an Euler step, then the mean of the slopes at both ends (arXiv:2206.00364).

    Two evaluations a step; the last step, which ends at the clean level, is plain Euler, so N
    steps cost 2 N - 1. The second evaluation belongs to ``advance``. It is integrated where paths
    are straight: x itself on a flow, x / alpha on VE and VP processes. With churn this is
    algorithm 2 of the paper, without it algorithm 1; ``midpoint`` is its general second-order
    family (eq. 39).

    Args:
        steps: N.
        midpoint: share of the step after which the second slope is taken, in (0, 1]: 1 is Heun,
            0.5 the midpoint method. The second slope has weight 1 / (2 midpoint).
        churn: see :class:`~genscale.samplers.churn.ChurnSampler`.
        churn_min: see there.
        churn_max: see there.
        churn_noise: see there.
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
        midpoint: float = 1.0,
        churn: float = 0.0,
        churn_min: float = 0.0,
        churn_max: float = math.inf,
        churn_noise: float = 1.0,
        schedule: Schedule = "linear",
        shift: float = 1.0,
        precision: Precision = "float32",
    ) -> None:
        super().__init__(
            steps,
            churn=churn,
            churn_min=churn_min,
            churn_max=churn_max,
            churn_noise=churn_noise,
            schedule=schedule,
            shift=shift,
            precision=precision,
        )
        if not 0.0 < midpoint <= 1.0:
            raise ConfigError(
                f"sampler.midpoint must lie in (0, 1], but is {midpoint}. 1 is Heun, 0.5 the "
                "midpoint method."
            )
        self.midpoint = float(midpoint)

    def _second(self, process: NoiseProcess, now: Level, then: Level) -> tuple[Level, float]:
        if self.midpoint == 1.0:
            return then, 0.5
        share = torch.full_like(then.alpha, self.midpoint)
        return _between_straight(process, now, then, share), 0.5 / self.midpoint


class DPM2(_TwoStage):
    """DPM-Solver-2 as k-diffusion arranges it (arXiv:2206.00927): the slope at the log-midpoint.

    The second evaluation is at s = sqrt(s_i s_{i+1}), s = sigma / alpha (sigma itself on a flow),
    and its slope alone takes the step. Two evaluations a step, one for the last: 2 N - 1.
    """

    def _second(self, process: NoiseProcess, now: Level, then: Level) -> tuple[Level, float]:
        b_now, b_then = (
            level.sigma / process.straight_scale(level.alpha, level.sigma) for level in (now, then)
        )
        share = (torch.sqrt(b_now * b_then) - b_now) / (b_then - b_now)
        return _between_straight(process, now, then, share), 1.0


def _between_straight(process: NoiseProcess, now: Level, then: Level, share: Tensor) -> Level:
    """Return the level a share of the way along the straight line of x / scale."""
    (a_now, b_now), (a_then, b_then) = (
        (level.alpha / scale, level.sigma / scale)
        for level in (now, then)
        for scale in (process.straight_scale(level.alpha, level.sigma),)
    )
    a, b = a_now + share * (a_then - a_now), b_now + share * (b_then - b_now)
    return process.level(process.time_of(torch.log(a) - torch.log(b)))
