"""Has a model learnt the data by heart? Nearest neighbours in the training set."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genscale.errors import DataError
from genscale.metrics.moments import check_features
from genscale.metrics.neighbours import nearest_squared

_COPY_QUANTILE = 0.01
_MEMORIZATION_THRESHOLD = 0.1


@dataclass(frozen=True, slots=True)
class Novelty:
    """Distances to the nearest training picture: samples against unseen real pictures.

    Attributes:
        median: median distance of the samples.
        heldout_median: median distance of the held-out pictures.
        ratio: the first over the second; well below 1 speaks of copying.
        threshold: the 1 % quantile of the held-out distances.
        copy_rate: share of samples closer to a training picture than the threshold. Independent
            samples of the data's law would give 0.01.
    """

    median: float
    heldout_median: float
    ratio: float
    threshold: float
    copy_rate: float


def nearest_distances(features: Tensor, train: Tensor) -> Tensor:
    """Return ``(n,)`` float64 distances to the nearest row of ``train``."""
    features = check_features(features)
    train = check_features(train, "training features").to(features.device)
    return nearest_squared(features, train, 1)[0][:, 0].sqrt()


def novelty(distances: Tensor, heldout_distances: Tensor) -> Novelty:
    """Compare distances of samples and of held-out pictures to the training set.

    Args:
        distances: ``(n,)`` from :func:`nearest_distances` of the samples.
        heldout_distances: ``(m,)`` of held-out pictures.

    Raises:
        DataError: if half of the held-out pictures are themselves copies of training pictures.
    """
    distances, heldout = distances.cpu(), heldout_distances.cpu()
    threshold = heldout.quantile(_COPY_QUANTILE)
    median, heldout_median = float(distances.quantile(0.5)), float(heldout.quantile(0.5))
    if heldout_median == 0:
        raise DataError(
            "Half of the held-out pictures or more are exact copies of training pictures, so they "
            "are no yardstick of novelty. Give a split without duplicates."
        )
    return Novelty(
        median=median,
        heldout_median=heldout_median,
        ratio=median / heldout_median,
        threshold=float(threshold),
        copy_rate=float((distances < threshold).double().mean()),
    )


def memorization_distance(samples: Tensor, train: Tensor) -> float:
    """Return the mean over samples of the smallest cosine distance 1 - |cos| to a training row.

    Rows of zeros, which have no direction, are left out.
    """
    unit = []
    for features in (check_features(samples), check_features(train, "training features")):
        features = features[(features != 0).any(dim=1)]
        unit.append(features / features.norm(dim=1, keepdim=True))
    nearest = [
        1.0 - (rows @ unit[1].to(rows.device).T).abs().max(dim=1).values
        for rows in unit[0].split(2048)
    ]
    return float(torch.cat(nearest).mean())


def memorization_informed(distance: float, memorization: float) -> float:
    """Return MiFID: a Frechet distance divided by the memorization distance where that is < 0.1."""
    if distance <= 1e-8:
        return 0.0
    if memorization < _MEMORIZATION_THRESHOLD:
        return distance / (memorization + 1e-14)
    return distance
