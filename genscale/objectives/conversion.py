"""Between what a network predicts and the pair (clean, noise), for x_t = alpha x_0 + sigma eps.

Six parameterisations are in use; each is linear in (x_0, eps), so any of them and x_t determine
both. Coefficients broadcast against x (see :func:`genscale.objectives.base.on`).

| target | definition | of |
|---|---|---|
| ``epsilon`` | eps | DDPM, arXiv:2006.11239 |
| ``x0`` | x_0 | |
| ``v`` | alpha eps - sigma x_0 | arXiv:2202.00512, appendix D |
| ``velocity`` | alpha' x_0 + sigma' eps; eps - x_0 on the linear flow | arXiv:2401.08740 |
| ``score`` | -eps / sigma | arXiv:2011.13456 |
| ``edm`` | (x_0 - c_skip x_t / alpha) / c_out | EDM, arXiv:2206.00364, eq. 7 (alpha = 1) |

With an input scale k = ``sigma_in`` (arXiv:2402.14797) the target ``edm`` is that of the noise
s = sigma / (alpha k), of which the network is also told: EDM's target knows nothing of k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Target = Literal["epsilon", "x0", "v", "velocity", "score", "edm"]


@dataclass(frozen=True, slots=True)
class Extras:
    """What some targets need beside alpha and sigma.

    Attributes:
        rates: (alpha', sigma') by time, for ``velocity`` on other paths than the linear flow.
        sigma_data: standard deviation of the data, for ``edm``.
        sigma_in: what the data are divided by before noise s is added, for ``edm``.
    """

    rates: tuple[Tensor, Tensor] | None = None
    sigma_data: float = 0.5
    sigma_in: float = 1.0


_NONE = Extras()


def clean_from_noise(x: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return x_0 = (x - sigma eps) / alpha; needs alpha > 0."""
    return (x - sigma * noise) / alpha


def noise_from_clean(x: Tensor, clean: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return eps = (x - alpha x_0) / sigma; needs sigma > 0."""
    return (x - alpha * clean) / sigma


def target_of(
    target: Target,
    clean: Tensor,
    noise: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    extras: Extras = _NONE,
) -> Tensor:
    """Return what the network is trained to predict, shaped as ``clean``."""
    if target == "epsilon":
        return noise
    if target == "x0":
        return clean
    if target == "v":
        return alpha * noise - sigma * clean
    if target == "score":
        return -noise / sigma
    if target == "edm":
        # (x_0 - c_skip (x_0 + sigma eps)) / c_out with the difference taken on paper
        data, sigma = extras.sigma_data, sigma / alpha / extras.sigma_in
        return (sigma / data * clean - data * noise) / torch.sqrt(sigma**2 + data**2)
    if extras.rates is not None:
        return extras.rates[0] * clean + extras.rates[1] * noise
    return noise - clean


def clean_and_noise(
    target: Target,
    prediction: Tensor,
    x: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    extras: Extras = _NONE,
) -> tuple[Tensor, Tensor]:
    """Return the estimates (clean, noise) that a prediction means at x.

    They satisfy x = alpha clean + sigma noise. ``epsilon`` and ``score`` need alpha > 0, ``x0``
    sigma > 0; the others are defined at every level.
    """
    if target == "epsilon":
        return clean_from_noise(x, prediction, alpha, sigma), prediction
    if target == "x0":
        return prediction, noise_from_clean(x, prediction, alpha, sigma)
    if target == "v":
        # alpha^2 + sigma^2 is 1 on variance-preserving processes only
        square = alpha * alpha + sigma * sigma
        return (alpha * x - sigma * prediction) / square, (sigma * x + alpha * prediction) / square
    if target == "score":
        noise = -sigma * prediction
        return clean_from_noise(x, noise, alpha, sigma), noise
    if target == "edm":
        data, x, sigma = extras.sigma_data, x / alpha, sigma / alpha
        s = sigma / extras.sigma_in
        total = sigma * s + data**2
        part = data * torch.sqrt(s**2 + data**2) / total
        return data**2 / total * x + sigma * part * prediction, s / total * x - part * prediction
    if extras.rates is not None:
        alpha_rate, sigma_rate = extras.rates
        total = alpha * sigma_rate - sigma * alpha_rate
        clean = (sigma_rate * x - sigma * prediction) / total
        return clean, (alpha * prediction - alpha_rate * x) / total
    total = alpha + sigma  # 1 on the linear flow
    return (x - sigma * prediction) / total, (x + alpha * prediction) / total


def network_input(
    target: Target, x: Tensor, alpha: Tensor, sigma: Tensor, extras: Extras = _NONE
) -> Tensor:
    """Return what the network is fed for x: x itself, or c_in x of EDM (eq. 7)."""
    if target == "edm":
        return x / alpha / torch.sqrt((sigma / alpha) ** 2 + extras.sigma_data**2)
    return x
