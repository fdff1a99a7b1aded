"""Frechet distance between Gaussians fitted to features (FID, arXiv:1706.08500), exact and safe.

FD = |m_1 - m_2|^2 + tr S_1 + tr S_2 - 2 tr (S_1 S_2)^(1/2). The last trace is the sum of the
singular values of A_1 A_2^T for any factors with S_i = A_i^T A_i; the routes differ in the factors:

- ``cholesky``: S_1 = L L^T, then the roots of the eigenvalues of L^T S_2 L. The fastest; needs one
  covariance of full rank.
- ``eigen``: the same with the symmetric root of S_1. Always applicable.
- ``singular``: singular values of the product of both symmetric roots. The most accurate one for
  small eigenvalues that starts from covariances.
- ``features``: A_i are the centred features themselves. Exact for sets smaller than the dimension,
  where covariances have lost their rank.

Everything is computed in float64 on the CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from genscale.errors import ConfigError, DataError
from genscale.metrics.moments import Moments, check_features
from genscale.rng import Purpose, key, permutation

Route = Literal["cholesky", "eigen", "singular", "features"]
_ROUTES = ("auto", "cholesky", "eigen", "singular")

# Below this ratio of the smallest to the largest pivot a Cholesky factor has lost the small
# directions to rounding (about d * 2^-53 for d = 2048).
_SMALLEST_PIVOT_RATIO = 1e-12
# A distance this far below zero, relative to the traces, is no rounding but wrong statistics.
_NEGATIVE_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class FrechetResult:
    """A Frechet distance with its parts.

    Attributes:
        value: the distance, never negative.
        mean_term: |m_1 - m_2|^2.
        covariance_term: what the covariances contribute.
        route: how the trace of the root was computed.
    """

    value: float
    mean_term: float
    covariance_term: float
    route: Route


def frechet_distance(mean_1: Tensor, cov_1: Tensor, mean_2: Tensor, cov_2: Tensor) -> float:
    """Return the Frechet distance of two Gaussians; see :func:`compare_gaussians`.

    Args:
        mean_1: ``(d,)``.
        cov_1: ``(d, d)``.
        mean_2: ``(d,)``.
        cov_2: ``(d, d)``.
    """
    return compare_gaussians(mean_1, cov_1, mean_2, cov_2).value


def compare_gaussians(
    mean_1: Tensor,
    cov_1: Tensor,
    mean_2: Tensor,
    cov_2: Tensor,
    *,
    route: Literal["auto", "cholesky", "eigen", "singular"] = "auto",
) -> FrechetResult:
    """Compare two Gaussians given by their moments.

    Args:
        mean_1: ``(d,)``.
        cov_1: ``(d, d)`` covariance; its symmetric part is used.
        mean_2: ``(d,)``.
        cov_2: ``(d, d)``.
        route: how to take the root; ``auto`` takes ``cholesky`` where a covariance is of full
            rank (the better conditioned one is factored), else ``singular``.

    Raises:
        DataError: if shapes do not fit, values are not finite, or the distance comes out clearly
            negative, which only matrices that are no covariances do.
        ConfigError: if ``route`` is unknown, or ``cholesky`` is forced on singular covariances.
    """
    if route not in _ROUTES:
        raise ConfigError(f"route='{route}' is unknown. Choose one of {', '.join(_ROUTES)}.")
    mean_1, cov_1 = _check_gaussian(mean_1, cov_1, "first")
    mean_2, cov_2 = _check_gaussian(mean_2, cov_2, "second")
    if mean_1.shape != mean_2.shape:
        raise DataError(
            f"The first Gaussian has {len(mean_1)} features and the second {len(mean_2)}. "
            "Compare statistics of one feature network."
        )
    # a feature that is constant in one set adds nothing to the root, but would cost the rank
    alive = (cov_1.diagonal() > 0) & (cov_2.diagonal() > 0)
    if bool(alive.all()):
        root_trace, taken = _root_trace(cov_1, cov_2, route)
    else:
        rows = alive.nonzero().flatten()
        root_trace, taken = _root_trace(cov_1[rows][:, rows], cov_2[rows][:, rows], route)
    traces = float(cov_1.trace()), float(cov_2.trace())
    return _assemble(mean_1, mean_2, traces, root_trace, taken)


def frechet_distance_from_features(features_1: Tensor, features_2: Tensor) -> float:
    """Return the Frechet distance of two feature sets ``(n_1, d)`` and ``(n_2, d)``."""
    return compare_features(features_1, features_2).value


def compare_features(
    features_1: Tensor, features_2: Tensor, *, unbiased: bool = True
) -> FrechetResult:
    """Compare two feature sets, exactly also where a set has no more vectors than dimensions.

    Args:
        features_1: ``(n_1, d)``, any float type.
        features_2: ``(n_2, d)``.
        unbiased: covariances have the divisor n - 1; otherwise n, as FVD programs have it.

    Raises:
        DataError: if a set is not finite, has fewer than 2 rows, or the dimensions differ.
    """
    features_1 = check_features(features_1, "first features").cpu()
    features_2 = check_features(features_2, "second features").cpu()
    if features_1.shape[1] != features_2.shape[1]:
        raise DataError(
            f"The first set has {features_1.shape[1]} features and the second "
            f"{features_2.shape[1]}. Compare features of one network."
        )
    if min(len(features_1), len(features_2)) < 2:
        raise DataError(
            f"A Frechet distance needs at least 2 samples a side, but {len(features_1)} and "
            f"{len(features_2)} were given. Generate more samples."
        )
    if min(len(features_1), len(features_2)) > features_1.shape[1]:
        moments_1, moments_2 = Moments.of(features_1), Moments.of(features_2)
        return compare_gaussians(
            moments_1.mean,
            moments_1.covariance(unbiased=unbiased),
            moments_2.mean,
            moments_2.covariance(unbiased=unbiased),
        )
    mean_1, mean_2 = features_1.mean(dim=0), features_2.mean(dim=0)
    less = 1 if unbiased else 0
    factor_1 = (features_1 - mean_1) / math.sqrt(len(features_1) - less)
    factor_2 = (features_2 - mean_2) / math.sqrt(len(features_2) - less)
    traces = float(factor_1.square().sum()), float(factor_2.square().sum())
    singular = torch.linalg.svdvals(_shorten(factor_1) @ _shorten(factor_2).T)
    return _assemble(mean_1, mean_2, traces, float(singular.sum()), "features")


def _shorten(factor: Tensor) -> Tensor:
    """Replace A ``(n, d)`` by a factor of A^T A with at most d rows (the R of its QR)."""
    if factor.shape[0] <= factor.shape[1]:
        return factor
    return torch.linalg.qr(factor, mode="r").R


def _check_gaussian(mean: Tensor, cov: Tensor, which: str) -> tuple[Tensor, Tensor]:
    if mean.dim() != 1 or cov.shape != (len(mean), len(mean)):
        raise DataError(
            f"The {which} Gaussian has a mean of shape {tuple(mean.shape)} and a covariance of "
            f"shape {tuple(cov.shape)}, but (d,) and (d, d) were expected."
        )
    mean = mean.detach().cpu().to(torch.float64)
    cov = cov.detach().cpu().to(torch.float64)
    if not bool(torch.isfinite(mean).all() & torch.isfinite(cov).all()):
        raise DataError(
            f"The {which} Gaussian holds NaN or infinity. "
            "Look for broken pictures or a damaged statistics file."
        )
    return mean, (cov + cov.T) / 2


def _assemble(
    mean_1: Tensor, mean_2: Tensor, traces: tuple[float, float], root_trace: float, route: Route
) -> FrechetResult:
    mean_term = float((mean_1 - mean_2).square().sum())
    covariance_term = traces[0] + traces[1] - 2.0 * root_trace
    value = mean_term + covariance_term
    if not math.isfinite(value) or value < -_NEGATIVE_TOLERANCE * max(1.0, sum(traces)):
        raise DataError(
            f"The Frechet distance came out as {value:.6g} (means {mean_term:.6g}, traces "
            f"{traces[0]:.6g} and {traces[1]:.6g}, root trace {root_trace:.6g}, route {route}), "
            "but must not be negative: one covariance is no covariance. Recompute the statistics."
        )
    return FrechetResult(max(value, 0.0), mean_term, covariance_term, route)


def _root_trace(cov_1: Tensor, cov_2: Tensor, route: str) -> tuple[float, Route]:
    """Return tr (S_1 S_2)^(1/2) and the route taken."""
    if len(cov_1) == 0:
        return 0.0, "singular"
    if route in ("auto", "cholesky"):
        factors = [_cholesky(cov_1), _cholesky(cov_2)]
        best = 0 if factors[0][1] >= factors[1][1] else 1
        factor, ratio = factors[best]
        if ratio >= _SMALLEST_PIVOT_RATIO:
            other = cov_2 if best == 0 else cov_1
            return _sum_of_roots(factor.T @ other @ factor), "cholesky"
        if route == "cholesky":
            raise ConfigError(
                f"route='cholesky' needs a covariance of full rank, but the pivot ratio is "
                f"{ratio:.1e}. Use route='auto'."
            )
    if route == "eigen":
        root = _factor(cov_1)
        return _sum_of_roots(root @ cov_2 @ root.T), "eigen"
    return float(torch.linalg.svdvals(_factor(cov_1) @ _factor(cov_2).T).sum()), "singular"


def _cholesky(cov: Tensor) -> tuple[Tensor, float]:
    """Return the Cholesky factor and the ratio of its extreme squared pivots (0 if it fails)."""
    factor, info = torch.linalg.cholesky_ex(cov)
    if int(info) != 0:
        return factor, 0.0
    pivots = factor.diagonal().square()
    return factor, float(pivots.min() / pivots.max())


def _factor(cov: Tensor) -> Tensor:
    """Return A with A^T A = S from the eigenvalues of S, negative ones set to zero."""
    values, vectors = torch.linalg.eigh(cov)
    return values.clamp(min=0).sqrt()[:, None] * vectors.T


def _sum_of_roots(product: Tensor) -> float:
    """Return the sum of the roots of the eigenvalues of a positive semi-definite matrix."""
    values = torch.linalg.eigvalsh((product + product.T) / 2)
    return float(values.clamp(min=0).sqrt().sum())


@dataclass(frozen=True, slots=True)
class FrechetInfinity:
    """An extrapolation to infinitely many samples.

    Attributes:
        value: the intercept of the line through FD over 1/n.
        slope: its slope, the bias constant of FD in 1/n.
        sizes: the sample sizes measured.
        distances: the distance at each size.
    """

    value: float
    slope: float
    sizes: tuple[int, ...]
    distances: tuple[float, ...]


def frechet_infinity(
    features: Tensor,
    mean: Tensor,
    cov: Tensor,
    *,
    num_points: int = 15,
    smallest: int | None = None,
    seed: int = 0,
) -> FrechetInfinity:
    """Extrapolate the Frechet distance to infinitely many samples (arXiv:1911.07023).

    FD is biased upwards by about c / n. It is measured on ``num_points`` sample sizes, linearly
    spaced between ``smallest`` and n, on keyed random subsets without replacement; the intercept of
    the least-squares line over 1/n is reported.

    Args:
        features: ``(n, d)`` of the samples.
        mean: ``(d,)`` of the reference.
        cov: ``(d, d)`` of the reference.
        num_points: number of sizes, at least 2.
        smallest: the smallest size; the default is min(5000, n / 10), at least 2.
        seed: key of the subsets.

    Raises:
        ConfigError: if the sizes leave no line to fit.
    """
    features = check_features(features)
    count = len(features)
    smallest = max(2, min(5000, count // 10)) if smallest is None else smallest
    if num_points < 2 or not 2 <= smallest < count:
        raise ConfigError(
            f"frechet_infinity needs at least 2 sizes between 2 and n, but num_points="
            f"{num_points}, smallest={smallest} and n={count} were given. Generate more samples."
        )
    sizes = torch.linspace(smallest, count, num_points).round().long().tolist()
    distances = []
    for number, size in enumerate(sizes):
        rows = permutation(key(seed, number, Purpose.SUBSET), count)[:size]
        moments = Moments.of(features[rows.to(features.device)])
        distances.append(frechet_distance(moments.mean, moments.covariance(), mean, cov))
    design = torch.tensor([[1.0, 1.0 / size] for size in sizes], dtype=torch.float64)
    target = torch.tensor(distances, dtype=torch.float64)[:, None]
    intercept, slope = torch.linalg.lstsq(design, target).solution[:, 0].tolist()
    return FrechetInfinity(intercept, slope, tuple(sizes), tuple(distances))
