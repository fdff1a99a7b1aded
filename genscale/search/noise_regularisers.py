"""How unlike a draw of unit-normal noise a noise is; what keeps optimised noises in their place."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genscale import rng
from genscale.rng import Purpose

_LOG_HALF = -math.log(2.0)


def norm_penalty(noise: Tensor) -> Tensor:
    """Return minus the log-density of the norm of D unit normals, up to a constant.

    |z|^2 / 2 - (D - 1) log|z| (ReNO, arXiv:2406.04312): least at |z| = sqrt(D - 1), where nearly
    all noise lies.

    Args:
        noise: ``(B, ...)`` of D elements each; computed in float32 at least.

    Returns:
        ``(B,)``.
    """
    flat = noise.flatten(1)
    flat = flat if flat.dtype == torch.float64 else flat.float()
    square = flat.square().sum(1)
    return 0.5 * square - 0.5 * (flat.shape[1] - 1) * torch.log(square)


def typicality_penalty(
    noise: Tensor, permutations: Tensor | None = None, *, block: int = 4
) -> Tensor:
    """Return how improbable mean and covariance of a noise's blocks are (arXiv:2405.18881).

    The elements are cut into n blocks of m. If they are unit normal, the mean M1 of the blocks and
    the error M2 of their covariance, a spectral norm, obey
    P(|mean| >= M1) <= p1 with log p1 = -n M1^2 / (2 m), and
    P(error >= M2) <= p2 with log p2 = -n max(sqrt(1 + M2) - 1 - sqrt(m / n), 0)^2 / 2.
    Either counts from 1/2 downwards. The penalty is -(log p1 + log p2), of the elements as they
    lie plus, in the mean, of their permutations: these see what blocks as they lie do not.

    Args:
        noise: ``(B, ...)`` of M elements each; computed in float32 at least.
        permutations: ``(P, M)`` int64, the same for all rows, or None for none.
        block: m; what is left of M after whole blocks is not looked at.

    Returns:
        ``(B,)``.

    Raises:
        ValueError: fewer elements than a block.
    """
    flat = noise.flatten(1)
    if flat.shape[1] < block:
        raise ValueError(
            f"Blocks of {block} elements were asked for, but a noise has {flat.shape[1]}. Use "
            "smaller blocks."
        )
    flat = flat if flat.dtype == torch.float64 else flat.float()
    penalty = _improbability(flat[:, None], block)[:, 0]
    if permutations is None or len(permutations) == 0:
        return penalty
    shuffled = flat[:, permutations.to(flat.device)]
    return penalty + _improbability(shuffled, block).mean(1)


def _improbability(flat: Tensor, block: int) -> Tensor:
    """Return -(log p1 + log p2) ``(B, P)`` of elements ``(B, P, M)``."""
    count = flat.shape[-1] // block
    blocks = flat[..., : count * block].reshape(*flat.shape[:-1], count, block)
    mean_square = blocks.mean(-2).square().sum(-1)
    error = blocks.mT @ blocks / count - torch.eye(block, dtype=flat.dtype, device=flat.device)
    spread = torch.linalg.eigvalsh(error).abs().amax(-1)  # symmetric: its spectral norm
    beyond = (torch.sqrt(1.0 + spread) - 1.0 - math.sqrt(block / count)).clamp(min=0.0)
    log_p1 = -count * mean_square / (2 * block)
    log_p2 = -count * beyond.square() / 2
    improbable: Tensor = -(log_p1.clamp(max=_LOG_HALF) + log_p2.clamp(max=_LOG_HALF))
    return improbable


def shuffles(count: int, elements: int, turn: int) -> Tensor:
    """Return ``(count, elements)`` int64 permutations; of each turn others, for all rows the same.

    They belong to no sample, so that they are the same whatever else is in a batch.
    """
    if count == 0:
        return torch.empty(0, elements, dtype=torch.int64)
    keys = [rng.key(turn, number, Purpose.SHUFFLE) for number in range(count)]
    return torch.stack([rng.permutation(each, elements) for each in keys])
