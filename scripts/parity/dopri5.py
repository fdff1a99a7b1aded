"""parity: Dormand-Prince 5(4) as torchdiffeq steps it, with one error norm for the whole batch.

Step sizes, and so the samples, depend on the batch mates of a sample; that is why it is here and
not among the samplers. The last step goes beyond the end and is interpolated back.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from genscale.samplers.adaptive import ERROR_WEIGHTS
from genscale.samplers.runge_kutta import TABLEAUS

# weights of the slopes at the middle of the step (Shampine 1986)
_MIDDLE = (
    6025192743 / 30085553152 / 2,
    0.0,
    51252292925 / 65400821598 / 2,
    -2691868925 / 45128329728 / 2,
    187940372067 / 1594534317056 / 2,
    -1776094331 / 19743644256 / 2,
    11237099 / 235043384 / 2,
)


def integrate(
    slope: Callable[[float, Tensor], Tensor],
    y: Tensor,
    start: float,
    end: float,
    *,
    atol: float,
    rtol: float,
) -> Tensor:
    """Return y at ``end`` > ``start`` of dy/dt = slope(t, y)."""
    first = slope(start, y)
    length = _first_length(slope, y, first, start, atol, rtol)
    time = start
    while True:
        after, slopes = _step(slope, y, first, time, length)
        error = length * _sum(ERROR_WEIGHTS, slopes)
        scale = atol + rtol * torch.maximum(y.abs(), after.abs())
        ratio = _rms(error / scale)
        if ratio <= 1.0:
            if time + length >= end:
                return _interpolated(y, after, slopes, length, (end - time) / length)
            y, first, time = after, slopes[-1], time + length
        length *= _factor(ratio)


def _step(
    slope: Callable[[float, Tensor], Tensor], y: Tensor, first: Tensor, time: float, length: float
) -> tuple[Tensor, list[Tensor]]:
    tableau, slopes = TABLEAUS["dopri5"], [first]
    for node, row in zip(tableau.nodes, tableau.rows, strict=True):
        slopes.append(slope(time + node * length, y + length * _sum(row, slopes)))
    after = y + length * _sum(tableau.weights, slopes)
    slopes.append(slope(time + length, after))
    return after, slopes


def _first_length(
    slope: Callable[[float, Tensor], Tensor],
    y: Tensor,
    first: Tensor,
    time: float,
    atol: float,
    rtol: float,
) -> float:
    """Return a first step size (Hairer, Norsett and Wanner, section II.4)."""
    scale = atol + y.abs() * rtol
    size, speed = _rms(y / scale), _rms(first / scale)
    trial = 1e-6 if size < 1e-5 or speed < 1e-5 else 0.01 * size / speed
    bend = _rms((slope(time + trial, y + trial * first) - first) / scale) / trial
    if speed <= 1e-15 and bend <= 1e-15:
        second = max(1e-6, trial * 1e-3)
    else:
        second = (0.01 / max(speed, bend)) ** (1.0 / 5.0)
    return min(100.0 * trial, second)


def _factor(ratio: float) -> float:
    if ratio == 0.0:
        return 10.0
    least = 1.0 if ratio < 1.0 else 0.2
    return float(min(10.0, max(0.9 / ratio ** (1.0 / 5.0), least)))


def _interpolated(
    y: Tensor, after: Tensor, slopes: list[Tensor], length: float, place: float
) -> Tensor:
    """Return the quartic through both ends, their slopes, and the middle, at ``place``."""
    middle = y + length * _sum(_MIDDLE, slopes)
    first, last = length * slopes[0], length * slopes[-1]
    a = 2.0 * (last - first) - 8.0 * (after + y) + 16.0 * middle
    b = 5.0 * first - 3.0 * last + 18.0 * y + 14.0 * after - 32.0 * middle
    c = last - 4.0 * first - 11.0 * y - 5.0 * after + 16.0 * middle
    return (((a * place + b) * place + c) * place + first) * place + y


def _sum(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    terms = [weight * slope for weight, slope in zip(weights, slopes, strict=True)]
    return torch.stack(terms).sum(0)


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())
