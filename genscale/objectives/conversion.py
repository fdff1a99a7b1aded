"""Between what a network predicts and the pair (clean, noise), for x_t = alpha x_0 + sigma eps.

Four parameterisations are in use; each is linear in (x_0, eps), so any of them and x_t determine
both. Coefficients broadcast against x (see :func:`genscale.objectives.base.on`).

| target | definition | of |
|---|---|---|
| ``epsilon`` | eps | DDPM, arXiv:2006.11239 |
| ``x0`` | x_0 | |
| ``v`` | alpha eps - sigma x_0 | arXiv:2202.00512, appendix D |
| ``velocity`` | eps - x_0 | rectified flow, arXiv:2209.03003 |
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Target = Literal["epsilon", "x0", "v", "velocity"]


def clean_from_noise(x: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return x_0 = (x - sigma eps) / alpha; needs alpha > 0."""
    return (x - sigma * noise) / alpha


def noise_from_clean(x: Tensor, clean: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return eps = (x - alpha x_0) / sigma; needs sigma > 0."""
    return (x - alpha * clean) / sigma


def target_of(target: Target, clean: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return what the network is trained to predict, shaped as ``clean``."""
    if target == "epsilon":
        return noise
    if target == "x0":
        return clean
    if target == "v":
        return alpha * noise - sigma * clean
    return noise - clean


def clean_and_noise(
    target: Target, prediction: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the estimates (clean, noise) that a prediction means at x.

    They satisfy x = alpha clean + sigma noise. ``epsilon`` needs alpha > 0, ``x0`` sigma > 0; the
    other two are defined at every level.
    """
    if target == "epsilon":
        return clean_from_noise(x, prediction, alpha, sigma), prediction
    if target == "x0":
        return prediction, noise_from_clean(x, prediction, alpha, sigma)
    if target == "v":
        # alpha^2 + sigma^2 is 1 on variance-preserving processes only
        square = alpha * alpha + sigma * sigma
        return (alpha * x - sigma * prediction) / square, (sigma * x + alpha * prediction) / square
    total = alpha + sigma  # 1 on the linear flow
    return (x - sigma * prediction) / total, (x + alpha * prediction) / total
