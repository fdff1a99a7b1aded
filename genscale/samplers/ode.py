"""Deterministic one-step solvers of the probability-flow equation: Euler and Heun."""

from __future__ import annotations

import torch
from torch import Tensor

from genscale.objectives.base import Denoiser, Level, on
from genscale.samplers.base import State
from genscale.samplers.grid import GridSampler


def euler_step(clean: Tensor, noise: Tensor, then: Level) -> Tensor:
    """Return alpha' clean + sigma' noise, the Euler step of every process.

    On a flow it is x + (sigma' - sigma)(noise - clean); on VE and VP processes it is Euler in
    y = x / alpha by s = sigma / alpha, where dy/ds = noise. Both equal DDIM with eta 0
    (arXiv:2010.02502), and neither divides by alpha, which is 0 at a flow's start.
    """
    return on(then.alpha, clean) * clean + on(then.sigma, clean) * noise


class Euler(GridSampler):
    """First order, one evaluation a step; see :func:`euler_step`."""

    def _move(self, model: Denoiser, state: State, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        _, then = self._between(state)
        clean, eps = _estimates(state)
        return euler_step(clean, eps, then), torch.zeros_like(state.nfe)


class Heun(GridSampler):
    """Second order: an Euler step, then the mean of the slopes at both ends (arXiv:2206.00364).

    Two evaluations a step; the last step, which ends at the clean level, is plain Euler, so N
    steps cost 2 N - 1. The second evaluation belongs to ``advance``. It is integrated where paths
    are straight: x itself on a flow, x / alpha on VE and VP processes (algorithm 1 of the paper,
    without churn).
    """

    def nfe(self, i: int, j: int) -> int:
        """Network evaluations from step i to step j: 2 a step, 1 for the last of all."""
        self._check_range(i, j)
        return 2 * (j - i) - int(i < j == self.num_steps)

    def _move(self, model: Denoiser, state: State, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        now, then = self._between(state)
        clean, eps = _estimates(state)
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
        """Replace the slope of the step that led to ``x`` by its mean with the slope at ``x``."""
        clean, eps = _estimates(state)
        end = model(x, then, state.cond, state.pending)
        scale_now, scale_then = (
            model.process.straight_scale(level.alpha, level.sigma) for level in (now, then)
        )
        # x / scale = a clean + b eps with (a, b) on a straight line: half the change of each
        half_a = 0.5 * scale_then * (then.alpha / scale_then - now.alpha / scale_now)
        half_b = 0.5 * scale_then * (then.sigma / scale_then - now.sigma / scale_now)
        x = x + on(half_a, x) * (end.clean - clean) + on(half_b, x) * (end.noise - eps)
        return x, end.cost


def _estimates(state: State) -> tuple[Tensor, Tensor]:
    if state.clean is None or state.noise is None:
        raise ValueError("The state is not evaluated. Call sampler.evaluate first.")
    return state.clean, state.noise
