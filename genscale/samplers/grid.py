"""What solvers on a grid of noise levels share: the grid, evaluation, mixed steps, re-noising."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Literal, get_args

import torch
from torch import Tensor

from genscale import rng
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError, did_you_mean
from genscale.objectives.base import Denoiser, Level, on
from genscale.objectives.memory import forget_rows, put_rows
from genscale.objectives.schedule import NoiseProcess
from genscale.rng import Purpose
from genscale.samplers.base import Sampler, State
from genscale.samplers.schedules import (
    LevelSchedule,
    ScheduleName,
    check_unshifted,
    level_grid,
    named_schedule,
)

Schedule = ScheduleName | LevelSchedule
Precision = Literal["float32", "float64"]


class GridSampler(Sampler):
    """A solver that goes from level to level of a fixed grid, each particle at its own step.

    Deterministic solvers have no noise that ``advance`` could replace and ignore what is given.

    Args:
        steps: intervals N of the grid.
        schedule: where the levels lie: ``"linear"``, uniform in process time, or another name or
            object of :mod:`genscale.samplers.schedules`.
        shift: above 1 moves a linear grid towards noise, for large pictures; 1 changes nothing.
        precision: dtype of the state; the network runs in its own.

    Raises:
        ConfigError: an unknown name or an impossible number.
    """

    def __init__(
        self,
        steps: int = 50,
        *,
        schedule: Schedule = "linear",
        shift: float = 1.0,
        precision: Precision = "float32",
    ) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ConfigError(
                f"sampler.steps must be a whole number of at least 1, but is {steps!r}. "
                "Give e.g. sampler.steps=50."
            )
        if not 0.0 < shift < math.inf:
            raise ConfigError(
                f"sampler.shift must be positive, but is {shift}. 1 leaves the grid as it is."
            )
        if precision not in get_args(Precision):
            raise ConfigError(
                f"sampler.precision must be one of {', '.join(get_args(Precision))}, but is "
                f"{precision!r}.{did_you_mean(str(precision), get_args(Precision))}"
            )
        self.schedule: LevelSchedule
        if isinstance(schedule, LevelSchedule):
            check_unshifted(schedule, shift)
            self.schedule = schedule
        else:
            self.schedule = named_schedule(schedule, float(shift))
        self.intervals = steps
        self.shift = float(shift)
        self.precision = precision
        self.dtype = torch.float32 if precision == "float32" else torch.float64

    @property
    def num_steps(self) -> int:
        """Number of ``advance`` calls from start to finish."""
        return self.intervals

    def nfe(self, i: int, j: int) -> int:
        """Network evaluations from step i to step j, one branch a call."""
        self._check_range(i, j)
        return j - i

    def grid(self, process: NoiseProcess) -> Level:
        """Return all levels of the grid, from most noise to clean."""
        return level_grid(process, self.schedule, self.intervals)

    def levels(self, process: NoiseProcess) -> Level:
        """Return the levels ``(num_steps + 1,)`` at which steps begin, and where the last ends."""
        return self.grid(process).select(self._place(torch.arange(self.num_steps + 1)))

    def last_level(self, process: NoiseProcess) -> Level:
        """Return the level ``(1,)`` at which the last step begins."""
        step = torch.tensor([self.num_steps - 1], device="cpu")
        return self.grid(process).select(self._place(step))

    def check(self, process: NoiseProcess, *, learned_variance: bool) -> list[str]:
        """Return why the process lacks the levels of the schedule, if it does."""
        try:
            self.grid(process)
        except ConfigError as error:
            return [str(error)]
        return []

    def start(
        self,
        model: Denoiser,
        cond: Conditioning,
        seeds: Tensor,
        noise: Tensor | None = None,
    ) -> State:
        """Begin at sigma(t_max) times unit-normal noise.

        Args:
            model: the denoiser; only its process, shape and device are read.
            cond: conditions of B samples (no fields at all for an unconditional model).
            seeds: ``(B,)`` int64.
            noise: ``(B, ...)`` unit normal; None draws it from the seeds.

        Raises:
            ValueError: numbers of seeds, conditions and noises that differ.
        """
        seeds = seeds.to(device="cpu", dtype=torch.int64)
        count = len(seeds)
        if noise is None:
            noise = self.start_noise(model, seeds)
        if len(noise) != count or len(cond) not in (0, count):
            raise ValueError(
                f"{count} seeds were given with {len(cond)} conditions and {len(noise)} noises. "
                "Give one of each a sample."
            )
        noise = noise.to(device=model.device, dtype=self.dtype)
        zero = torch.zeros(count, dtype=torch.int64, device="cpu")
        x = on(self._start_std(model.process), noise) * noise
        return State(
            x=x,
            cond=cond.to(model.device),
            step=zero,
            seeds=seeds,
            lineage=zero.clone(),
            group=torch.arange(count, device="cpu"),
            nfe=zero.double(),
            history=self._fresh_history(x),
            process=model.process,
        )

    def evaluate(self, model: Denoiser, state: State) -> State:
        """Set ``.clean`` and ``.noise``; finished particles have their own x and zero."""
        if state.clean is not None:
            return state
        active = state.step < self.num_steps
        if bool(active.all()):
            return self._evaluate(model, state)
        state = state.replace(clean=state.x, noise=torch.zeros_like(state.x), pending=state.memory)
        if not bool(active.any()):
            return state
        index = active.nonzero()[:, 0]
        part = state.select(index).replace(clean=None, noise=None, pending=None)
        part = self._evaluate(model, part)
        if part.variance is not None:
            state = state.replace(variance=torch.zeros_like(state.x))
        return state.put(index, part)

    def advance(self, model: Denoiser, state: State, noise: Tensor | None = None) -> State:
        """Take one step, in all particles that have one left; the others stay as they are."""
        active = state.step < self.num_steps
        if not bool(active.any()):
            return state
        state = self.evaluate(model, state)
        if bool(active.all()):
            return self._advance(model, state, noise)
        index = active.nonzero()[:, 0]
        part = self._advance(
            model, state.select(index), None if noise is None else noise[index.to(noise.device)]
        )
        state = state.replace(
            clean=None, noise=None, variance=None, memory=state.pending, pending=None
        )
        return state.put(index, part)

    def forget(self, state: State) -> State:
        """Restart the solver's history: for particles whose x was changed from outside.

        Solvers of several steps then begin again at order 1; others lose nothing. Features of a
        step cache are dropped. The result is not evaluated.
        """
        return state.replace(
            clean=None,
            noise=None,
            variance=None,
            memory=forget_rows(state.memory, torch.arange(len(state), device="cpu")),
            pending=None,
            history=self._fresh_history(state.x),
        )

    def finish(self, state: State) -> Tensor:
        """Return the samples ``(B, ...)``, in the state's dtype.

        Raises:
            ValueError: particles that have steps left.
        """
        left = self.num_steps - int(state.step.min())
        if left > 0:
            raise ValueError(
                f"A particle has {left} of {self.num_steps} steps left. Call advance until "
                "state.step equals num_steps, or sampler.run."
            )
        return state.x

    def renoise(self, state: State, step: int | Tensor, noise: Tensor | None = None) -> State:
        """Go back to an earlier step through the forward process.

        q(x_j | x_i) = N((alpha_j / alpha_i) x_i, sigma_j^2 - (alpha_j / alpha_i)^2 sigma_i^2).
        Particles that move get a new lineage, so that neither the steps taken again nor a later
        return repeat their noise. What the network remembers stays, but features of a step cache,
        which belong to another x, are dropped; their solver history restarts.

        Args:
            state: evaluated or not; the result is not.
            step: where to go, one for all or ``(B,)``, at most the particle's own step.
            noise: ``(B, ...)`` unit normal; None draws it from seed and lineage.

        Raises:
            ValueError: a step that is negative or later than the particle's own.
        """
        target = torch.as_tensor(step, dtype=torch.int64, device="cpu").expand(len(state))
        if bool(((target < 0) | (target > state.step)).any()):
            raise ValueError(
                f"renoise goes back to steps 0 to the particle's own, {state.step.tolist()}, but "
                f"{target.tolist()} was asked for. Use advance to go forward."
            )
        now, then = self._level(state, state.step), self._level(state, target)
        # alpha is 0 only at a flow's start, from where there is nowhere to go back to
        ratio = torch.where(now.alpha > 0, then.alpha / now.alpha, 1.0)
        variance = then.sigma**2 - (ratio * now.sigma) ** 2
        fields = (state.seeds, state.lineage, state.step, target, Purpose.RENOISE)
        noise = self._noise(state.x, rng.key(*fields)) if noise is None else noise.to(state.x)
        std = on(variance.clamp_min(0.0).sqrt(), state.x)
        renewed = rng.key(state.lineage, state.step, target, Purpose.RENOISE)
        moved = target < state.step
        history, index = state.history, moved.nonzero()[:, 0]
        if len(index) > 0:
            rows = state.x[index.to(state.x.device)]
            history = put_rows(history, index, self._fresh_history(rows))
        memory = forget_rows(state.memory, index) if len(index) > 0 else state.memory
        return state.replace(
            x=on(ratio, state.x) * state.x + std * noise,
            step=target.clone(),
            lineage=torch.where(moved, renewed, state.lineage),
            clean=None,
            noise=None,
            variance=None,
            history=history,
            memory=memory,
            pending=None,
        )

    @abstractmethod
    def _move(self, model: Denoiser, state: State, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the next x and the evaluations ``(B,)`` spent on top of ``evaluate``'s.

        All particles are evaluated and have a step left.
        """

    def _evaluate(self, model: Denoiser, state: State) -> State:
        level = self._level(state, _shared(state.step))
        prediction = model(state.x, level, state.cond, state.memory)
        return state.replace(
            clean=prediction.clean,
            noise=prediction.noise,
            variance=prediction.variance,
            pending=prediction.memory,
            nfe=state.nfe + prediction.cost,
        )

    def _advance(self, model: Denoiser, state: State, noise: Tensor | None) -> State:
        x, cost, history = self._take(model, state, noise)
        return state.replace(
            x=x,
            history=history,
            step=state.step + 1,
            nfe=state.nfe + cost,
            clean=None,
            noise=None,
            variance=None,
            memory=state.pending,
            pending=None,
        )

    def _take(
        self, model: Denoiser, state: State, noise: Tensor | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return what :meth:`_move` does, and the solver history after the step."""
        x, cost = self._move(model, state, noise)
        return x, cost, self._next_history(state)

    def _start_std(self, process: NoiseProcess) -> Tensor:
        """Return the standard deviation ``(1,)`` of x where trajectories start."""
        zero = torch.zeros(1, dtype=torch.int64, device="cpu")
        return self.grid(process).select(self._place(zero)).sigma

    def _fresh_history(self, x: Tensor) -> dict[str, Tensor]:
        """Return the solver history of particles that have none yet; same names always."""
        return {}

    def _next_history(self, state: State) -> dict[str, Tensor]:
        """Return the solver history after the current, evaluated step."""
        return state.history

    def _step_noise(self, state: State, noise: Tensor | None) -> Tensor:
        """Return the unit noise of the current step: the caller's, or keyed."""
        return self.step_noise(None, state) if noise is None else noise.to(state.x)

    def _place(self, step: Tensor) -> Tensor:
        """Return where on the grid a step begins."""
        return step

    def _level(self, state: State, step: Tensor) -> Level:
        """Return the levels at which steps begin."""
        return self.grid(self._process_of(state)).select(self._place(step))

    def _process_of(self, state: State) -> NoiseProcess:
        if state.process is None:
            raise ValueError(
                "The state names no noising process. Begin trajectories with sampler.start."
            )
        return state.process

    def _between(self, state: State) -> tuple[Level, Level]:
        """Return the levels where the current step begins and ends; shared ones of length 1."""
        step = _shared(state.step)
        last = torch.full_like(step, self.num_steps)
        return self._level(state, step), self._level(state, torch.minimum(step + 1, last))

    def _noise(self, x: Tensor, keys: Tensor) -> Tensor:
        """Draw unit-normal noise shaped as ``x``; float32 numbers whatever the precision."""
        keys = keys.to(x.device, non_blocking=True)
        return rng.normal(keys, tuple(x.shape[1:])).to(x.dtype)

    def _check_range(self, i: int, j: int) -> None:
        if not 0 <= i <= j <= self.num_steps:
            raise ValueError(
                f"Steps 0 <= i <= j <= {self.num_steps} were expected, but i={i} and j={j} were "
                "given."
            )


def estimates(state: State) -> tuple[Tensor, Tensor]:
    """Return (clean, noise) of an evaluated state.

    Raises:
        ValueError: a state that is not evaluated.
    """
    if state.clean is None or state.noise is None:
        raise ValueError("The state is not evaluated. Call sampler.evaluate first.")
    return state.clean, state.noise


def either(choose: Tensor, one: Level, other: Level) -> Level:
    """Return the levels of ``one`` where ``choose`` ``(B,)``, of ``other`` elsewhere."""
    time = None
    if one.time is not None and other.time is not None:
        time = torch.where(choose, one.time, other.time)
    return Level(
        torch.where(choose, one.alpha, other.alpha),
        torch.where(choose, one.sigma, other.sigma),
        time,
    )


def _shared(step: Tensor) -> Tensor:
    """Return ``(1,)`` where all particles stand at one step, so that one level serves all."""
    return step[:1] if bool((step == step[0]).all()) else step
