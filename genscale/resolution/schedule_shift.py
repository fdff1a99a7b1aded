"""Noisier schedules for larger pictures, in which the same noise hides less."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genscale.objectives.time_sampler import shifted
from genscale.resolution.base import Sides, linear_factor


def size_shift(time: Tensor, native: Sides, target: Sides) -> Tensor:
    """Move flow times (1 is noise) by a = sqrt(N' / N): a t / (1 + (a - 1) t).

    Args:
        time: in [0, 1].
        native: height and width in training.
        target: height and width now.
    """
    return shifted(time, linear_factor(native, target))


def token_shift(
    time: Tensor,
    tokens: int,
    *,
    low: tuple[int, float] = (256, 0.5),
    high: tuple[int, float] = (4096, 1.15),
) -> Tensor:
    """Move flow times (1 is noise) by FLUX's rule, e^mu / (e^mu + 1 / t - 1).

    Args:
        time: in [0, 1].
        tokens: of the picture; mu is linear in them.
        low: tokens and mu of one point of that line.
        high: of another.
    """
    slope = (high[1] - low[1]) / (high[0] - low[0])
    return shifted(time, math.exp(low[1] + slope * (tokens - low[0])))


def shifted_level(alpha: Tensor, sigma: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Lower the log signal-to-noise ratio by 2 log s and keep alpha^2 + sigma^2.

    Averaging s x s cells of the larger picture then has the trained ratio (arXiv:2301.11093).

    Args:
        alpha: signal coefficients.
        sigma: noise coefficients, of the same shape.
        scale: s, the side over the trained side.
    """
    length = torch.hypot(alpha, sigma)
    noisier = torch.hypot(alpha, sigma * scale)
    return alpha * length / noisier, sigma * scale * length / noisier
