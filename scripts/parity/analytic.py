"""Denoisers that golden cases of samplers know in closed form."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from genscale.conditioning.base import Conditioning
from genscale.objectives.base import Denoiser, Level, Prediction, on
from genscale.objectives.schedule import NoiseProcess


class Analytic(Denoiser):
    """A variance-exploding denoiser seen on any process; records what it is asked.

    Attributes:
        sigmas: noise over signal of every call, ``(1,)`` each.
        inputs: x over alpha of every call.
        answers: clean estimates of every call.
    """

    def __init__(self, process: NoiseProcess, shape: tuple[int, ...]) -> None:
        self.process, self.sample_shape, self.device = process, shape, torch.device("cpu")
        self.sigmas: list[Tensor] = []
        self.inputs: list[Tensor] = []
        self.answers: list[Tensor] = []

    @abstractmethod
    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the clean estimate of x = x_0 + sigma eps, all float64."""

    def __call__(
        self, x: Tensor, level: Level, cond: Conditioning, memory: Any = None
    ) -> Prediction:
        """Answer as the variance-exploding denoiser does about x / alpha."""
        sigma = level.sigma / level.alpha
        y = x / on(level.alpha, x)
        clean = self.denoise(y.double(), on(sigma, y.double())).to(x.dtype)
        self.sigmas.append(sigma)
        self.inputs.append(y)
        self.answers.append(clean)
        noise = (x - on(level.alpha, x) * clean) / on(level.sigma, x)
        return Prediction(clean, noise, None, torch.ones(len(x), dtype=torch.float64))


class Gaussian(Analytic):
    """Data of independent normals: D = (s^2 x + sigma^2 mu) / (s^2 + sigma^2)."""

    def __init__(self, process: NoiseProcess, mean: Tensor, std: Tensor) -> None:
        super().__init__(process, tuple(mean.shape))
        self.mean, self.std = mean, std

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the posterior mean."""
        square = self.std**2
        return (square * x + sigma**2 * self.mean) / (square + sigma**2)


class Mixture(Analytic):
    """Data of a mixture of isotropic normals with means ``(K, D)``."""

    def __init__(
        self,
        process: NoiseProcess,
        shape: tuple[int, ...],
        means: Tensor,
        stds: Tensor,
        weights: Tensor,
    ) -> None:
        super().__init__(process, shape)
        self.means, self.stds, self.weights = means, stds, weights

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the posterior mean, with each component's own weighed by its probability."""
        flat = x.flatten(1)[:, None]  # (B, 1, D)
        square = sigma.view(-1, 1, 1) ** 2
        own = (self.stds**2)[None, :, None]
        v = own + square  # (B or 1, K, 1)
        distance = (flat - self.means).square().sum(2) / (2.0 * v[..., 0])
        log_p = self.weights.log() - distance - 0.5 * self.means.shape[1] * v[..., 0].log()
        estimates = (own * flat + square * self.means) / v
        return (log_p.softmax(1)[..., None] * estimates).sum(1).view_as(x)
