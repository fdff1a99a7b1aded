"""Learning-rate schedules, counted in optimizer steps: factors of the peak rate."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from genscale.errors import ConfigError, did_you_mean


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
        return _Scheduler(optimizer, lambda step: self.factor(step, max_steps), max_steps)


class _Scheduler(LambdaLR):
    """Sets the learning rate, and the weight decay of groups in which it changes.

    Such a group says between which numbers: ``weight_decay_range``, of the first and the last
    step, with half a cosine between them.
    """

    def __init__(
        self, optimizer: Optimizer, factor: Callable[[int], float], max_steps: int
    ) -> None:
        self.max_steps = max_steps
        super().__init__(optimizer, factor)

    def step(self, epoch: int | None = None) -> None:
        """Go on to the next optimizer step."""
        super().step(epoch)
        for group in self.optimizer.param_groups:
            if "weight_decay_range" in group:
                first, last = group["weight_decay_range"]
                progress = self.last_epoch / max(self.max_steps - 1, 1)
                group["weight_decay"] = last + (first - last) * _half_cosine(progress, 0.0)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiStep(Schedule):
    """Constant, times ``gamma`` at every milestone, as recipes of super-resolution have it.

    Args:
        milestones: shares of a period at which the rate falls, rising, in (0, 1).
        gamma: factor at a milestone, in (0, 1].
        periods: equal parts of the run; each starts at the peak again.

    Raises:
        ConfigError: a number out of range.
    """

    milestones: Sequence[float] = (0.5, 0.75, 0.9)
    gamma: float = 0.5
    periods: int = 1

    def __post_init__(self) -> None:
        Schedule.__post_init__(self)
        marks = list(self.milestones)
        if marks != sorted(marks) or not all(0 < mark < 1 for mark in marks):
            raise ConfigError(
                "lr_schedule.milestones must be rising shares in (0, 1), but "
                f"{marks} was given. Give e.g. [0.5,0.75,0.9]."
            )
        if not 0 < self.gamma <= 1 or self.periods < 1:
            raise ConfigError(
                "lr_schedule.gamma must lie in (0, 1] and periods be at least 1, but "
                f"{self.gamma} and {self.periods} were given."
            )

    def after_warmup(self, step: int, max_steps: int) -> float:
        """Return gamma to the power of the milestones passed in this period."""
        length = max_steps / self.periods
        within = min(step, max_steps - 1) % length
        passed: int = sum(within >= mark * length for mark in self.milestones)
        return float(self.gamma**passed)


Shape = Literal["linear", "cosine", "exponential", "broken_linear"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Annealed(Schedule):
    """The schedules of VAR's program (arXiv:2404.02905): from a small rate up, flat, then down.

    Let p go from 0 at the end of the warm-up to 1 at the last step, ``max_steps - 1``. The rate is
    at its peak until p = ``flat_fraction`` and then falls to ``final_scale``, in p linearly, or as
    half a cosine or an exponential. ``"broken_linear"`` has no flat part: it is linear down to a
    knee at ``flat_fraction`` and linear from there to the end, the knee being halfway between the
    peak and a straight line; it goes with scales that are added during training.

    The program's words: ``lin0`` is the default here, ``lin`` has a flat part of 0.15, ``lin00``
    none; ``cos`` is a cosine without flat part, ``exp`` exponential with 0.15, ``lin0.8`` broken
    at 0.8.

    Args:
        initial_scale: factor at step 0 of the warm-up.
        shape: how the rate falls.
        flat_fraction: see above, in [0, 1).
        final_scale: factor at the last step, above 0 where it falls exponentially.

    Raises:
        ConfigError: a number out of range, or an unknown shape.
    """

    initial_scale: float = 0.005
    shape: Shape = "linear"
    flat_fraction: float = 0.05
    final_scale: float = 0.1

    def __post_init__(self) -> None:
        # slots make a class anew, which a super() without arguments does not find
        Schedule.__post_init__(self)
        if self.shape not in get_args(Shape):
            raise ConfigError(
                f"lr_schedule.shape must be one of {', '.join(get_args(Shape))}, but is "
                f"{self.shape!r}.{did_you_mean(str(self.shape), get_args(Shape))}"
            )
        if not 0 <= self.flat_fraction < 1 or (
            self.flat_fraction == 0 and self.shape == "broken_linear"
        ):
            raise ConfigError(
                "lr_schedule.flat_fraction must lie in [0, 1), above 0 for shape=broken_linear, "
                f"but is {self.flat_fraction}. VAR's lin0 has 0.05."
            )
        if self.final_scale < 0 or (self.final_scale == 0 and self.shape == "exponential"):
            raise ConfigError(
                "lr_schedule.final_scale must not be negative, and above 0 for shape=exponential, "
                f"but is {self.final_scale}. VAR's recipes have 0.1 and 0.01."
            )

    def factor(self, step: int, max_steps: int) -> float:
        """Return the factor of the peak learning rate used by optimizer step ``step``."""
        if step < self.warmup_steps:
            return self.initial_scale + (1 - self.initial_scale) * step / self.warmup_steps
        return self.after_warmup(step, max_steps)

    def after_warmup(self, step: int, max_steps: int) -> float:
        """Return the factor of a step that is past the warm-up."""
        progress = (step - self.warmup_steps) / max(max_steps - 1 - self.warmup_steps, 1)
        progress = min(progress, 1.0)
        flat, final = self.flat_fraction, self.final_scale
        left = (1 - progress) / (1 - flat)  # 1 where the rate begins to fall, 0 at the end
        if self.shape == "broken_linear":
            knee = 0.5 * (1 + final + (1 - final) * (1 - flat))
            if progress < flat:
                return 1 + (knee - 1) * progress / flat
            return final + (knee - final) * left
        if progress < flat:
            return 1.0
        if self.shape == "cosine":
            return _half_cosine(1 - left, final)
        if self.shape == "exponential":
            return math.exp((1 - left) * math.log(final))
        return final + (1 - final) * left
