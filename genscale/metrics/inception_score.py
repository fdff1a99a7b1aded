"""Inception score (arXiv:1606.03498): exp of the mean KL of p(y|x) from p(y), over splits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genscale.errors import ConfigError
from genscale.metrics.moments import check_features


@dataclass(frozen=True, slots=True)
class InceptionScore:
    """An inception score.

    Attributes:
        mean: mean over the splits.
        std: population standard deviation over the splits.
    """

    mean: float
    std: float


def inception_score(logits: Tensor, *, num_splits: int = 10) -> InceptionScore:
    """Compute the inception score over contiguous splits, in float64 and in the given order.

    Published numbers use the 1008 logits of the FID Inception network *without* bias and 10 splits
    of 5,000 samples.

    Args:
        logits: ``(n, K)``.
        num_splits: number of splits; split i holds rows i n / s to (i + 1) n / s.

    Raises:
        ConfigError: if there are fewer rows than splits.
        DataError: if logits are not finite.
    """
    logits = check_features(logits, "logits")
    count = len(logits)
    if not 1 <= num_splits <= count:
        raise ConfigError(
            f"num_splits={num_splits} does not fit {count} samples. Give 1 to {count} splits."
        )
    log_p = torch.log_softmax(logits, dim=1)
    scores = []
    for split in range(num_splits):
        part = log_p[split * count // num_splits : (split + 1) * count // num_splits]
        p = part.exp()
        marginal = p.mean(dim=0).clamp(min=torch.finfo(torch.float64).tiny)
        divergence = (p * (part - marginal.log())).sum(dim=1)
        scores.append(divergence.mean().exp())
    values = torch.stack(scores)
    return InceptionScore(float(values.mean()), float(values.std(correction=0)))
