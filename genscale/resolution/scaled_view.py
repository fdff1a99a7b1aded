"""A generator view whose calls and estimates pass through operators of resolution scaling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genscale.conditioning.base import Conditioning
from genscale.guidance.base import Guidance
from genscale.objectives.base import Denoiser, Level, Prediction, on
from genscale.objectives.schedule import NoiseProcess
from genscale.resolution.base import ResolutionOp
from genscale.resolution.flow_guided import as_number

_SAME = 1e-9  # of log SNR: levels of one step


def flow_time(level: Level) -> Tensor:
    """Return t = sigma / (alpha + sigma), the flow's time of equal signal-to-noise ratio."""
    return level.sigma / (level.alpha + level.sigma)


class RunLevels:
    """The levels of a run, as operators ask for them (their ``schedule``).

    Args:
        process: the noising process.
        levels: ``(N + 1,)`` those at which steps begin, and where the last one ends.
        first: step at which the run begins; operators count from it.
    """

    def __init__(self, process: NoiseProcess, levels: Level, first: int = 0) -> None:
        self.process, self.levels, self.first = process, levels, first

    def __call__(self, t: float) -> tuple[float, float]:
        """Return alpha and sigma of the process at a flow time, see :func:`flow_time`."""
        alpha, sigma = self.process.coefficients(self._time(t))
        return float(alpha), float(sigma)

    def share(self, t: float) -> float:
        """Return the process's own time of a flow time, 0 at data to 1 where sampling starts."""
        return min(float(self._time(t)) / self.process.t_max, 1.0)

    def step_of(self, level: Level) -> int:
        """Return the step, counted from the run's first, that begins at a level or last before it.

        Raises:
            ValueError: particles at different levels.
        """
        now = as_number(level.log_snr)
        begun = int((self.levels.log_snr < now - _SAME).sum())
        return begun - self.first

    def _time(self, t: float) -> Tensor:
        moment = torch.tensor(t, dtype=torch.float64)
        return self.process.time_of(torch.log1p(-moment) - torch.log(moment))


class ScaledGuidance(Guidance):
    """Guidance whose views are :class:`ScaledView`, for callers that wrap views themselves.

    Args:
        guidance: what guides.
        operators: see :class:`ScaledView`; they are on the network already.
        levels: see there.
    """

    def __init__(
        self, guidance: Guidance, operators: Sequence[ResolutionOp], levels: RunLevels
    ) -> None:
        self.guidance, self.operators, self.levels = guidance, list(operators), levels

    def check(self, process: NoiseProcess) -> list[str]:
        """Return what the guidance says."""
        return self.guidance.check(process)

    def along(self, levels: Level | None) -> Guidance:
        """Return this for a sampler."""
        return ScaledGuidance(self.guidance.along(levels), self.operators, self.levels)

    @property
    def active(self) -> bool:
        """Whether the guidance is."""
        return self.guidance.active

    def wrap(self, view: Any) -> ScaledView:
        """Return the guided view within the operators."""
        return ScaledView(self.guidance.wrap(view), self.operators, self.levels)

    @property
    def label(self) -> str:
        """That of the guidance."""
        return self.guidance.label


class ScaledView(Denoiser):
    """A view within :class:`~genscale.resolution.base.apply_resolution`.

    At every call operators are told time and step, the call itself is replaced by what they
    make of it, and they change the estimate of the clean sample; the estimate of the noise follows
    so that x = alpha clean + sigma noise stays true. It belongs outside guidance: windows are
    guided each on its own, and what operators do to the estimate is not extrapolated.

    The step is read off the level, so that any sampler or search may call it in any order.
    Changes that operators make to the sample itself are up to whoever steps it
    (:func:`~genscale.resolution.sampling.sample_scaled`). A call that operators spread over several
    windows keeps no memory.

    Args:
        view: the (guided) view at the wanted size.
        operators: in order; the first is the innermost.
        levels: of the run.
    """

    def __init__(
        self, view: Denoiser, operators: Sequence[ResolutionOp], levels: RunLevels
    ) -> None:
        self.view, self.operators, self.levels = view, list(operators), levels
        self.process, self.sample_shape, self.device = view.process, view.sample_shape, view.device
        plain = ResolutionOp.wrap_model
        self._spread = any(type(op).wrap_model is not plain for op in self.operators)
        self._timed = any(
            type(op).pre_step is not ResolutionOp.pre_step
            or type(op).post_x0 is not ResolutionOp.post_x0
            for op in self.operators
        )

    def __call__(
        self, x: Tensor, level: Level, cond: Conditioning, memory: Any = None
    ) -> Prediction:
        """Estimate clean sample and noise of ``x`` ``(B, C, H, W)``.

        Raises:
            ValueError: particles at different levels, where operators look at time or step.
        """
        if not (self._timed or self._spread):
            return self.view(x, level, cond, memory)
        time, step = as_number(flow_time(level)), self.levels.step_of(level)
        for op in self.operators:
            op.pre_step(x, time, step)  # told; see the class
        if self._spread:
            prediction = self._call_spread(x, level, cond)
        else:
            prediction = self.view(x, level, cond, memory)
        alpha, sigma = on(level.alpha, x), on(level.sigma, x)
        clean, flow_x = prediction.clean, x / (alpha + sigma)
        for op in self.operators:
            clean = op.post_x0(clean, flow_x, time, step)
        if clean is not prediction.clean:
            # as a difference: guidance may have broken the tie between both estimates on purpose
            prediction.noise = prediction.noise + alpha / sigma * (prediction.clean - clean)
            prediction.clean = clean
        return prediction

    def begin(self, batch: int, shape: tuple[int, ...]) -> Any:
        """See :meth:`~genscale.objectives.base.Denoiser.begin`."""
        return self.view.begin(batch, shape)

    def refresh(
        self, x: Tensor, level: Level, cond: Conditioning, memory: Any = None
    ) -> Prediction:
        """See :meth:`~genscale.objectives.base.Denoiser.refresh`."""
        return self.view.refresh(x, level, cond, memory)

    def _call_spread(self, x: Tensor, level: Level, cond: Conditioning) -> Prediction:
        """Call the view through the operators, all estimates as channels of one picture."""
        spent, parts = 0.0, 2

        def call(x: Tensor, level: Level, cond: Conditioning) -> Tensor:
            nonlocal spent, parts
            out = self.view(x, level, cond)
            spent += float(out.cost.sum())
            estimates = [out.clean, out.noise]
            if out.variance is not None:
                estimates.append(out.variance)
            parts = len(estimates)
            return torch.cat(estimates, dim=1)

        fn: Any = call
        for op in self.operators:
            fn = op.wrap_model(fn)
        out = fn(x, level, cond)
        joined: Tensor = out if isinstance(out, Tensor) else out.sample
        clean, noise, *rest = joined.chunk(parts, dim=1)
        cost = torch.full((len(x),), spent / len(x), dtype=torch.float64, device="cpu")
        return Prediction(clean, noise, None, cost, rest[0] if rest else None)
