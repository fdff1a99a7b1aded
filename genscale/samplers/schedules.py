"""Where on a process a sampler stops: rules that choose the levels of a grid."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from genscale.errors import ConfigError, did_you_mean
from genscale.objectives.base import Level
from genscale.objectives.paths import ContinuousVP
from genscale.objectives.schedule import NoiseProcess
from genscale.objectives.time_sampler import shifted

Spacing = Literal["linspace", "trailing", "leading"]
ScheduleName = Literal[
    "linear",
    "karras",
    "exponential",
    "polyexponential",
    "vp",
    "discrete",
    "discrete_trailing",
    "discrete_leading",
]

_TOLERANCE = 1e-6  # of log SNR, for ends that were rounded


class LevelSchedule(ABC):
    """A rule that places the levels of a grid; frozen and hashable, so that grids are cached."""

    @abstractmethod
    def times(self, process: NoiseProcess, intervals: int) -> Tensor:
        """Return ``(intervals + 1,)`` float64 process times, falling."""


@dataclass(frozen=True)
class Linear(LevelSchedule):
    """Uniform in process time, then moved towards noise; both ends are exact.

    Args:
        shift: s moves unit times to s t / (1 + (s - 1) t). It is also the exponential shift of
            Flux, with s = exp(mu).
        start: the first time; None is the process's ``t_max``.
        end: the last time.
    """

    shift: float = 1.0
    start: float | None = None
    end: float = 0.0

    def times(self, process: NoiseProcess, intervals: int) -> Tensor:
        """Return uniform times."""
        start = process.t_max if self.start is None else self.start
        unit = torch.linspace(1.0, 0.0, intervals + 1, dtype=torch.float64)
        times = self.end + (start - self.end) * shifted(unit, self.shift)
        times[0], times[-1] = start, self.end
        return times


@dataclass(frozen=True)
class DynamicShift(LevelSchedule):
    """Linear with a shift that grows with the size of the picture, as Flux samples.

    The shift is exp(mu), with mu on the line through (least_tokens, least) and (most_tokens,
    most): of a flow, t -> e^mu / (e^mu + 1 / t - 1).

    Args:
        tokens: length of the network's sequence, (H / patch) (W / patch).
        least: mu at ``least_tokens``.
        most: mu at ``most_tokens``.
        least_tokens: see ``least``.
        most_tokens: see ``most``.

    Raises:
        ConfigError: no tokens.
    """

    tokens: int
    least: float = 0.5
    most: float = 1.15
    least_tokens: int = 256
    most_tokens: int = 4096

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.least_tokens == self.most_tokens:
            raise ConfigError(
                f"sampler.schedule.tokens must be at least 1, but is {self.tokens}. Give (H / "
                "patch) (W / patch) of the model."
            )

    def times(self, process: NoiseProcess, intervals: int) -> Tensor:
        """Return uniform times, moved."""
        share = (self.tokens - self.least_tokens) / (self.most_tokens - self.least_tokens)
        mu = self.least + share * (self.most - self.least)
        return Linear(math.exp(mu)).times(process, intervals)


@dataclass(frozen=True)
class NoiseSchedule(LevelSchedule):
    """Levels by their noise s = sigma / alpha: from ``sigma_max`` to ``sigma_min``, then clean.

    Args:
        sigma_min: the last s above 0; None is that of the process's ``t_min``.
        sigma_max: the first s; None is that of ``t_max``. Flows, which start at infinite s, need
            a number; they then start at a level that is not quite pure noise.

    Raises:
        ConfigError: at the first use, ends that the process does not have.
    """

    sigma_min: float | None = None
    sigma_max: float | None = None

    @abstractmethod
    def place(self, unit: Tensor, low: float, high: float) -> Tensor:
        """Return s of unit places, 0 the first (``high``) and 1 the last (``low``)."""

    def times(self, process: NoiseProcess, intervals: int) -> Tensor:
        """Return the times of N levels and of the clean one."""
        low, high = _range_of(process, self.sigma_min, self.sigma_max)
        unit = torch.linspace(0.0, 1.0, intervals, dtype=torch.float64)
        return _clean_appended(process, self.place(unit, low, high))


@dataclass(frozen=True)
class Karras(NoiseSchedule):
    """s_i = (s_max^(1/rho) + i / (N - 1) (s_min^(1/rho) - s_max^(1/rho)))^rho (2206.00364, eq. 5).

    Args:
        sigma_min: see :class:`NoiseSchedule`.
        sigma_max: see there.
        rho: larger puts more levels near the data; EDM has 7.
    """

    rho: float = 7.0

    def place(self, unit: Tensor, low: float, high: float) -> Tensor:
        """Return equation 5."""
        first, last = high ** (1.0 / self.rho), low ** (1.0 / self.rho)
        return (first + unit * (last - first)) ** self.rho


@dataclass(frozen=True)
class Exponential(NoiseSchedule):
    """ln s_i = ln s_min + (1 - i / (N - 1))^power (ln s_max - ln s_min).

    Power 1 is uniform in log SNR; others are k-diffusion's "polyexponential".

    Args:
        sigma_min: see :class:`NoiseSchedule`.
        sigma_max: see there.
        power: above 1 puts more levels near the data.
    """

    power: float = 1.0

    def place(self, unit: Tensor, low: float, high: float) -> Tensor:
        """Return the exponential of a ramp."""
        ramp = (1.0 - unit) ** self.power
        return torch.exp(math.log(low) + ramp * (math.log(high) - math.log(low)))


@dataclass(frozen=True)
class VPSpaced(LevelSchedule):
    """s of the continuous VP process at uniform times from 1 to ``time_min``, then clean.

    Args:
        beta_min: see :class:`~genscale.objectives.paths.ContinuousVP`.
        beta_max: see there.
        time_min: the last time of that process above 0.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    time_min: float = 1e-3

    def times(self, process: NoiseProcess, intervals: int) -> Tensor:
        """Return the times of equal signal-to-noise ratio."""
        spaced = torch.linspace(1.0, self.time_min, intervals, dtype=torch.float64)
        level = ContinuousVP(self.beta_min, self.beta_max).level(spaced)
        s = level.sigma / level.alpha
        _range_of(process, float(s[-1]), float(s[0]))
        return _clean_appended(process, s)


@dataclass(frozen=True)
class Discrete(LevelSchedule):
    """Whole noise steps of a process with ``num_timesteps`` N, then clean.

    Timesteps k = 0 .. N - 1 are chosen, of the noise step n = k + 1 and time n / N.

    Args:
        spacing: ``"linspace"`` takes round(i (N - 1) / (m - 1)), as DiT's respacing, with both
            ends; ``"trailing"`` takes round(N - i N / m) - 1, with the noisiest; ``"leading"``
            takes i floor(N / m), with the least noisy.
    """

    spacing: Spacing = "linspace"

    def times(self, process: NoiseProcess, intervals: int) -> Tensor:
        """Return whole steps over N.

        Raises:
            ConfigError: a process without steps, or with fewer than asked for.
        """
        total = getattr(process, "num_timesteps", None)
        if total is None or intervals > total:
            raise ConfigError(
                f"sampler.schedule=discrete picks sampler.steps={intervals} of the noise steps of "
                f"the objective, but {type(process).__name__} has "
                f"{'none' if total is None else total}. Use sampler.schedule=linear."
            )
        place = torch.arange(intervals, dtype=torch.float64)
        if self.spacing == "linspace":
            steps = (place * ((total - 1) / max(intervals - 1, 1))).round().flip(0)
        elif self.spacing == "trailing":
            steps = (total - place * (total / intervals)).round() - 1.0
        else:
            steps = (place * (total // intervals)).flip(0)
        return torch.nn.functional.pad((steps + 1.0) / total, (0, 1))


@dataclass(frozen=True)
class Given(LevelSchedule):
    """Levels by a list of s = sigma / alpha, falling; a last 0 is the clean level.

    Args:
        sigmas: as many as steps, and the last one.
    """

    sigmas: tuple[float, ...]

    def times(self, process: NoiseProcess, intervals: int) -> Tensor:
        """Return the times of the list.

        Raises:
            ConfigError: another number of levels, or levels that do not fall.
        """
        s = torch.tensor(self.sigmas, dtype=torch.float64)
        if len(s) != intervals + 1 or bool((s.diff() >= 0).any()) or float(s[-1]) < 0.0:
            raise ConfigError(
                f"sampler.schedule.sigmas must be sampler.steps + 1 = {intervals + 1} falling "
                f"numbers, the last one usually 0, but has {len(s)}: {list(self.sigmas)[:4]}..."
            )
        _range_of(process, None, float(s[0]))
        return process.time_of(-torch.log(s))


def named_schedule(name: str, shift: float) -> LevelSchedule:
    """Return the schedule of a name, with its default numbers.

    Raises:
        ConfigError: an unknown name, or a shift of another schedule than ``linear``.
    """
    known = get_args(ScheduleName)
    if name not in known:
        raise ConfigError(
            f"sampler.schedule must be one of {', '.join(known)}, but is {name!r}."
            f"{did_you_mean(str(name), known)}"
        )
    if name == "linear":
        return Linear(shift)
    check_unshifted(name, shift)
    simple: dict[str, LevelSchedule] = {
        "karras": Karras(),
        "exponential": Exponential(),
        "polyexponential": Exponential(power=2.0),
        "vp": VPSpaced(),
        "discrete": Discrete("linspace"),
        "discrete_trailing": Discrete("trailing"),
        "discrete_leading": Discrete("leading"),
    }
    return simple[name]


def check_unshifted(schedule: object, shift: float) -> None:
    """Refuse a shift of a schedule that is not uniform in time."""
    if shift != 1.0:
        raise ConfigError(
            f"sampler.shift={shift:g} moves the schedule linear, but sampler.schedule is "
            f"{schedule}. Leave sampler.shift=1."
        )


@lru_cache(maxsize=256)
def level_grid(process: NoiseProcess, schedule: LevelSchedule, intervals: int) -> Level:
    """Return the levels of a grid, from most noise to least. Cached, and never written to."""
    # also where the first caller does not: a later one may differentiate, or be on another device
    with torch.inference_mode(False), torch.device("cpu"):
        return process.level(schedule.times(process, intervals))


def noise_ratio(level: Level) -> Tensor:
    """Return s = sigma / alpha; infinite at pure noise."""
    return level.sigma / level.alpha


def _range_of(process: NoiseProcess, low: float | None, high: float | None) -> tuple[float, float]:
    """Return (s_min, s_max), those of the process where None, or say why there are none."""
    least, most = (float(noise_ratio(process.level(t))) for t in (process.t_min, process.t_max))
    low, high = least if low is None else float(low), most if high is None else float(high)
    too_high = not process.continues_above and math.log(high) > math.log(most) + _TOLERANCE
    if not 0.0 < low < high < math.inf or too_high:
        raise ConfigError(
            f"The sampler's schedule runs from sigma / alpha = {high:g} down to {low:g}, but "
            f"{type(process).__name__} has levels from {most:g} down. Give sampler.schedule "
            "finite sigma_max > sigma_min > 0 within these, or use sampler.schedule=linear."
        )
    return low, high


def _clean_appended(process: NoiseProcess, s: Tensor) -> Tensor:
    return torch.nn.functional.pad(process.time_of(-torch.log(s)), (0, 1))
