"""FVD and KVD of clip features, with the error that the choice of samples makes.

All features are kept (2048 x 400 numbers are 3 MB), so resampling costs next to nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genscale.metrics.frechet import compare_features
from genscale.metrics.kid import kernel_distance_full, polynomial_kernel
from genscale.metrics.moments import as_float64
from genscale.rng import Purpose, integers, key

_RESAMPLES = 32  # the relative error of a standard error from k draws is about 1 / sqrt(2 k)
_NORMAL_95 = 1.96
_BLOCK_ROWS = 2048


@dataclass(frozen=True, slots=True)
class VideoDistance:
    """A distance of two sets of clips.

    Attributes:
        value: the distance of the sets as they are.
        std: standard error over other samples of the same model, the reference staying as it is;
            infinite where there are too few to tell.
        route: how the trace of the root was computed; empty for kernel distances.
    """

    value: float
    std: float
    route: str = ""

    @property
    def interval(self) -> tuple[float, float]:
        """The value less and plus 1.96 standard errors."""
        return self.value - _NORMAL_95 * self.std, self.value + _NORMAL_95 * self.std

    def details(self) -> dict[str, Any]:
        """Return what stands beside the number in reports."""
        if not math.isfinite(self.std):
            return {}
        low, high = self.interval
        told: dict[str, Any] = {"std": self.std, "low": low, "high": high}
        return told | {"route": self.route} if self.route else told


def frechet_video(
    samples: Tensor, real: Tensor, *, unbiased: bool = False, seed: int = 0
) -> VideoDistance:
    """Return FVD (arXiv:1812.01717): the Frechet distance of clip features.

    The standard error is that of keyed bootstrap draws of the samples. Their mean is no estimate
    of anything: a draw repeats clips, and so has the bias of a smaller set.

    Args:
        samples: ``(n, d)`` features of generated clips.
        real: ``(m, d)`` features of real clips.
        unbiased: covariances with the divisor n - 1. Published programs divide by n.
        seed: key of the draws.

    Raises:
        DataError: if a set is not finite, has fewer than 2 rows, or the dimensions differ.
    """
    result = compare_features(samples, real, unbiased=unbiased)
    count, drawn = len(samples), []
    for number in range(_RESAMPLES):
        rows = integers(key(seed, number, torch.arange(count), Purpose.SUBSET), count)
        resampled = samples[rows.to(samples.device)]
        drawn.append(compare_features(resampled, real, unbiased=unbiased).value)
    std = float(torch.tensor(drawn, dtype=torch.float64).std())
    return VideoDistance(result.value, std, result.route)


def kernel_video(samples: Tensor, real: Tensor) -> VideoDistance:
    """Return KVD: the unbiased squared MMD with k(x, y) = (x . y / d + 1)^3, of all rows.

    It may be negative. The standard error is the jackknife's over the samples, whose leave-one-out
    values follow from the row sums of the kernel.

    Args:
        samples: ``(n, d)`` features of generated clips.
        real: ``(m, d)`` features of real clips.

    Raises:
        DataError: if a set is not finite, has fewer than 2 rows, or the dimensions differ.
    """
    value = kernel_distance_full(samples, real)
    n, m = len(samples), len(real)
    if n < 3:
        return VideoDistance(value, math.inf)
    x, y = as_float64(samples).cpu(), as_float64(real).cpu()
    own = _row_sums(x, x) - _diagonal(x)
    cross = _row_sums(x, y)
    within = (own.sum() - 2.0 * own) / ((n - 1) * (n - 2))
    between = (cross.sum() - cross) / ((n - 1) * m)
    without = within - 2.0 * between  # what the reference adds is the same in all of them
    variance = (n - 1) / n * (without - without.mean()).square().sum()
    return VideoDistance(value, float(variance.sqrt()))


def _row_sums(x: Tensor, y: Tensor) -> Tensor:
    """Return ``(n,)`` sums of k(x_i, y_j) over j."""
    parts = [
        torch.stack([polynomial_kernel(rows, part).sum(1) for part in y.split(_BLOCK_ROWS)]).sum(0)
        for rows in x.split(_BLOCK_ROWS)
    ]
    return torch.cat(parts)


def _diagonal(x: Tensor) -> Tensor:
    return (x.square().sum(1) / x.shape[1] + 1.0).pow(3)
