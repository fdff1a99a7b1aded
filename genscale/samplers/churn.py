"""Noise added between deterministic steps: the stochastic sampler of EDM."""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from genscale.errors import ConfigError
from genscale.objectives.base import Denoiser, Level, on
from genscale.objectives.schedule import NoiseProcess
from genscale.samplers.base import State
from genscale.samplers.grid import GridSampler, Precision, Schedule
from genscale.samplers.schedules import LevelSchedule, level_grid, noise_ratio


class Churn(NamedTuple):
    """How much noise is added, and where (arXiv:2206.00364, algorithm 2).

    Attributes:
        amount: S_churn, spread over the steps; 0 adds none.
        low: S_min: the smallest s = sigma / alpha at which noise is added.
        high: S_max: the largest.
        factor: S_noise: standard deviation of the noise, a little above 1 against lost detail.
    """

    amount: float = 0.0
    low: float = 0.0
    high: float = math.inf
    factor: float = 1.0


class ChurnSampler(GridSampler):
    """A deterministic solver, with EDM's churn between its steps.

    EDM raises the noise of x from s_i to s_i (1 + gamma) before step i. Here that belongs to the
    end of step i - 1 (and to the start), so that a state always stands at the level at which its
    step is evaluated, and other noise can be drawn without a new evaluation. ``grid`` holds the
    raised levels. The numbers are the same: step i of the paper uses the noise of ``advance``
    i - 1, and its first noise is part of the start, whose standard deviation is raised alike.

    Args:
        steps: N.
        churn: S_churn; 0 is deterministic.
        churn_min: S_min, in s = sigma / alpha, which is sigma on VE processes.
        churn_max: S_max.
        churn_noise: S_noise.
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
        churn: float = 0.0,
        churn_min: float = 0.0,
        churn_max: float = math.inf,
        churn_noise: float = 1.0,
        schedule: Schedule = "linear",
        shift: float = 1.0,
        precision: Precision = "float32",
    ) -> None:
        super().__init__(steps, schedule=schedule, shift=shift, precision=precision)
        if not (0.0 <= churn < math.inf and 0.0 < churn_noise < math.inf):
            raise ConfigError(
                f"sampler.churn must not be negative and churn_noise must be positive, but they "
                f"are {churn} and {churn_noise}. EDM has churn 0, or 40 and 1.003."
            )
        if not 0.0 <= churn_min < churn_max:
            raise ConfigError(
                "sampler.churn_min must be below churn_max and not negative, but they are "
                f"{churn_min} and {churn_max}. EDM has 0.05 and 50."
            )
        self.churn = Churn(float(churn), float(churn_min), float(churn_max), float(churn_noise))

    @property
    def stochastic(self) -> bool:
        """Whether steps draw noise."""
        return self.churn.amount > 0.0

    def grid(self, process: NoiseProcess) -> Level:
        """Return the levels at which steps begin, churn included, and the clean level."""
        if self.churn.amount == 0.0:
            return level_grid(process, self.schedule, self.intervals)
        return _raised(process, self.schedule, self.intervals, self.churn)

    def _between(self, state: State) -> tuple[Level, Level]:
        now, then = super()._between(state)
        if self.churn.amount > 0.0:
            step = (state.step[:1] if len(then) == 1 else state.step) + 1
            grid = level_grid(self._process_of(state), self.schedule, self.intervals)
            then = grid.select(step.clamp(max=self.num_steps))
        return now, then

    def _start_std(self, process: NoiseProcess) -> Tensor:
        first = torch.zeros(1, dtype=torch.int64, device="cpu")
        plain = level_grid(process, self.schedule, self.intervals).select(first)
        return torch.hypot(
            _ratio(plain, self.grid(process).select(first)) * plain.sigma,
            self._churn_std(plain, self.grid(process).select(first)),
        )

    def _raise(self, x: Tensor, state: State, noise: Tensor | None) -> Tensor:
        """Add the noise that lifts x from where the step ended to where the next begins."""
        if self.churn.amount == 0.0:
            return x
        _, ended = self._between(state)
        step = (state.step[:1] if len(ended) == 1 else state.step) + 1
        begins = self.grid(self._process_of(state)).select(step.clamp(max=self.num_steps))
        std = self._churn_std(ended, begins)
        if not bool((std > 0).any()):
            return x
        return on(_ratio(ended, begins), x) * x + on(std, x) * self._step_noise(state, noise)

    def _churn_std(self, plain: Level, raised: Level) -> Tensor:
        variance = raised.sigma**2 - (_ratio(plain, raised) * plain.sigma) ** 2
        return self.churn.factor * variance.clamp_min(0.0).sqrt()

    def _move(self, model: Denoiser, state: State, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        x, cost = self._solve(model, state)
        return self._raise(x, state, noise), cost

    @abstractmethod
    def _solve(self, model: Denoiser, state: State) -> tuple[Tensor, Tensor]:
        """Return x at the end of the deterministic step, and the evaluations spent."""


def _ratio(plain: Level, raised: Level) -> Tensor:
    """Return alpha' / alpha; 1 at a flow's start, whose noise cannot be raised."""
    return torch.where(plain.alpha > 0, raised.alpha / plain.alpha, 1.0)


@lru_cache(maxsize=64)
def _raised(process: NoiseProcess, schedule: LevelSchedule, intervals: int, churn: Churn) -> Level:
    plain = level_grid(process, schedule, intervals)
    with torch.inference_mode(False), torch.device("cpu"):
        s = noise_ratio(plain)
        # no step more than doubles the variance
        gamma = min(churn.amount / intervals, math.sqrt(2.0) - 1.0)
        inside = (s >= churn.low) & (s <= churn.high) & (s > 0) & torch.isfinite(s)
        raised_time = process.time_of(-torch.log(s * (1.0 + gamma)))
        time = torch.where(inside, raised_time, process.time_at(plain))
        if not process.continues_above:
            time = time.clamp(max=process.t_max)
        raised = process.level(time)
        # levels that are not raised stay exactly what they were
        return Level(
            torch.where(inside, raised.alpha, plain.alpha),
            torch.where(inside, raised.sigma, plain.sigma),
            time,
        )
