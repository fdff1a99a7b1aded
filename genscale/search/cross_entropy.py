"""The cross-entropy method over noises: draw from a normal law, fit it to the best draws."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from genscale import rng
from genscale.errors import ConfigError
from genscale.rng import Purpose


@dataclass(frozen=True, slots=True)
class CrossEntropy:
    """Settings of the cross-entropy method (Rubinstein 1999) with independent elements.

    The law begins as that of noise, N(0, 1), and moves part of the way to mean and variance of the
    best noises of each round. What is drawn from it is rescaled to the norm of the standard normal
    numbers it was made of: models expect noises of such norms, and a mean that grows, or a spread
    that shrinks, would leave them.

    Args:
        elite: share of a round that the law is fitted to, in (0, 1]; at least one noise.
        rate: part of the way, in (0, 1].
        least_std: no element's spread falls below it, so that the search never stands still.

    Raises:
        ConfigError: numbers out of range.
    """

    elite: float = 0.25
    rate: float = 0.5
    least_std: float = 0.1

    def __post_init__(self) -> None:
        if not (0.0 < self.elite <= 1.0 and 0.0 < self.rate <= 1.0 and self.least_std > 0.0):
            raise ConfigError(
                "search.method.elite and search.method.rate must lie in (0, 1] and least_std be "
                f"positive, but they are {self.elite}, {self.rate} and {self.least_std}."
            )

    @property
    def label(self) -> str:
        """The name and everything that changes its results."""
        numbers = f"elite {self.elite:g}, rate {self.rate:g}, least std {self.least_std:g}"
        return f"CrossEntropy({numbers})"

    def begin(self, first: Tensor, seed: int) -> CrossEntropyRun:
        """Begin one prompt's optimisation; see :class:`~genscale.search.ask_tell.Method`."""
        return CrossEntropyRun(self, torch.zeros_like(first), torch.ones_like(first), seed)


@dataclass(slots=True)
class CrossEntropyRun:
    """One prompt's optimisation.

    Attributes:
        settings: see there.
        mean: of the law, ``(K, ...)``: K noises of each sample; see
            :class:`~genscale.search.ask_tell.Method`.
        variance: of the law.
        seed: of all draws.
        asked: noises so far.
    """

    settings: CrossEntropy
    mean: Tensor
    variance: Tensor
    seed: int
    asked: int = 0

    def ask(self, count: int) -> Tensor:
        """Draw noises ``(count, K, ...)``."""
        numbers = torch.arange(self.asked, self.asked + count)
        self.asked += count
        keys = rng.key(self.seed, numbers, Purpose.NEIGHBOUR).to(self.mean.device)
        unit = rng.normal(keys, tuple(self.mean.shape)).to(self.mean.dtype)
        drawn = self.mean + self.variance.sqrt() * unit
        wanted, found = (torch.linalg.vector_norm(x.flatten(2), dim=2) for x in (unit, drawn))
        ratio: Tensor = wanted / found  # (count, K)
        return drawn * ratio.view(*ratio.shape, *([1] * (self.mean.dim() - 1)))

    def tell(self, noises: Tensor, scores: Tensor) -> None:
        """Move the law towards the best of these noises."""
        count = max(1, math.floor(self.settings.elite * len(noises)))
        order = torch.argsort(scores, descending=True, stable=True)[:count]
        best = noises[order.to(noises.device)]
        self.mean = torch.lerp(self.mean, best.mean(0), self.settings.rate)
        spread = best.var(0, correction=0)
        self.variance = torch.lerp(self.variance, spread, self.settings.rate).clamp(
            min=self.settings.least_std**2
        )
