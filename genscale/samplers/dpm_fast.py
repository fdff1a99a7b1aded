"""DPM-Solver++, single-step, in the "fast" arrangement of orders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from genscale.errors import ConfigError
from genscale.objectives.base import Denoiser, Level, on
from genscale.objectives.schedule import NoiseProcess
from genscale.samplers.base import State
from genscale.samplers.grid import GridSampler, Precision
from genscale.samplers.schedules import Linear, level_grid


class DPMSolverFast(GridSampler):
    """Single-step DPM-Solver++ of orders up to 3 with a given number of evaluations.

    Data prediction (arXiv:2211.01095) on the arrangement of arXiv:2206.00927, appendix D.4: the
    times from ``t_max`` to the process's ``t_min`` are uniform, one an evaluation, and a step of
    order k spans k of them, its inner times being grid times. Orders are 3, 3, ... and whatever
    makes the sum come out. It ends at ``t_min``, without a last denoising step, as in the
    published evaluations of U-ViT (50 evaluations) and DiMR (250).

    A step that begins at pure noise (alpha 0, on flows) cannot be taken in log SNR: there the
    first interval is a step of order 1 and the rest one of order k - 1, at the same cost.

    Args:
        steps: evaluations N; a step of the sampler is a solver step, so there are fewer.
        order: highest order, 1 to 3.
        schedule: ``"linear"``: the arrangement of orders asks for it.
        shift: see :class:`~genscale.samplers.grid.GridSampler`.
        precision: see there.

    Raises:
        ConfigError: an unknown name or an impossible number.
    """

    def __init__(
        self,
        steps: int = 50,
        *,
        order: Literal[1, 2, 3] = 3,
        schedule: Literal["linear"] = "linear",
        shift: float = 1.0,
        precision: Precision = "float32",
    ) -> None:
        if schedule != "linear":
            raise ConfigError(
                f"sampler.schedule must be linear for dpm_fast, but is {schedule!r}. Use "
                "sampler=dpmpp_2m for other schedules."
            )
        super().__init__(steps, schedule=schedule, shift=shift, precision=precision)
        if order not in (1, 2, 3):
            raise ConfigError(
                f"sampler.order must be 1, 2 or 3, but is {order}. The published models use 3."
            )
        self.order = order
        self.orders = torch.tensor(_orders(steps, order), device="cpu")
        self.places = torch.nn.functional.pad(self.orders.cumsum(0), (1, 0))

    @property
    def num_steps(self) -> int:
        """Number of solver steps."""
        return len(self.orders)

    def nfe(self, i: int, j: int) -> int:
        """Network evaluations from solver step i to j: the sum of the orders."""
        self._check_range(i, j)
        return int(self.places[j] - self.places[i])

    def grid(self, process: NoiseProcess) -> Level:
        """Return the levels of all evaluations, and the last one, where sampling ends."""
        return level_grid(process, Linear(self.shift, end=process.t_min), self.intervals)

    def _place(self, step: Tensor) -> Tensor:
        return self.places[step]

    def _move(self, model: Denoiser, state: State, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        begin, _ = self._between(state)
        # rows whose steps have the same form go together
        form = self.orders[state.step] * 2 + (begin.alpha == 0).expand(len(state))
        kinds = form.unique().tolist()
        if len(kinds) == 1:
            return self._step(model, state)
        x, cost = state.x, torch.zeros_like(state.nfe)
        for kind in kinds:
            index = (form == kind).nonzero()[:, 0]
            part, spent = self._step(model, state.select(index))
            x = x.index_copy(0, index.to(x.device), part)
            cost = cost.index_copy(0, index, spent)
        return x, cost

    def _step(self, model: Denoiser, state: State) -> tuple[Tensor, Tensor]:
        """Take one step of rows whose steps have one order."""
        order = int(self.orders[state.step[0]])
        step = state.step if state.shared_step is None else state.step[:1]
        grid = self.grid(model.process)
        levels = [grid.select(self.places[step] + j) for j in range(order + 1)]
        cost = torch.zeros_like(state.nfe)

        def denoise(x: Tensor, level: Level) -> Tensor:
            prediction = model(x, level, state.cond, state.pending)
            cost.add_(prediction.cost)
            return prediction.clean

        if state.clean is None:
            raise ValueError("The state is not evaluated. Call sampler.evaluate first.")
        return solve(state.x, state.clean, levels, denoise), cost


def solve(
    x: Tensor, clean: Tensor, levels: list[Level], denoise: Callable[[Tensor, Level], Tensor]
) -> Tensor:
    """Take one DPM-Solver++ step through ``levels``, of order ``len(levels) - 1``.

    Algorithms 1 and 2 of arXiv:2206.00927 (appendix) in data prediction; lambda is the level's
    ``log_snr``, h its change over the step, r_j the share of it up to inner level j.

    Args:
        x: ``(B, ...)`` at the first level.
        clean: clean estimate there.
        levels: begin, inner levels, end.
        denoise: clean estimate at an inner level; called ``order - 1`` times.
    """
    begin, end = levels[0], levels[-1]
    if len(levels) == 2:
        return _first_order(x, clean, begin, end)
    inner = _first_order(x, clean, begin, levels[1])
    if bool((begin.alpha == 0).any()):
        return solve(inner, denoise(inner, levels[1]), levels[1:], denoise)
    h = end.log_snr - begin.log_snr
    decay = torch.expm1(-h)
    r1 = (levels[1].log_snr - begin.log_snr) / h
    change = denoise(inner, levels[1]) - clean
    if len(levels) == 3:
        slope = -end.alpha * decay / (2.0 * r1)
        return _first_order(x, clean, begin, end) + on(slope, x) * change
    middle = levels[2]
    part = middle.log_snr - begin.log_snr  # r2 h
    slope = part / h / r1 * middle.alpha * (torch.expm1(-part) / part + 1.0)
    inner = _first_order(x, clean, begin, middle) + on(slope, x) * change
    slope = h / part * end.alpha * (decay / h + 1.0)
    change = denoise(inner, middle) - clean
    return _first_order(x, clean, begin, end) + on(slope, x) * change


def _first_order(x: Tensor, clean: Tensor, begin: Level, end: Level) -> Tensor:
    """Return (sigma' / sigma) x - alpha' (e^-h - 1) clean; h is infinite from pure noise."""
    pull = -end.alpha * torch.expm1(begin.log_snr - end.log_snr)
    return on(end.sigma / begin.sigma, x) * x + on(pull, x) * clean


def _orders(evaluations: int, order: int) -> list[int]:
    """Return the orders of the solver steps; they sum to ``evaluations``."""
    full, rest = divmod(evaluations, order)
    if rest == 0 and order == 3:
        # the published arrangement ends 2, 1: low orders are safer close to the data
        return [3] * (full - 1) + [2, 1]
    return [order] * full + [rest] * (rest > 0)
