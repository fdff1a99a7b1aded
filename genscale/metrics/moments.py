"""Streaming mean and covariance of features, float64, merged exactly over batches and processes.

The pairwise update of Chan, Golub and LeVeque (1979) keeps sums of *centred* products, so features
with a large common offset lose no digits; raw sums of squares in float32 lose all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genscale.errors import DataError


def as_float64(values: Tensor) -> Tensor:
    """Return ``values`` in float64, on their own device (on the CPU where that has no float64)."""
    if values.device.type == "mps":
        values = values.cpu()
    return values.detach().to(torch.float64)


def check_features(features: Tensor, what: str = "features") -> Tensor:
    """Return ``features`` in float64 after checking that they are a finite ``(n, d)`` matrix.

    Raises:
        DataError: if the shape is not ``(n, d)``, there are no rows, or values are not finite.
    """
    if features.dim() != 2 or features.shape[0] == 0 or features.shape[1] == 0:
        raise DataError(
            f"The {what} must be a matrix of shape (n, d) with at least one row, but have shape "
            f"{tuple(features.shape)}. Give one row a picture."
        )
    features = as_float64(features)
    finite = torch.isfinite(features).all(dim=1)
    if not bool(finite.all()):
        raise DataError(
            f"{int((~finite).sum())} of {len(features)} rows of the {what} hold NaN or infinity "
            f"(first: row {int((~finite).nonzero()[0])}). Look for broken pictures or weights."
        )
    return features


@dataclass(slots=True)
class Moments:
    """Count, mean and scatter of a set of feature vectors.

    Attributes:
        count: number of vectors n.
        mean: ``(d,)`` float64.
        scatter: ``(d, d)`` float64, the sum of outer products of centred vectors (n - 1 times the
            unbiased covariance).
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def empty(cls, dim: int, device: torch.device | str = "cpu") -> Moments:
        """Return the moments of no vectors of dimension ``dim``."""
        return cls(
            0,
            torch.zeros(dim, dtype=torch.float64, device=device),
            torch.zeros(dim, dim, dtype=torch.float64, device=device),
        )

    @classmethod
    def of(cls, features: Tensor, chunk_size: int = 8192) -> Moments:
        """Return the moments of ``features`` ``(n, d)``, read ``chunk_size`` rows at a time."""
        device = "cpu" if features.device.type == "mps" else features.device
        moments = cls.empty(features.shape[1], device)
        for chunk in features.split(chunk_size):
            moments.update(chunk)
        return moments

    @property
    def dim(self) -> int:
        """Length d of a vector."""
        return len(self.mean)

    def update(self, features: Tensor) -> None:
        """Add the rows of ``features`` ``(k, d)`` in place."""
        rows = len(features)
        if rows == 0:
            return
        features = as_float64(features).to(self.mean.device)
        batch_mean = features.mean(dim=0)
        centred = features - batch_mean
        delta = batch_mean - self.mean
        total = self.count + rows
        self.scatter.addmm_(centred.T, centred)
        self.scatter.addr_(delta, delta, alpha=self.count * rows / total)
        self.mean.add_(delta, alpha=rows / total)
        self.count = total

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets together; neither operand changes."""
        if self.dim != other.dim:
            raise DataError(
                f"Moments of {self.dim} and {other.dim} features cannot be merged. "
                "Use one feature network for both."
            )
        total = self.count + other.count
        if total == 0:
            return Moments.empty(self.dim, self.mean.device)
        mean, scatter = other.mean.to(self.mean.device), other.scatter.to(self.mean.device)
        delta = mean - self.mean
        weight = self.count * other.count / total
        return Moments(
            total,
            self.mean + delta * (other.count / total),
            self.scatter + scatter + weight * torch.outer(delta, delta),
        )

    def covariance(self, *, unbiased: bool = True) -> Tensor:
        """Return the covariance ``(d, d)``: divisor n - 1, or n with ``unbiased=False``.

        Raises:
            DataError: with fewer than two vectors, of which there is no covariance.
        """
        if self.count < 2:
            raise DataError(
                f"A covariance needs at least 2 samples, but {self.count} were given. "
                "Generate more samples."
            )
        return self.scatter / (self.count - 1 if unbiased else self.count)
