"""Kernel distances: KID (arXiv:1801.01401) and CMMD (arXiv:2401.09603), float64, blockwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from genscale.errors import ConfigError, DataError
from genscale.metrics.moments import check_features
from genscale.rng import Purpose, key, permutation

Kernel = Callable[[Tensor, Tensor], Tensor]

_BLOCK_ROWS = 2048  # a block of 2048 x 2048 kernel values takes 34 MB
CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0


@dataclass(frozen=True, slots=True)
class KernelDistance:
    """A KID estimate.

    Attributes:
        mean: mean over the subsets; may be negative, the estimator is unbiased.
        std: population standard deviation over the subsets.
        subsets: ``(num_subsets,)`` float64, the estimate of each subset.
        subset_size: rows of each side in a subset.
    """

    mean: float
    std: float
    subsets: Tensor
    subset_size: int


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Return k(x, y) = (x . y / d + 1)^3 for all pairs: ``(n, d), (m, d) -> (n, m)``."""
    return (x @ y.T / x.shape[1] + 1.0).pow_(3)


def gaussian_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Return exp(-|x - y|^2 / (2 sigma^2)) with sigma = 10 for all pairs."""
    squared = x.square().sum(1)[:, None] + y.square().sum(1)[None] - 2.0 * (x @ y.T)
    return torch.exp(squared.clamp_(min=0) * (-0.5 / CMMD_SIGMA**2))


def squared_mmd(x: Tensor, y: Tensor, kernel: Kernel, *, unbiased: bool) -> Tensor:
    """Return the squared maximum mean discrepancy of two sets, a float64 scalar tensor.

    Args:
        x: ``(n, d)`` float64.
        y: ``(m, d)`` float64; n and m may differ.
        kernel: pairs of rows to kernel values.
        unbiased: leave out the diagonals (U-statistic); otherwise they are kept (V-statistic).
    """
    n, m = len(x), len(y)
    sum_xx, sum_yy, sum_xy = (_kernel_sum(a, b, kernel) for a, b in ((x, x), (y, y), (x, y)))
    if unbiased:
        within_x = (sum_xx - _diagonal_sum(x, kernel)) / (n * (n - 1))
        within_y = (sum_yy - _diagonal_sum(y, kernel)) / (m * (m - 1))
    else:
        within_x, within_y = sum_xx / n**2, sum_yy / m**2
    return within_x + within_y - 2.0 * sum_xy / (n * m)


def _kernel_sum(x: Tensor, y: Tensor, kernel: Kernel) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for rows in x.split(_BLOCK_ROWS):
        for columns in y.split(_BLOCK_ROWS):
            total = total + kernel(rows, columns).sum()
    return total


def _diagonal_sum(x: Tensor, kernel: Kernel) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for rows in x.split(64):
        total = total + kernel(rows, rows).diagonal().sum()
    return total


def subset_indices(count: int, subset_size: int, num_subsets: int, *, key_of: Tensor) -> Tensor:
    """Draw ``(num_subsets, subset_size)`` row numbers without replacement within a subset."""
    keys = key(key_of, torch.arange(num_subsets))
    return torch.stack([permutation(each, count)[:subset_size] for each in keys])


def kernel_distance(
    features_1: Tensor,
    features_2: Tensor,
    *,
    subset_size: int = 1000,
    num_subsets: int = 100,
    seed: int = 0,
    indices: tuple[Tensor, Tensor] | None = None,
) -> KernelDistance:
    """Estimate KID: unbiased squared MMD with k = (x . y / d + 1)^3, averaged over subsets.

    Args:
        features_1: ``(n_1, d)``.
        features_2: ``(n_2, d)``.
        subset_size: rows of each side in a subset; at most min(n_1, n_2) are taken.
        num_subsets: number of subsets.
        seed: key of the subsets.
        indices: row numbers of each side, ``(num_subsets, subset_size)`` each, instead of drawing
            them.

    Raises:
        DataError: if a set is not finite or has fewer than 2 rows, or the dimensions differ.
        ConfigError: if subset_size < 2 or num_subsets < 1.
    """
    x, y = _check_pair(features_1, features_2)
    if subset_size < 2 or num_subsets < 1:
        raise ConfigError(
            f"KID needs subsets of at least 2 rows and at least one of them, but subset_size="
            f"{subset_size} and num_subsets={num_subsets} were given."
        )
    if indices is None:
        size = min(subset_size, len(x), len(y))
        indices = (
            subset_indices(len(x), size, num_subsets, key_of=key(seed, 1, Purpose.SUBSET)),
            subset_indices(len(y), size, num_subsets, key_of=key(seed, 2, Purpose.SUBSET)),
        )
    rows_1, rows_2 = indices[0].to(x.device), indices[1].to(y.device)
    values = torch.stack(
        [
            squared_mmd(x[first], y[second], polynomial_kernel, unbiased=True)
            for first, second in zip(rows_1, rows_2, strict=True)
        ]
    )
    mean = values.mean()
    std = (values - mean).square().mean().sqrt()
    return KernelDistance(float(mean), float(std), values, rows_1.shape[1])


def kernel_distance_full(features_1: Tensor, features_2: Tensor) -> float:
    """Return the unbiased squared MMD of all rows with the KID kernel: no subset noise."""
    x, y = _check_pair(features_1, features_2)
    return float(squared_mmd(x, y, polynomial_kernel, unbiased=True))


def cmmd(features_1: Tensor, features_2: Tensor) -> float:
    """Return CMMD: 1000 times the biased squared MMD of L2-normalised embeddings, sigma = 10.

    Args:
        features_1: ``(n_1, d)``, in the paper CLIP image embeddings.
        features_2: ``(n_2, d)``.

    Raises:
        DataError: if a set is not finite, has fewer than 2 rows or a row of zeros.
    """
    x, y = (_normalise(features) for features in _check_pair(features_1, features_2))
    return CMMD_SCALE * float(squared_mmd(x, y, gaussian_kernel, unbiased=False))


def _normalise(features: Tensor) -> Tensor:
    norm = features.norm(dim=1, keepdim=True)
    if not bool((norm > 0).all()):
        raise DataError(
            f"{int((norm == 0).sum())} embeddings are all zeros and have no direction. "
            "CMMD needs embeddings that can be scaled to length 1; look for broken pictures."
        )
    return features / norm


def _check_pair(features_1: Tensor, features_2: Tensor) -> tuple[Tensor, Tensor]:
    x = check_features(features_1, "first features")
    y = check_features(features_2, "second features").to(x.device)
    if x.shape[1] != y.shape[1]:
        raise DataError(
            f"The first set has {x.shape[1]} features and the second {y.shape[1]}. "
            "Compare features of one network."
        )
    if min(len(x), len(y)) < 2:
        raise DataError(
            f"A kernel distance needs at least 2 samples a side, but {len(x)} and {len(y)} were "
            "given. Generate more samples."
        )
    return x, y
