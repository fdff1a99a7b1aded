"""Tempering: the strength of a reward grows along the trajectory, and how strong it should be."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from genscale.search.names import check_name
from genscale.search.resampling import effective_size

TemperingName = Literal["geometric", "linear", "adaptive"]
_HALVINGS = 60  # of an interval: float64 has no more to tell


def check_tempering(name: str | None) -> None:
    """Refuse a tempering that there is not.

    Raises:
        ConfigError: an unknown name.
    """
    check_name("search.tempering", name, get_args(TemperingName), optional=True)


def scheduled(name: TemperingName, fraction: float, gamma: float = 0.008) -> float:
    """Return the share of the full strength, in [0, 1], at a fraction of the trajectory.

    ``geometric`` is that of DAS (arXiv:2501.05803): min((1 + gamma)^i - 1, 1) at step i of 100,
    which gamma 0.008 brings to 1 near step 87. ``linear`` is the fraction itself.

    Args:
        name: ``geometric`` or ``linear``.
        fraction: of the steps taken, in [0, 1].
        gamma: growth in a hundredth of the trajectory.

    Raises:
        ValueError: ``adaptive``, which follows from the weights; see :func:`adapted`.
    """
    if name == "geometric":
        return min(math.pow(1.0 + gamma, 100.0 * fraction) - 1.0, 1.0)
    if name == "linear":
        return fraction
    raise ValueError("Adaptive tempering has no schedule. Call adapted with the weights.")


def adapted(
    log_weights: Tensor, slope: Tensor, least: Tensor, *, size: float
) -> tuple[Tensor, Tensor]:
    """Return the largest share in [least, 1] that keeps an effective sample size, by bisection.

    Weights at share s are exp(log_weights + s slope).

    Args:
        log_weights: ``(G, P)`` float64 at share 0; -inf is no weight.
        slope: ``(G, P)`` float64, finite: strength times reward.
        least: ``(G,)`` float64 where the search begins.
        size: effective sample size to keep.

    Returns:
        the share ``(G,)``, and whether the size kept it below 1 ``(G,)`` bool. Where ``least``
        is too much already, it stays.
    """

    def enough(share: Tensor) -> Tensor:
        return effective_size(log_weights + share[:, None] * slope) >= size

    one = torch.ones_like(least)
    whole = enough(one)
    low, high = least.clone(), torch.where(enough(least), one, least)
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        good = enough(middle)
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    return torch.where(whole, one, low), ~whole


def auto_strength(rewards: Tensor, share: float = 0.5) -> Tensor:
    """Return the strength at which N plain samples have an effective size of ``share`` N.

    Rewards come in any unit; this finds the lambda at which exp(lambda r) tells samples apart
    without leaving a single one.

    Args:
        rewards: ``(G, N)`` float64 of plain samples; -inf ones are left out.
        share: of the samples that should count, in (0, 1).

    Returns:
        ``(G,)`` float64; 0 where all rewards are equal. Where so many share the best reward that
        no strength is enough, the largest that was tried: 1e4 over the rewards' spread.
    """
    known = rewards > -torch.inf
    safe = torch.where(known, rewards, 0.0)
    count = known.sum(1).clamp(min=1)
    mean = safe.sum(1) / count
    off = torch.where(known, rewards - mean[:, None], 0.0)
    spread = (off.square().sum(1) / count).sqrt()
    unit = torch.where(spread > 0, 1.0 / spread, 0.0)
    base = torch.where(known, 0.0, -torch.inf)
    low, high = torch.zeros_like(spread), 1e4 * unit
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        good = effective_size(base + middle[:, None] * off) >= share * count
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    return torch.where(spread > 0, high, 0.0)
