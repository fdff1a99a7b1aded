"""The variational bound by which DDPM networks learn their variance (arXiv:2102.09672)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genscale.objectives.base import on
from genscale.objectives.schedule import DiscreteVP

_BIN = 1.0 / 255.0  # half the width of an 8-bit value in [-1, 1]


def variational_bound(
    clean: Tensor,
    x: Tensor,
    estimate: Tensor,
    variance: Tensor,
    process: DiscreteVP,
    time: Tensor,
) -> Tensor:
    """Return the bound's term of one step, in bits per dimension (eq. 5 to 7 and 15).

    KL(q(x_{n-1} | x_n, x_0) || p(x_{n-1} | x_n)), and at n = 1 the likelihood of 8-bit values
    under a discretised normal, which improved diffusion uses for latents too.

    Args:
        clean: ``(B, ...)`` data x_0.
        x: noisy data x_n.
        estimate: clean estimate; detached by the caller, so that only the variance learns.
        variance: the network's v, -1 the lower bound of the log variance and 1 the upper one.
        process: with whole steps n.
        time: ``(B,)`` n / N.

    Returns:
        ``(B,)`` float32.
    """
    total = process.num_timesteps
    step = (time.double() * total).round()
    alpha, sigma = process.coefficients(step / total)
    alpha_before, sigma_before = process.coefficients((step - 1.0) / total)
    beta = 1.0 - (alpha / alpha_before) ** 2
    # the posterior of the first step has no variance: it borrows that of the second
    borrowed = step.clamp_min(2.0)
    lower = _posterior_variance(process, borrowed / total, (borrowed - 1.0) / total)
    low, high = on(lower.log(), x), on(beta.log(), x)
    share = 0.5 * (variance.float() + 1.0)
    log_variance = share * high + (1.0 - share) * low

    to_clean = on(alpha_before * beta / sigma**2, x)
    to_x = on(torch.sqrt(1.0 - beta) * sigma_before**2 / sigma**2, x)
    mean, true_mean = to_clean * estimate + to_x * x, to_clean * clean + to_x * x
    divergence = 0.5 * (
        log_variance
        - low
        - 1.0
        + torch.exp(low - log_variance)
        + (true_mean - mean).square() * torch.exp(-log_variance)
    )
    likelihood = -discretised_log_likelihood(clean, mean, 0.5 * log_variance)
    first = on((step == 1.0).double(), x) > 0
    return torch.where(first, likelihood, divergence).flatten(1).mean(1) / math.log(2.0)


def discretised_log_likelihood(data: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Return the log probability of 8-bit values in [-1, 1] under a normal, elementwise.

    Values are bins of width 2 / 255; the lowest and highest reach to infinity. The distribution
    function is the usual tanh approximation.
    """
    scale = torch.exp(-log_std)
    above = _normal_cdf(scale * (data - mean + _BIN))
    below = _normal_cdf(scale * (data - mean - _BIN))
    inside = (above - below).clamp_min(1e-12).log()
    lowest = above.clamp_min(1e-12).log()
    highest = (1.0 - below).clamp_min(1e-12).log()
    return torch.where(data < -0.999, lowest, torch.where(data > 0.999, highest, inside))


def _posterior_variance(process: DiscreteVP, time: Tensor, before: Tensor) -> Tensor:
    alpha, sigma = process.coefficients(time)
    alpha_before, sigma_before = process.coefficients(before)
    return (1.0 - (alpha / alpha_before) ** 2) * (sigma_before / sigma) ** 2


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
