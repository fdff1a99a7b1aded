"""Small worlds in which searches can be checked: an exact denoiser, and rewards of few numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from genscale.conditioning.base import Conditioning
from genscale.objectives.base import Denoiser, Level, Prediction, on
from genscale.objectives.schedule import LinearFlow
from genscale.rewards.base import Request, Reward, RewardOutput
from genscale.samplers.base import Sampler
from genscale.samplers.sde import DDIM
from genscale.search.budget import Budget
from genscale.search.engine import Engine
from genscale.search.scorer import Scorer


class Gaussian(Denoiser):
    """Exact denoiser of x_0 ~ N(mean, std^2), the same in every pixel of a (1, 2, 2) picture."""

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        self.process = LinearFlow()
        self.sample_shape = (1, 2, 2)
        self.device = torch.device("cpu")
        self.mean, self.std = mean, std
        self.calls: list[int] = []  # rows of each call

    def __call__(
        self, x: Tensor, level: Level, cond: Conditioning, memory: Any = None
    ) -> Prediction:
        self.calls.append(len(x))
        alpha, sigma = on(level.alpha, x), on(level.sigma, x)
        variance = (alpha * self.std) ** 2 + sigma**2
        clean = self.mean + alpha * self.std**2 / variance * (x - alpha * self.mean)
        noise = (x - alpha * clean) / sigma
        return Prediction(clean, noise, None, torch.ones(len(x), dtype=torch.float64))


class Brightness(Reward):
    """The mean of a picture in [0, 1], or how near it is to a request's label over ten."""

    differentiable = True

    def score(self, images: Tensor, handle: tuple[Request, ...], index: Tensor) -> RewardOutput:
        mean = images.flatten(1).mean(1)
        asked = [handle[i].label for i in index.tolist()]
        if None not in asked:
            mean = -(mean - torch.tensor([float(label or 0) / 10 for label in asked])).abs()
        return RewardOutput(mean, {"brightness": mean})


class Engines:
    """Makes engines on the Gaussian world."""

    def __call__(
        self,
        *,
        prompts: int = 2,
        sampler: Sampler | None = None,
        model: Any = None,
        reward: Reward | None = None,
        held_out: dict[str, Reward] | None = None,
        budget: Budget | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
        cond: Conditioning | None = None,
        requests: list[Request] | None = None,
        **settings: Any,
    ) -> Engine:
        return Engine(
            sampler or DDIM(4, eta=1.0),
            model or Gaussian(),
            cond or Conditioning(),
            torch.arange(100, 100 + prompts),
            Scorer(decode or squash, reward or Brightness(), held_out),
            budget,
            requests=requests,
            **settings,
        )


def squash(latents: Tensor) -> Tensor:
    """Stand in for a decoder: pictures in (-1, 1)."""
    return torch.tanh(latents / math.sqrt(2.0))


@pytest.fixture
def engines() -> Engines:
    return Engines()
