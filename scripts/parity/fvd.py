"""Frechet distances of video features, with the biased covariance that FVD programs use."""

from __future__ import annotations

import torch
from torch import Tensor

from genscale.metrics.frechet import frechet_distance
from genscale.metrics.moments import Moments
from scripts.parity import Case, Comparison


def run(case: Case) -> list[Comparison]:
    moments = {side: Moments.of(features) for side, features in case.group("input").items()}
    ours: dict[str, Tensor] = {}
    for side, value in moments.items():
        ours[f"mu_{side}"] = value.mean
        ours[f"cov_{side}"] = value.covariance(unbiased=False)
    distance = frechet_distance(
        ours["mu_real"], ours["cov_real"], ours["mu_fake"], ours["cov_fake"]
    )
    ours["fvd"] = torch.tensor(distance, dtype=torch.float64)
    return [
        case.compare(name, ours[name].reshape(expected.shape), expected)
        for name, expected in case.group("output").items()
    ]
