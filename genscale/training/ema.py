"""Exponential moving averages of weights: how much of the old average a step keeps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import nn

from genscale.errors import ConfigError


class EMA(ABC):
    """A law of decay; the average itself is a frozen copy of the model, a submodule of the run."""

    @abstractmethod
    def decay_at(self, step: int) -> float:
        """Return the share of the old average kept at optimizer step ``step`` (from 1)."""

    @torch.no_grad()
    def update(self, average: nn.Module, model: nn.Module, step: int) -> None:
        """Move ``average`` towards ``model``; the average stays float32 (DESIGN: never bfloat16).

        One fused call over the local shards of all parameters; buffers are copied.
        """
        weight = 1.0 - self.decay_at(step)
        targets = [p.detach() for p in average.parameters()]
        sources = [p.detach() for p in model.parameters()]
        torch._foreach_lerp_(
            targets, [s.to(t.dtype) for s, t in zip(sources, targets, strict=True)], weight
        )
        for target, source in zip(average.buffers(), model.buffers(), strict=True):
            target.copy_(source)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstantEMA(EMA):
    """A constant decay, optionally warmed up so that the start of training is forgotten.

    Args:
        decay: share kept a step, in [0, 1); 0 makes the average equal the weights.
        warmup: use min(decay, (1 + n) / (10 + n)) at step n.
    """

    decay: float = 0.9999
    warmup: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay < 1.0:
            raise ConfigError(
                f"ema.decay must be in [0, 1), but {self.decay} was given. "
                "Give e.g. ema.decay=0.999."
            )

    def decay_at(self, step: int) -> float:
        """Return the decay of step ``step``."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerEMA(EMA):
    """A power-function profile whose length is a share of the training so far (arXiv:2312.02696).

    Args:
        sigma_rel: relative width of the profile, in (0, 0.28): 0.05 and 0.10 are usual.
    """

    sigma_rel: float = 0.05

    def __post_init__(self) -> None:
        if not 0.0 < self.sigma_rel < 0.28:
            raise ConfigError(
                f"ema.sigma_rel must be in (0, 0.28), but {self.sigma_rel} was given. "
                "Give e.g. ema.sigma_rel=0.05."
            )

    @property
    def gamma(self) -> float:
        """Exponent of the profile: sigma_rel^2 = (g + 1) / ((g + 2)^2 (g + 3)), solved for g."""
        low, high = 0.0, 1e9
        target = self.sigma_rel**2
        for _ in range(200):
            middle = 0.5 * (low + high) if high < 1e6 else math.sqrt((low + 1) * high)
            width = (middle + 1) / ((middle + 2) ** 2 * (middle + 3))
            low, high = (middle, high) if width > target else (low, middle)
        return 0.5 * (low + high)

    def decay_at(self, step: int) -> float:
        """Return beta = (1 - 1/n)^(gamma + 1)."""
        return (1.0 - 1.0 / step) ** (self.gamma + 1.0) if step > 1 else 0.0
