"""Fidelity and diversity from nearest-neighbour balls.

Improved precision and recall (arXiv:1904.06991), density and coverage (arXiv:2002.09797).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genscale.errors import DataError
from genscale.metrics.moments import check_features
from genscale.metrics.neighbours import inside_blocks, nearest_squared


@dataclass(frozen=True, slots=True)
class FidelityDiversity:
    """Shares of points inside the other set's balls.

    Attributes:
        precision: share of fakes inside any real ball.
        recall: share of reals inside any fake ball.
        density: mean number of real balls a fake lies in, over k; can exceed 1.
        coverage: share of real balls that hold a fake.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def squared_ball_radii(features: Tensor, k: int) -> Tensor:
    """Return ``(n,)`` squared distances to the k-th nearest neighbour in the own set.

    The point itself is no neighbour, its exact copies are.
    """
    return nearest_squared(features, features, k, exclude_self=True)[0][:, -1]


def ball_radii(features: Tensor, k: int) -> Tensor:
    """Return ``(n,)`` float64 distances to the k-th nearest neighbour in the own set."""
    return squared_ball_radii(check_features(features), k).sqrt()


def fidelity_diversity(
    real: Tensor, fake: Tensor, *, num_neighbours: int = 3, strict: bool = False
) -> FidelityDiversity:
    """Compute precision, recall, density and coverage in one pass, in bounded memory.

    Args:
        real: ``(n, d)`` features of data.
        fake: ``(m, d)`` features of samples.
        num_neighbours: k of the balls; 3 in the published ImageNet protocol, 5 is usual for
            density and coverage.
        strict: inside means distance < radius (the prdc program) instead of <= (the ADM suite).
            The two differ only where distances tie, as with duplicated pictures.

    Raises:
        DataError: if a set is not finite or the dimensions differ.
        ConfigError: if a set has no more than k rows.
    """
    real = check_features(real, "real features")
    fake = check_features(fake, "sample features").to(real.device)
    if real.shape[1] != fake.shape[1]:
        raise DataError(
            f"The real set has {real.shape[1]} features and the samples {fake.shape[1]}. "
            "Compare features of one network."
        )
    real_radii = squared_ball_radii(real, num_neighbours)
    fake_radii = squared_ball_radii(fake, num_neighbours)
    fake_inside = torch.zeros(len(fake), dtype=torch.bool, device=real.device)
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    total = torch.zeros((), dtype=torch.int64, device=real.device)
    for rows, columns, inside in inside_blocks(fake, real, real_radii, strict=strict):
        fake_inside[rows] |= inside.any(dim=1)
        covered[columns] |= inside.any(dim=0)
        total += inside.sum()
    real_inside = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, _, inside in inside_blocks(real, fake, fake_radii, strict=strict):
        real_inside[rows] |= inside.any(dim=1)
    return FidelityDiversity(
        precision=_share(fake_inside),
        recall=_share(real_inside),
        density=int(total) / (num_neighbours * len(fake)),
        coverage=_share(covered),
    )


def _share(flags: Tensor) -> float:
    return int(flags.sum()) / len(flags)
