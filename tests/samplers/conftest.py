"""Denoisers that are known in closed form; samplers are tested on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from genscale.conditioning.base import Conditioning
from genscale.objectives.base import Denoiser, Level, Prediction, on
from genscale.objectives.schedule import NoiseProcess


class Mixture(Denoiser):
    """Exact denoiser of a mixture of isotropic Gaussians.

    With x | component k ~ N(alpha mu_k, v_k), v_k = alpha^2 s_k^2 + sigma^2, the clean estimate is
    sum_k p(k | x) (mu_k + alpha s_k^2 / v_k (x - alpha mu_k)).
    """

    def __init__(self, process: NoiseProcess, means: Tensor, stds: Tensor, weights: Tensor) -> None:
        self.process = process
        self.sample_shape = (means.shape[1],)
        self.device = torch.device("cpu")
        self.means, self.stds, self.weights = means.double(), stds.double(), weights.double()
        self.calls: list[int] = []  # rows of each call

    def __call__(
        self, x: Tensor, level: Level, cond: Conditioning, memory: Any = None
    ) -> Prediction:
        self.calls.append(len(x))
        y = x.double()[:, None]  # (B, 1, D)
        alpha, sigma = on(level.alpha, y), on(level.sigma, y)
        squares = (self.stds**2)[None, :, None]
        v = alpha**2 * squares + sigma**2
        off = y - alpha * self.means  # (B, K, D)
        log_p = (
            self.weights.log()
            - (off.square() / (2 * v)).sum(2)
            - 0.5 * (y.shape[2] * v.log()[..., 0])
        )
        estimates = self.means + alpha * squares / v * off
        clean = (log_p.softmax(1)[..., None] * estimates).sum(1)
        noise = (x.double() - alpha[:, 0] * clean) / sigma[:, 0]
        cost = torch.ones(len(x), dtype=torch.float64)
        return Prediction(clean.to(x.dtype), noise.to(x.dtype), None, cost)


class Rational(Denoiser):
    """A denoiser of additions, products and quotients only, which round alike in any batch.

    It sees its condition (a label shifts the estimate) and remembers: its memory is a running
    mean of its estimates, which enters the next one.
    """

    def __init__(self, process: NoiseProcess) -> None:
        self.process = process
        self.sample_shape = (2, 3)
        self.device = torch.device("cpu")
        self.calls: list[int] = []

    def __call__(
        self, x: Tensor, level: Level, cond: Conditioning, memory: Any = None
    ) -> Prediction:
        self.calls.append(len(x))
        alpha, sigma = on(level.alpha, x), on(level.sigma, x)
        mean = torch.zeros_like(x) if memory is None else memory["mean"][0]
        shift = 0.0 if cond.labels is None else 0.125 * cond.labels.view(-1, 1, 1).to(x.dtype)
        clean = (x * (alpha + 0.5) + shift) / (1 + x * x + sigma) + 0.25 * mean
        noise = (x - alpha * clean) / sigma
        return Prediction(
            clean,
            noise,
            {"mean": [0.5 * mean + 0.5 * clean]},
            torch.ones(len(x), dtype=torch.float64),
        )


@pytest.fixture
def mixture() -> Callable[[NoiseProcess], Mixture]:
    """Three unequal components in the plane."""
    means = torch.tensor([[-1.5, 0.0], [1.0, 1.0], [0.5, -1.2]])
    return lambda process: Mixture(
        process, means, torch.tensor([0.3, 0.5, 0.2]), torch.tensor([0.5, 0.3, 0.2])
    )


@pytest.fixture
def rational() -> Callable[[NoiseProcess], Rational]:
    return Rational
