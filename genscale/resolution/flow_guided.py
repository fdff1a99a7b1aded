"""A large picture guided by the small one: in noise, in the clean estimate, in the velocity.

Everything works on the estimate of the clean sample, so that it serves any parameterisation and
solver. Times are flow times: t is 1 at noise and 0 at data, and a sample x_t of another process,
alpha x_0 + sigma eps, is the flow's sample x_t / (alpha + sigma) at t = sigma / (alpha + sigma).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from genscale.errors import ConfigError
from genscale.resolution.base import ResolutionOp, Sides
from genscale.resolution.frequency import butterworth, haar_low_pass, low_pass

LowPass = Callable[[Tensor], Tensor]
"""A linear filter of pictures."""

_TINY = 1e-6  # the official programs' bound of divisions by t


def cosine_ramp(share: float) -> float:
    """Return (1 + cos(pi share)) / 2, which falls from 1 at 0 to 0 at 1."""
    return 0.5 * (1.0 + math.cos(math.pi * share))


def skip_weight(t: float, exponent: float = 3.0) -> float:
    """Return the share of the guide at flow time t: 1 at noise, 0 at data.

    Args:
        t: in [0, 1].
        exponent: 3 in DemoFusion (arXiv:2311.16973), 2 in FreeScale (arXiv:2412.09626).
    """
    return cosine_ramp(1.0 - t) ** exponent


def project(x0: Tensor, guide: Tensor, weight: float, low: LowPass = haar_low_pass) -> Tensor:
    """Move a clean estimate towards a guide: its low band wholly, the rest by ``weight``.

    x_0 + c (z - x_0) + (1 - c) LP(z - x_0); on velocities that is I-Max's projection
    v + c (v_g - v) + (1 - c) (LP v_g - LP v) with v = (x_t - x_0) / t (arXiv:2410.07536).

    Args:
        x0: ``(B, C, H, W)``.
        guide: z, alike.
        weight: c in [0, 1].
        low: LP.
    """
    away = guide - x0
    return x0 + weight * away + (1.0 - weight) * low(away)


def align(x0: Tensor, guide: Tensor, weight: float, low: LowPass) -> Tensor:
    """Return x_0 + a LP(z - x_0): the low band of the guide, by ``weight`` (arXiv:2504.06232)."""
    return x0 + weight * low(guide - x0)


def velocity(x: Tensor, x0: Tensor, t: float) -> Tensor:
    """Return (x_t - x_0) / t, the direction from data to noise."""
    return (x - x0) / (t + _TINY)


def accelerate(v: Tensor, before: Tensor, ref: Tensor, ref_before: Tensor, weight: float) -> Tensor:
    """Let a velocity change from step to step as the reference's does (arXiv:2504.06232).

    v + b (v_before + v_ref - v_ref_before - v).
    """
    return v + weight * (before + ref - ref_before - v)


def as_number(t: Tensor | float) -> float:
    """Return the time that all samples share.

    Raises:
        ValueError: samples stand at different times.
    """
    times = torch.as_tensor(t, dtype=torch.float64).flatten()
    if bool((times != times[0]).any()):
        raise ValueError(
            "Guidance by a smaller picture needs one time for all samples, but they stand at "
            f"{times.tolist()}. Advance them together."
        )
    return float(times[0])


class SkipResidual(ResolutionOp):
    """Mix the noised upsampled picture into every step's start, less and less.

    x_t <- (1 - c) x_t + c (alpha z + sigma eps), with one noise eps at all steps.

    Args:
        guide: z ``(B, C, H, W)``, the small result upsampled.
        noise: eps, alike.
        exponent: see :func:`skip_weight`.
    """

    def __init__(self, guide: Tensor, noise: Tensor, *, exponent: float = 3.0) -> None:
        self.guide, self.noise, self.exponent = guide, noise, exponent
        self._levels: Callable[[float], tuple[float, float]] = _flow_levels
        self._share: Callable[[float], float] = _unchanged

    def prepare(self, model: nn.Module, native: Sides, target: Sides, schedule: Any = None) -> None:
        """Note the noising process: ``schedule(t)`` gives alpha and sigma; default the flow's.

        Where it has a ``share``, weights follow ``schedule.share(t)``, the process's own time.
        """
        self._levels = _flow_levels if schedule is None else schedule
        self._share = getattr(schedule, "share", _unchanged)

    def pre_step(self, x: Tensor, t: Tensor | float, i: int) -> Tensor:
        """Mix."""
        time = as_number(t)
        weight = skip_weight(self._share(time), self.exponent)
        alpha, sigma = self._levels(time)
        return (1.0 - weight) * x + weight * (alpha * self.guide + sigma * self.noise)


class Projection(ResolutionOp):
    """Project every clean estimate onto the guide, see :func:`project`.

    Args:
        guide: z ``(B, C, H, W)``, the small result upsampled.
        steps: n; the weight of step i is (1 + cos(pi i / n)) / 2, and no step from n on is guided.
        low: see :func:`project`.
    """

    def __init__(self, guide: Tensor, steps: int, *, low: LowPass = haar_low_pass) -> None:
        _check_steps(steps)
        self.guide, self.steps, self.low = guide, steps, low

    def post_x0(self, x0: Tensor, x: Tensor, t: Tensor | float, i: int) -> Tensor:
        """Project."""
        if i >= self.steps:
            return x0
        return project(x0, self.guide, cosine_ramp(i / self.steps), self.low)


class FlowAligned(ResolutionOp):
    """Follow the clean estimates of the small run, step by step (HiFlow, arXiv:2504.06232).

    The low band of each estimate is moved to the reference's, and its velocity changes from step
    to step as the reference's does; both by weights that fall evenly to 0.

    Args:
        references: the small run's clean estimates at the same times, upsampled, ``(B, C, H, W)``
            each.
        alpha: weight of the low band at the first step.
        beta: weight of the acceleration at the first step.
        ratio: of the Butterworth filter.
        centred: see :func:`~genscale.resolution.frequency.butterworth`.
    """

    def __init__(
        self,
        references: Sequence[Tensor],
        *,
        alpha: float = 1.0,
        beta: float = 0.5,
        ratio: float = 0.2,
        centred: bool = False,
    ) -> None:
        _check_steps(len(references))
        self.references = list(references)
        self.alpha, self.beta, self.ratio, self.centred = alpha, beta, ratio, centred
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def prepare(self, model: nn.Module, native: Sides, target: Sides, schedule: Any = None) -> None:
        """Forget the steps before; the model is left alone."""
        self._before.clear()

    def post_x0(self, x0: Tensor, x: Tensor, t: Tensor | float, i: int) -> Tensor:
        """Align the estimate of step ``i``; ``x`` is the flow's sample, see the module."""
        if i >= len(self.references):
            return x0
        time, ref = as_number(t), self.references[i]
        height, width = x0.shape[-2:]
        mask = butterworth(height, width, self.ratio, centred=self.centred, device=x0.device)
        share = 1.0 - i / len(self.references)
        x0 = align(x0, ref, self.alpha * share, lambda picture: low_pass(picture, mask))
        v, v_ref = velocity(x, x0, time), velocity(x, ref, time)
        if i - 1 in self._before:
            before, ref_before = self._before[i - 1]
            v = accelerate(v, before, v_ref, ref_before, self.beta * share)
        # by step: a second look at the same one changes nothing
        self._before = {k: pair for k, pair in self._before.items() if k == i - 1}
        self._before[i] = v, v_ref
        return x - v * (time + _TINY)

    def restore(self, model: nn.Module) -> None:
        """Forget the steps before."""
        self._before.clear()


def _flow_levels(t: float) -> tuple[float, float]:
    return 1.0 - t, t


def _unchanged(t: float) -> float:
    return t


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ConfigError(
            f"Guidance by a smaller picture needs at least one step, but was given {steps}. "
            "Give the steps of the large run."
        )
