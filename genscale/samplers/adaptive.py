"""Dormand-Prince 5(4) with a step size of each sample's own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from genscale.errors import ConfigError, did_you_mean
from genscale.objectives.base import Denoiser, Level, Prediction, on
from genscale.objectives.memory import put_rows, take_rows
from genscale.objectives.schedule import NoiseProcess
from genscale.samplers.base import State
from genscale.samplers.grid import GridSampler, Precision, Schedule, either, estimates
from genscale.samplers.runge_kutta import TABLEAUS, LastStep, weighted

# weights of order 5 less those of order 4 (Shampine 1986), with the slope at the end of the step
ERROR_WEIGHTS = (
    35 / 384 - 1951 / 21600,
    0.0,
    500 / 1113 - 22642 / 50085,
    125 / 192 - 451 / 720,
    -2187 / 6784 + 12231 / 42400,
    11 / 84 - 649 / 6300,
    -1.0 / 60.0,
)
_STAGES = 6  # evaluations of an attempted step; its first slope is known


class Adaptive(GridSampler):
    """Dormand and Prince's pair of orders 5 and 4 on the probability-flow equation.

    Between two levels of the grid a sample takes as many steps as its own error asks for: the
    root mean square of error / (atol + rtol max(|z|, |z'|)) over its elements is held below 1, a
    step that fails is taken again at a smaller size, and samples that have arrived leave the
    batch. So a sample is the same in any batch, which programs with one error norm for all do not
    give. z = x / c is where paths are straight: x itself on a flow, x / alpha on VP and VE
    processes, and steps are measured in sigma / c.

    The last slope of a step is the first of the next: what the network said where a sample
    arrived stays in the history with the step size, and ``evaluate`` is free there. The host
    reads the errors after every attempted step, since they decide what is computed next.

    Args:
        steps: intervals N of the grid: where a search can look. Few are cheap; a step ends at
            each level.
        rtol: tolerance relative to the sample.
        atol: absolute tolerance.
        last: ``"euler"``: from the process's ``t_min`` an Euler step leads to the clean level, for
            any network; ``"full"`` integrates to where the grid ends, which at t = 0 asks for a
            network that predicts a velocity.
        max_evaluations: between two levels, a sample; more is an error. ``nfe`` counts them all.
        schedule: see :class:`~genscale.samplers.grid.GridSampler`.
        shift: see there.
        precision: see there.

    Raises:
        ConfigError: an unknown name or an impossible number; on the way, evaluations that do not
            suffice.
    """

    nfe_is_bound: ClassVar[bool] = True

    def __init__(
        self,
        steps: int = 4,
        *,
        rtol: float = 1e-3,
        atol: float = 1e-6,
        last: LastStep = "euler",
        max_evaluations: int = 600,
        schedule: Schedule = "linear",
        shift: float = 1.0,
        precision: Precision = "float32",
    ) -> None:
        super().__init__(steps, schedule=schedule, shift=shift, precision=precision)
        if not (0.0 < rtol < math.inf and 0.0 < atol < math.inf):
            raise ConfigError(
                f"sampler.rtol and sampler.atol must be positive, but are {rtol} and {atol}. SiT "
                "has 1e-3 and 1e-6."
            )
        if last not in get_args(LastStep):
            raise ConfigError(
                f"sampler.last must be one of {', '.join(get_args(LastStep))}, but is {last!r}."
                f"{did_you_mean(str(last), get_args(LastStep))}"
            )
        if isinstance(max_evaluations, bool) or max_evaluations < 2 + _STAGES:
            raise ConfigError(
                f"sampler.max_evaluations must be at least {2 + _STAGES}, what one step costs, "
                f"but is {max_evaluations}. 600 is ample."
            )
        self.rtol, self.atol = float(rtol), float(atol)
        self.last = last
        self.max_evaluations = int(max_evaluations)

    def nfe(self, i: int, j: int) -> int:
        """Return the most evaluations that steps i to j can take; samples differ in theirs."""
        self._check_range(i, j)
        return (j - i) * self.max_evaluations

    def _fresh_history(self, x: Tensor) -> dict[str, Tensor]:
        return {
            "length": torch.zeros(len(x), dtype=torch.float64, device="cpu"),  # 0: none yet
            "clean": torch.zeros_like(x),
            "noise": torch.zeros_like(x),
        }

    def _evaluate(self, model: Denoiser, state: State) -> State:
        arrived = state.history["length"] > 0
        fresh = (~arrived).nonzero()[:, 0]
        if len(fresh) == len(state):
            return super()._evaluate(model, state).replace(variance=None)
        known = state.replace(
            clean=state.history["clean"], noise=state.history["noise"], pending=state.memory
        )
        if len(fresh) == 0:
            return known
        part = super()._evaluate(model, state.select(fresh)).replace(variance=None)
        return known.put(fresh, part)

    def _move(self, model: Denoiser, state: State, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        x, cost, _ = self._take(model, state, noise)
        return x, cost

    def _take(
        self, model: Denoiser, state: State, noise: Tensor | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        x, cost, history, _ = self._integrate(model, state)
        return x, cost, history

    def _advance(self, model: Denoiser, state: State, noise: Tensor | None) -> State:
        x, cost, history, memory = self._integrate(model, state)
        return state.replace(
            x=x,
            history=history,
            step=state.step + 1,
            nfe=state.nfe + cost,
            clean=None,
            noise=None,
            memory=memory,
            pending=None,
        )

    def _integrate(
        self, model: Denoiser, state: State
    ) -> tuple[Tensor, Tensor, dict[str, Tensor], Any]:
        """Go to the next level; return x, evaluations, history, and the network's memory there."""
        process = self._process_of(state)
        now, then = (level.expand(len(state)) for level in self._between(state))
        clean, noise = estimates(state)
        ends = (then.sigma == 0) & (self.last == "euler")
        goal = either(ends, process.level(process.t_min).expand(len(state)), then)
        line = _Line.between(process, now, goal)
        rows = _Rows(
            z=state.x / on(line.scale_now, state.x),
            clean=clean,
            noise=noise,
            b=line.b_now.clone(),
            length=state.history["length"].clone(),
            spent=torch.ones(len(state), dtype=torch.int64, device="cpu"),
            cost=torch.zeros_like(state.nfe),
            memory=state.pending,
        )
        self._first_lengths(model, state, line, rows)
        active = (rows.b > line.b_goal).nonzero()[:, 0]
        while len(active) > 0:
            self._attempt(model, state, line, rows, active)
            active = active[rows.b[active] > line.b_goal[active]]
        x = rows.z * on(line.scale_goal, rows.z)
        at_clean = on(ends.double(), x) > 0
        x = torch.where(at_clean, on(then.alpha, x) * rows.clean, x)
        history = {"length": rows.length, "clean": rows.clean, "noise": rows.noise}
        return x, rows.cost, history, rows.memory

    def _first_lengths(self, model: Denoiser, state: State, line: _Line, rows: _Rows) -> None:
        """Choose a first step size where there is none (Hairer, Norsett and Wanner, II.4)."""
        fresh = ((rows.length == 0) & (rows.b > line.b_goal)).nonzero()[:, 0]
        rows.length[rows.length == 0] = math.inf  # of rows that have nowhere to go
        if len(fresh) == 0:
            return
        part = line.select(fresh)
        z, slope = rows.taken("z", fresh), line.slope(rows, fresh)
        scale = self.atol + self.rtol * z.abs()
        size, speed = root_mean_square(z / scale), root_mean_square(slope / scale)
        still = (size < 1e-5) | (speed < 1e-5)
        trial = torch.where(still, 1e-6, 0.01 * size / speed)
        trial = torch.minimum(trial, rows.b[fresh] - part.b_goal)
        level = part.level(rows.b[fresh] - trial)
        out = part.ask(model, state, fresh, level, z - on(trial, z) * slope)
        change = on(part.rate, z) * out.clean + out.noise - slope
        bend = root_mean_square(change / scale) / trial
        flat = (speed <= 1e-15) & (bend <= 1e-15)
        second = (0.01 / torch.maximum(speed, bend)) ** 0.2
        second = torch.where(flat, (trial * 1e-3).clamp_min(1e-6), second)
        rows.length[fresh] = torch.minimum(100.0 * trial, second)
        rows.spent[fresh] += 1
        rows.cost[fresh] += out.cost

    def _attempt(
        self, model: Denoiser, state: State, line: _Line, rows: _Rows, index: Tensor
    ) -> None:
        """Try a step of rows ``index``; those whose error is small enough move."""
        self._check_spent(rows, line, index)
        part, z = line.select(index), rows.taken("z", index)
        left, length = rows.b[index] - part.b_goal, rows.length[index]
        lands = length >= left
        h = torch.where(lands, left, length)
        tableau, slopes = TABLEAUS["dopri5"], [line.slope(rows, index)]
        stages = [*zip(tableau.nodes, tableau.rows, strict=True), (1.0, tableau.weights)]
        for node, weights in stages:
            level = part.level(rows.b[index] - node * h)
            if node == 1.0:
                level = either(lands, part.goal, level)
            there = z - on(h, z) * weighted(weights, slopes)
            out = part.ask(model, state, index, level, there)
            rows.cost[index] += out.cost
            slopes.append(on(part.rate, z) * out.clean + out.noise)
        rows.spent[index] += _STAGES
        scale = self.atol + self.rtol * torch.maximum(z.abs(), there.abs())
        ratio = root_mean_square(on(h, z) * weighted(ERROR_WEIGHTS, slopes) / scale)
        ratio = ratio.nan_to_num(nan=math.inf)
        good = ratio <= 1.0
        following = h * _factor(ratio)
        # a step cut short at a level says little about the next one
        rows.length[index] = torch.where(good & lands, torch.maximum(following, length), following)
        kept = good.nonzero()[:, 0]
        if len(kept) == 0:
            return
        rows.b[index[kept]] = torch.where(lands, part.b_goal, rows.b[index] - h)[kept]
        rows.put(index[kept], kept, there, out.clean, out.noise)
        arrived = (good & lands).nonzero()[:, 0]
        if len(arrived) > 0:
            rows.memory = put_rows(rows.memory, index[arrived], take_rows(out.memory, arrived))

    def _check_spent(self, rows: _Rows, line: _Line, index: Tensor) -> None:
        late = rows.spent[index] + _STAGES > self.max_evaluations
        if bool(late.any()):
            row = index[int(late.nonzero()[0, 0])]
            raise ConfigError(
                f"sampler.max_evaluations={self.max_evaluations} do not suffice between two levels "
                f"at sigma / scale = {float(rows.b[row]):.4g}, with sampler.rtol={self.rtol:g} and "
                f"sampler.atol={self.atol:g}. Raise the tolerances, or the evaluations; where the "
                "network's estimates are not finite at the clean level, use sampler.last=euler."
            )


@dataclass
class _Line:
    """The straight line of x / c between two levels, a row a particle, on the CPU.

    Attributes:
        process: whose levels.
        goal: where the step ends.
        a_now: alpha / c at the beginning.
        b_now: sigma / c there.
        b_goal: sigma / c at the end.
        rate: change of alpha / c with sigma / c.
        scale_now: c at the beginning.
        scale_goal: c at the end.
    """

    process: NoiseProcess
    goal: Level
    a_now: Tensor
    b_now: Tensor
    b_goal: Tensor
    rate: Tensor
    scale_now: Tensor
    scale_goal: Tensor

    @staticmethod
    def between(process: NoiseProcess, now: Level, goal: Level) -> _Line:
        c, c_goal = (process.straight_scale(lv.alpha, lv.sigma) for lv in (now, goal))
        a, b, a_goal, b_goal = (
            now.alpha / c,
            now.sigma / c,
            goal.alpha / c_goal,
            goal.sigma / c_goal,
        )
        ahead = b > b_goal
        rate = torch.where(ahead, (a_goal - a) / torch.where(ahead, b_goal - b, 1.0), 0.0)
        # a level below the goal stays where it is
        c_goal, b_goal = torch.where(ahead, c_goal, c), torch.where(ahead, b_goal, b)
        return _Line(process, goal, a, b, b_goal, rate, c, c_goal)

    def select(self, index: Tensor) -> _Line:
        """Take rows."""
        tensors = (self.a_now, self.b_now, self.b_goal, self.rate, self.scale_now, self.scale_goal)
        return _Line(self.process, self.goal.select(index), *(tensor[index] for tensor in tensors))

    def level(self, b: Tensor) -> Level:
        """Return the levels at places ``(B,)``."""
        a = self.a_now + self.rate * (b - self.b_now)
        return self.process.level(self.process.time_of(torch.log(a) - torch.log(b)))

    def slope(self, rows: _Rows, index: Tensor) -> Tensor:
        """Return dz / db of rows where they stand."""
        clean, noise = rows.taken("clean", index), rows.taken("noise", index)
        return on(self.rate[index], clean) * clean + noise

    def ask(
        self, model: Denoiser, state: State, index: Tensor, level: Level, z: Tensor
    ) -> Prediction:
        """Ask the network about z of the rows ``index`` of a state; this line has their rows."""
        x = z * on(self.process.straight_scale(level.alpha, level.sigma), z)
        return model(x, level, state.cond.select(index), take_rows(state.pending, index))


@dataclass
class _Rows:
    """Where particles stand between two levels."""

    z: Tensor
    clean: Tensor
    noise: Tensor
    b: Tensor
    length: Tensor
    spent: Tensor
    cost: Tensor
    memory: Any

    def taken(self, name: str, index: Tensor) -> Tensor:
        rows: Tensor = getattr(self, name)
        return rows[index.to(rows.device)]

    def put(self, index: Tensor, kept: Tensor, z: Tensor, clean: Tensor, noise: Tensor) -> None:
        """Write the rows ``kept`` of new values to ``index``."""
        to, rows = index.to(z.device), kept.to(z.device)
        self.z = self.z.index_copy(0, to, z[rows])
        self.clean = self.clean.index_copy(0, to, clean[rows])
        self.noise = self.noise.index_copy(0, to, noise[rows])


def root_mean_square(x: Tensor) -> Tensor:
    """Return the root mean square of each row ``(B,)``, float64 on the CPU.

    Rows are summed by halves, so that the bits of a row do not depend on the others.
    """
    squares = x.detach().double().square().flatten(1)
    count = squares.shape[1]
    while squares.shape[1] > 1:
        if squares.shape[1] % 2:
            squares = torch.nn.functional.pad(squares, (0, 1))
        half = squares.shape[1] // 2
        squares = squares[:, :half] + squares[:, half:]
    return (squares[:, 0] / count).sqrt().cpu()


def _factor(ratio: Tensor) -> Tensor:
    """Return what a step size is multiplied with: 0.9 / ratio^(1/5), within [0.2 or 1, 10]."""
    least = torch.where(ratio < 1.0, 1.0, 0.2).to(ratio)
    return torch.maximum(0.9 / ratio**0.2, least).clamp_max(10.0)
