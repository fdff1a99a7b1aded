"""Runge-Kutta methods in the process's own time: how flow and SiT papers integrate."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from genscale.errors import ConfigError, did_you_mean
from genscale.objectives.base import Denoiser, Level, on
from genscale.objectives.schedule import NoiseProcess
from genscale.samplers.base import State
from genscale.samplers.grid import GridSampler, Precision, Schedule, estimates

Method = Literal["euler", "midpoint", "heun", "rk4", "dopri5"]
LastStep = Literal["full", "euler"]


class Tableau(NamedTuple):
    """A Butcher tableau.

    Attributes:
        nodes: places of the stages after the first, as shares of the step.
        rows: weights of the earlier slopes, a row each.
        weights: weights of all slopes in the step.
    """

    nodes: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


TABLEAUS: dict[str, Tableau] = {
    "euler": Tableau((), (), (1.0,)),
    "midpoint": Tableau((0.5,), ((0.5,),), (0.0, 1.0)),
    "heun": Tableau((1.0,), ((1.0,),), (0.5, 0.5)),
    # the 3/8 rule, of order 4 with a smaller error than the classical one
    "rk4": Tableau(
        (1 / 3, 2 / 3, 1.0),
        ((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
        (1 / 8, 3 / 8, 3 / 8, 1 / 8),
    ),
    # the order-5 half of Dormand and Prince's pair (1980), here with fixed steps
    "dopri5": Tableau(
        (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0),
        (
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        ),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
}


class RungeKutta(GridSampler):
    """Fixed steps of a Runge-Kutta method on dx/dt = alpha' clean + sigma' noise.

    The slope is the process's velocity in its own time t (arXiv:2401.08740, eq. 3). On the linear
    flow ``heun`` equals :class:`~genscale.samplers.ode.Heun`; on other processes paths bend in t,
    and solvers that integrate x / alpha are more accurate. A step of s stages costs s
    evaluations. Levels whose rates are infinite (t = 0 of VP processes) cannot be evaluated.

    Args:
        steps: N.
        method: ``"euler"``, ``"midpoint"``, ``"heun"``, ``"rk4"`` (the 3/8 rule) or ``"dopri5"``
            (of order 5, six stages).
        last: the last step: ``"full"`` takes the method's own, which evaluates the network where
            the grid ends, and at t = 0 asks for one that predicts a velocity; ``"euler"`` takes
            one Euler step.
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
        method: Method = "heun",
        last: LastStep = "euler",
        schedule: Schedule = "linear",
        shift: float = 1.0,
        precision: Precision = "float32",
    ) -> None:
        super().__init__(steps, schedule=schedule, shift=shift, precision=precision)
        for name, value, known in (
            ("method", method, get_args(Method)),
            ("last", last, get_args(LastStep)),
        ):
            if value not in known:
                raise ConfigError(
                    f"sampler.{name} must be one of {', '.join(known)}, but is {value!r}."
                    f"{did_you_mean(str(value), known)}"
                )
        self.method = method
        self.last = last
        self.tableau = TABLEAUS[method]

    def check(self, process: NoiseProcess, *, learned_variance: bool) -> list[str]:
        """Also refuse to evaluate the slope where it is infinite."""
        problems = super().check(process, learned_variance=learned_variance)
        if problems or self.last == "euler":
            return problems
        end = process.time_at(self.grid(process))[-1:]
        if not all(bool(rate.isfinite().all()) for rate in process.rates(end)):
            problems.append(
                f"sampler.last=full takes the slope at time {float(end):g}, where that of "
                f"{type(process).__name__} is infinite. Use sampler.last=euler."
            )
        return problems

    def nfe(self, i: int, j: int) -> int:
        """Network evaluations from step i to step j: the stages, 1 for a last Euler step."""
        self._check_range(i, j)
        stages = len(self.tableau.weights)
        saved = stages - 1 if self.last == "euler" and i < j == self.num_steps else 0
        return stages * (j - i) - saved

    def _move(self, model: Denoiser, state: State, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.last == "full":
            return self._step(model, state, self.tableau)
        # rows that end the trajectory take an Euler step
        final = state.step == self.num_steps - 1
        if not bool(final.any()):
            return self._step(model, state, self.tableau)
        if bool(final.all()):
            return self._step(model, state, TABLEAUS["euler"])
        x, cost = state.x, torch.zeros_like(state.nfe)
        for mask, tableau in ((final, TABLEAUS["euler"]), (~final, self.tableau)):
            index = mask.nonzero()[:, 0]
            part, spent = self._step(model, state.select(index), tableau)
            x = x.index_copy(0, index.to(x.device), part)
            cost = cost.index_copy(0, index, spent)
        return x, cost

    def _step(self, model: Denoiser, state: State, tableau: Tableau) -> tuple[Tensor, Tensor]:
        process, x = model.process, state.x
        now, then = self._between(state)
        begin = process.time_at(now)
        length = process.time_at(then) - begin
        clean, eps = estimates(state)
        slopes = [slope_of(process, begin, clean, eps)]
        cost = torch.zeros_like(state.nfe)
        for node, row in zip(tableau.nodes, tableau.rows, strict=True):
            time = process.time_at(then) if node == 1.0 else begin + node * length
            there = x + on(length, x) * weighted(row, slopes)
            level: Level = process.level(time)
            out = model(there, level, state.cond, state.pending)
            cost = cost + out.cost
            slopes.append(slope_of(process, time, out.clean, out.noise))
        return x + on(length, x) * weighted(tableau.weights, slopes), cost


def slope_of(process: NoiseProcess, time: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    """Return the velocity alpha' clean + sigma' noise at times ``(B,)`` or ``(1,)``."""
    alpha_rate, sigma_rate = process.rates(time)
    return on(alpha_rate, clean) * clean + on(sigma_rate, clean) * noise


def weighted(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    """Return the sum of slopes by their weights."""
    terms = [weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight != 0.0]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
