"""Learning-rate schedules, counted in optimizer steps: factors of the peak rate."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from genscale.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule(ABC):
    """Linear warm-up over ``warmup_steps``, then what the subclass says.

    Args:
        warmup_steps: steps until the peak rate; step n of them uses (n + 1) / warmup_steps.
    """

    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ConfigError(
                f"lr_schedule.warmup_steps must be 0 or more, but {self.warmup_steps} was given."
            )

    @abstractmethod
    def after_warmup(self, step: int, max_steps: int) -> float:
        """Return the factor of optimizer step ``step`` (from 0) of ``max_steps``."""

    def factor(self, step: int, max_steps: int) -> float:
        """Return the factor of the peak learning rate used by optimizer step ``step``."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return self.after_warmup(step, max_steps)

    def build(self, optimizer: Optimizer, max_steps: int) -> LambdaLR:
        """Attach the schedule to an optimizer; step it once an optimizer step."""
        return LambdaLR(optimizer, lambda step: self.factor(step, max_steps))


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant(Schedule):
    """Constant after the warm-up."""

    def after_warmup(self, step: int, max_steps: int) -> float:
        """Return 1."""
        return 1.0


def _half_cosine(progress: float, final: float) -> float:
    """Fall from 1 at progress 0 to ``final`` at progress 1 and stay there."""
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cosine(Schedule):
    """Half a cosine from the end of the warm-up to ``max_steps``.

    Args:
        final_scale: factor at the end.
    """

    final_scale: float = 0.0

    def after_warmup(self, step: int, max_steps: int) -> float:
        """Return the cosine factor."""
        span = max(max_steps - self.warmup_steps, 1)
        return _half_cosine((step - self.warmup_steps) / span, self.final_scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmupStableDecay(Schedule):
    """Constant, then half a cosine over the last part of the run (arXiv:2405.18392).

    Args:
        decay_fraction: share of ``max_steps`` spent decaying, in (0, 1].
        final_scale: factor at the end.
    """

    decay_fraction: float = 0.2
    final_scale: float = 0.0

    def after_warmup(self, step: int, max_steps: int) -> float:
        """Return 1 until the decay begins, then the cosine factor."""
        length = max(self.decay_fraction * max_steps, 1.0)
        return _half_cosine((step - (max_steps - length)) / length, self.final_scale)
