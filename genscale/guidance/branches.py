"""What guidances of two branches share: which rows need both, one memory a branch, the cost."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.guidance.base import Guidance
from genscale.objectives.base import Denoiser, Level, Prediction, on
from genscale.objectives.memory import cat_tensors, map_tensors, put_rows, take_rows
from genscale.objectives.schedule import NoiseProcess


@dataclass(frozen=True, slots=True)
class Rows:
    """The guided rows of a call.

    Attributes:
        x: ``(b, ...)`` noisy samples.
        level: their levels, of b rows or shared.
        weight: w, ``(b or 1, 1, ..., 1)`` on x's device.
        process: the model's process.
        memory: what :meth:`BranchGuidance.combine` handed back for these rows, or None.
    """

    x: Tensor
    level: Level
    weight: Tensor
    process: NoiseProcess
    memory: Tensor | None


@dataclass(frozen=True, slots=True)
class Guided:
    """Guided estimates of the rows of :class:`Rows`, and what to remember of them."""

    clean: Tensor
    noise: Tensor
    memory: Tensor | None = None


class BranchGuidance(Guidance):
    """Guidance by a second, worse prediction: without the condition, or by a weaker network.

    A row that is not guided costs one evaluation, every other row two. Branches of one network
    run in one batch; each keeps a memory of its own.

    Args:
        scale: w; 1 is the first branch alone.
        interval: guide only at process times t with lo < t <= hi, both in [0, 1]
            (arXiv:2404.07724); None guides at every time. Time is that of the model's process,
            n / N or the t of a flow, 1 being noise. For a paper's interval in sigma / alpha = s,
            a flow has t = s / (1 + s).
        channels: guide only the first channels; None guides all.

    Raises:
        ConfigError: an impossible number.
    """

    def __init__(
        self,
        scale: float,
        *,
        interval: Sequence[float] | None = None,
        channels: int | None = None,
    ) -> None:
        if not 0.0 <= scale < math.inf:
            raise ConfigError(
                f"guidance.scale must be finite and not negative, but is {scale}. "
                "1 means no guidance, 1.5 to 4 is usual."
            )
        if interval is not None and not (
            len(interval) == 2 and 0.0 <= interval[0] < interval[1] <= 1.0
        ):
            raise ConfigError(
                f"guidance.interval must be [lo, hi] with 0 <= lo < hi <= 1, but is "
                f"{list(interval)}. Give process times, e.g. [0.1,0.7]."
            )
        if channels is not None and channels < 1:
            raise ConfigError(
                f"guidance.channels must be at least 1, but is {channels}. null guides all."
            )
        self.scale = float(scale)
        self.interval = None if interval is None else (float(interval[0]), float(interval[1]))
        self.channels = channels

    @property
    def label(self) -> str:
        """The name, and the channels where not all are guided."""
        part = "" if self.channels is None else f" on {self.channels} channels"
        return type(self).__name__ + part

    def wrap(self, view: Denoiser) -> Denoiser:
        """Return the guided view; scale 1 returns the view itself."""
        return view if self.scale == 1.0 else GuidedView(self, view)

    def scale_at(self, level: Level, process: NoiseProcess) -> Tensor:
        """Return w of each row of a level, float64 on the CPU; exactly 1 where nothing guides."""
        scale = torch.full_like(level.alpha, self.scale)
        return scale if self.interval is None else self._inside(scale, level, process)

    def guides(self, level: Level, process: NoiseProcess) -> Tensor:
        """Return which rows of a level need both branches, bool on the CPU."""
        guided = self.scale_at(level, process) != 1.0
        return guided.flatten(1).any(1) if guided.dim() > 1 else guided

    @abstractmethod
    def combine(self, own: Prediction, other: Prediction, rows: Rows) -> Guided:
        """Return the guided estimates of guided rows; both predictions describe ``rows.x``."""

    def _inside(self, scale: Tensor, level: Level, process: NoiseProcess) -> Tensor:
        if self.interval is None:
            return scale
        low, high = self.interval
        time = process.time_at(level) / process.t_max
        return torch.where((time > low) & (time <= high), scale, 1.0)


def extrapolate(own: Tensor, other: Tensor, weight: Tensor | float) -> Tensor:
    """Return u + w (c - u) (arXiv:2207.12598, eq. 6)."""
    return other + weight * (own - other)


class GuidedView(Denoiser):
    """A view whose rows are guided where the guidance says so.

    Memory is ``{"conditional": ..., "null": ...}``, what the network handed back in each branch;
    that of the second branch is as of the row's last guided evaluation. A guidance that remembers
    has ``"guidance"`` in it too.

    Args:
        guidance: what combines the branches.
        view: the network.
        weak: the network of the second branch, asked with the condition; None asks ``view``
            without it.
    """

    def __init__(
        self, guidance: BranchGuidance, view: Denoiser, weak: Denoiser | None = None
    ) -> None:
        self.guidance = guidance
        self.view = view
        self.weak = weak
        self.process = view.process
        self.sample_shape = view.sample_shape
        self.device = view.device

    def __call__(
        self, x: Tensor, level: Level, cond: Conditioning, memory: Any = None
    ) -> Prediction:
        """Estimate clean sample and noise of ``x`` in one network call (two with ``weak``).

        Which rows need both branches is known on the CPU beforehand.

        Raises:
            ConfigError: conditions that have no unconditional twin.
            ValueError: a network with memory, and rows whose guidance begins before others'.
        """
        if self.weak is None and (
            cond.labels is None and cond.text is None and cond.pooled_text is None
        ):
            raise ConfigError(
                f"guidance.scale={self.guidance.scale:g} needs a class or text condition to guide "
                "by, but none was given (is the model unconditional?). Use guidance=none."
            )
        mask = self.guidance.guides(level, self.process)
        guided = mask.expand(len(x)).nonzero()[:, 0]
        memory = memory or {"conditional": None, "null": None}
        kept = memory.get("guidance")
        if kept is not None and kept.shape != x.shape:
            kept = None  # of other frames of a video
        if len(guided) == 0:
            own = self.view(x, level, cond, memory["conditional"])
            own.memory = _pack(own.memory, memory["null"], kept)
            return own
        own, other = self._both(x, level, cond, memory, guided)
        other_memory = other.memory
        if len(guided) < len(x):
            other_memory = put_rows(memory["null"], guided, other.memory, len(x))
        index = guided.to(x.device, non_blocking=True)
        scale = self.guidance.scale_at(level, self.process)
        rows = Rows(
            x=x[index],
            level=level.select(guided),
            weight=on(scale if len(scale) == 1 else scale[guided], x),
            process=self.process,
            memory=take_rows(kept, guided),
        )
        mine = Prediction(own.clean[index], own.noise[index])
        result = self.guidance.combine(mine, other, rows)
        if result.memory is not None:
            kept = torch.zeros_like(x) if kept is None else kept
            kept = kept.index_copy(0, index, result.memory)
        return Prediction(
            clean=self._put(own.clean, index, result.clean),
            noise=self._put(own.noise, index, result.noise),
            memory=_pack(own.memory, other_memory, kept),
            cost=own.cost.index_add(0, guided, other.cost),
            variance=own.variance,
        )

    def begin(self, batch: int, shape: tuple[int, ...]) -> Any:
        """Return the memory of videos that begin, one a branch."""
        own = self.view.begin(batch, shape)
        return _pack(own, (self.weak or self.view).begin(batch, shape), None)

    def refresh(
        self, x: Tensor, level: Level, cond: Conditioning, memory: Any = None
    ) -> Prediction:
        """Let both branches read ``x``, whatever the interval; nothing is guided."""
        memory = memory or {"conditional": None, "null": None}
        own, other = self._both(x, level, cond, memory, torch.arange(len(x), device="cpu"))
        own.memory = _pack(own.memory, other.memory, None)  # other frames come next
        own.cost = own.cost + other.cost
        return own

    def _put(self, own: Tensor, index: Tensor, guided: Tensor) -> Tensor:
        channels = self.guidance.channels
        if channels is not None:
            guided = torch.cat((guided[:, :channels], own[index, channels:]), dim=1)
        return own.index_copy(0, index, guided)

    def _both(
        self, x: Tensor, level: Level, cond: Conditioning, memory: dict[str, Any], guided: Tensor
    ) -> tuple[Prediction, Prediction]:
        """Evaluate all rows in the first branch, and the rows ``guided`` in the second."""
        index = guided.to(x.device, non_blocking=True)
        other_memory = take_rows(memory["null"], guided)
        part = level.select(guided)
        if self.weak is not None:
            own = self.view(x, level, cond, memory["conditional"])
            return own, self.weak(x[index], part, cond.select(guided), other_memory)
        null_cond = cond.select(guided).null()
        if (memory["conditional"] is None) != (other_memory is None):
            # guidance begins only now: the fresh branch has no memory to lay beside the other's
            own = self.view(x, level, cond, memory["conditional"])
            return own, self.view(x[index], part, null_cond, other_memory)
        n = len(x)
        out = self.view(
            torch.cat((x, x[index])),
            level.select(torch.cat((torch.arange(n, device="cpu"), guided))),
            Conditioning.cat([cond, null_cond]),
            cat_tensors([memory["conditional"], other_memory]),
        )
        return _rows(out, slice(0, n)), _rows(out, slice(n, None))


def _rows(out: Prediction, rows: slice) -> Prediction:
    memory = map_tensors(out.memory, lambda tensor: tensor[rows])
    variance = None if out.variance is None else out.variance[rows]
    return Prediction(out.clean[rows], out.noise[rows], memory, out.cost[rows], variance)


def _pack(conditional: Any, null: Any, kept: Tensor | None) -> dict[str, Any] | None:
    if conditional is None and null is None and kept is None:
        return None
    packed = {"conditional": conditional, "null": null}
    return packed if kept is None else {**packed, "guidance": kept}
