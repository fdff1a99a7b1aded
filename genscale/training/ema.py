"""Exponential moving averages of weights: how much of the old average a step keeps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from genscale.errors import ConfigError, did_you_mean
from genscale.training.parallel import local_part

SnapshotDtype = Literal["float32", "float16"]


class EMA(ABC):
    """A law of decay; the average itself is a frozen copy of the model, a submodule of the run."""

    @abstractmethod
    def decay_at(self, step: int) -> float:
        """Return the share of the old average kept at optimizer step ``step`` (from 1)."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The public name of the average: ``ema_`` and its length, as protocols print it."""

    def laws(self) -> tuple[EMA, ...]:
        """Return the law of every average that is tracked, the main one first."""
        return (self,)

    @torch.no_grad()
    def update(self, average: nn.Module, model: nn.Module, step: int) -> None:
        """Move ``average`` towards ``model``; the average stays float32 (DESIGN: never bfloat16).

        One fused call over the local shards of all parameters, without communication; buffers
        are copied.
        """
        weight = 1.0 - self.decay_at(step)
        targets = [local_part(p.detach()) for p in average.parameters()]
        sources = [local_part(p.detach()) for p in model.parameters()]
        torch._foreach_lerp_(
            targets, [s.to(t.dtype) for s, t in zip(sources, targets, strict=True)], weight
        )
        for target, source in zip(average.buffers(), model.buffers(), strict=True):
            local_part(target).copy_(local_part(source))


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

    @property
    def name(self) -> str:
        """``ema_`` and the decay."""
        return f"ema_{self.decay}"


@dataclass(frozen=True, slots=True, kw_only=True)
class HalfLifeEMA(EMA):
    """A constant decay, said by the optimizer steps after which weights count half as much.

    Args:
        half_life: h in steps, above 0; the decay is 0.5^(1 / h). At another batch size, the same
            number of samples is another number of steps.
        warmup: see :class:`ConstantEMA`.
    """

    half_life: float = 6000
    warmup: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.half_life < math.inf:
            raise ConfigError(
                f"ema.half_life must be positive, but {self.half_life} was given. "
                "Give e.g. ema.half_life=6000, in optimizer steps."
            )

    def decay_at(self, step: int) -> float:
        """Return the decay of step ``step``."""
        decay = 0.5 ** (1.0 / self.half_life)
        return ConstantEMA(decay=decay, warmup=self.warmup).decay_at(step)

    @property
    def name(self) -> str:
        """``ema_`` and the half-life."""
        return f"ema_{self.half_life}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerEMA(EMA):
    """A power-function profile whose length is a share of the training so far (arXiv:2312.02696).

    At step n, the weights of step m have the share (m / n)^(g + 1) - ((m - 1) / n)^(g + 1): the
    integral of p(t) ~ t^g over the step, for any n.

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

    @property
    def name(self) -> str:
        """``ema_`` and the relative width."""
        return f"ema_{self.sigma_rel}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SeveralEMA(EMA):
    """Several constant decays at once; the first one is the main average.

    Args:
        decays: the shares kept a step, each in [0, 1).
        warmup: see :class:`ConstantEMA`.

    Raises:
        ConfigError: no decay, one twice, or one outside [0, 1).
    """

    decays: Sequence[float] = (0.999, 0.9999)
    warmup: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "decays", _distinct("decays", self.decays))
        for decay in self.decays:
            ConstantEMA(decay=decay)

    def laws(self) -> tuple[EMA, ...]:
        """Return one constant decay each."""
        return tuple(ConstantEMA(decay=decay, warmup=self.warmup) for decay in self.decays)

    def decay_at(self, step: int) -> float:
        """Return the main average's decay."""
        return self.laws()[0].decay_at(step)

    @property
    def name(self) -> str:
        """That of the main average."""
        return self.laws()[0].name


@dataclass(frozen=True, slots=True, kw_only=True)
class PosthocEMA(EMA):
    """Power-function profiles whose snapshots give any other length afterwards (arXiv:2312.02696).

    Snapshots of all profiles are stored every ``snapshot_every`` steps and at the end;
    ``python -m genscale.cli.posthoc`` combines them. Two profiles are the paper's choice.

    Args:
        sigma_rels: relative widths of the tracked profiles; the first is the main average.
        snapshot_every: optimizer steps between snapshots; the more there are, the closer the
            averages made of them come to tracked ones, short averages last.
        snapshot_dtype: ``float32``, or ``float16`` for half the disk.

    Raises:
        ConfigError: no width, one twice or out of range, or another impossible setting.
    """

    sigma_rels: Sequence[float] = (0.05, 0.10)
    snapshot_every: int = 1000
    snapshot_dtype: SnapshotDtype = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigma_rels", _distinct("sigma_rels", self.sigma_rels))
        for sigma_rel in self.sigma_rels:
            PowerEMA(sigma_rel=sigma_rel)
        if not isinstance(self.snapshot_every, int) or self.snapshot_every < 1:
            raise ConfigError(
                f"ema.snapshot_every must be a whole number of at least 1, but "
                f"{self.snapshot_every!r} was given. Give e.g. ema.snapshot_every=1000."
            )
        if self.snapshot_dtype not in get_args(SnapshotDtype):
            raise ConfigError(
                f"ema.snapshot_dtype must be float32 or float16, but {self.snapshot_dtype!r} was "
                f"given.{did_you_mean(str(self.snapshot_dtype), get_args(SnapshotDtype))}"
            )

    def laws(self) -> tuple[EMA, ...]:
        """Return one power-function profile each."""
        return self.profiles()

    def profiles(self) -> tuple[PowerEMA, ...]:
        """Return the tracked profiles, the main one first."""
        return tuple(PowerEMA(sigma_rel=sigma_rel) for sigma_rel in self.sigma_rels)

    def decay_at(self, step: int) -> float:
        """Return the main average's decay."""
        return self.profiles()[0].decay_at(step)

    @property
    def name(self) -> str:
        """That of the main average."""
        return self.profiles()[0].name


def _distinct(key: str, values: Sequence[float]) -> tuple[float, ...]:
    """Return numbers of a list that has at least one and none twice."""
    numbers = tuple(values) if isinstance(values, Sequence) else ()
    plain = all(isinstance(x, int | float) and not isinstance(x, bool) for x in numbers)
    if not numbers or not plain or len(set(numbers)) < len(numbers):
        example = "[0.999,0.9999]" if key == "decays" else "[0.05,0.1]"
        raise ConfigError(
            f"ema.{key} must be a list of different numbers, but {values!r} was given. "
            f"Give e.g. ema.{key}={example}."
        )
    return tuple(float(x) for x in numbers)
