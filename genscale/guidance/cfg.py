"""Classifier-free guidance (arXiv:2207.12598), constant, in an interval, or growing in time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError, did_you_mean
from genscale.guidance.base import Guidance
from genscale.objectives.base import Denoiser, Level, Prediction, on
from genscale.objectives.memory import cat_tensors, map_tensors, put_rows, take_rows
from genscale.objectives.schedule import NoiseProcess

Form = Literal["constant", "power_cosine"]


class ClassifierFree(Guidance):
    """u + w (c - u) with conditional c and unconditional u (arXiv:2207.12598, eq. 6).

    Scale w = 1 is the conditional prediction alone and w = 0 the unconditional one; a row where w
    is 1 costs one evaluation, every other row two, both branches in one batch. Programs that
    write c + w' (c - u), as DiMR's, have w = 1 + w': the published 0.4 is scale 1.4.

    Both branches describe one x, so the guided clean and noise estimates still satisfy
    x = alpha clean + sigma noise.

    Args:
        scale: w, constant or at t = 0.
        interval: guide only at process times t with lo < t <= hi, both in [0, 1]
            (arXiv:2404.07724); None guides at every time. Time is that of the model's process,
            n / N or the t of a flow, 1 being noise. For a paper's interval in sigma / alpha = s,
            a flow has t = s / (1 + s).
        form: ``"constant"``, or ``"power_cosine"``: w(t) = 1 + (w - 1) (1 - cos(pi (1 - t)^p)) / 2,
            no guidance at pure noise, all of it at t = 0 (DiMR's sampler).
        power: p of ``power_cosine``; larger keeps guidance for later.

    Raises:
        ConfigError: an unknown form or an impossible number.
    """

    def __init__(
        self,
        scale: float = 1.5,
        *,
        interval: Sequence[float] | None = None,
        form: Form = "constant",
        power: float = 1.0,
    ) -> None:
        if not 0.0 <= scale < math.inf:
            raise ConfigError(
                f"guidance.scale must be finite and not negative, but is {scale}. "
                "1 means no guidance, 1.5 to 4 is usual."
            )
        if form not in get_args(Form):
            raise ConfigError(
                f"guidance.form must be one of {', '.join(get_args(Form))}, but is {form!r}."
                f"{did_you_mean(str(form), get_args(Form))}"
            )
        if not 0.0 < power < math.inf:
            raise ConfigError(
                f"guidance.power must be positive, but is {power}. Give e.g. guidance.power=2."
            )
        if interval is not None and not (
            len(interval) == 2 and 0.0 <= interval[0] < interval[1] <= 1.0
        ):
            raise ConfigError(
                f"guidance.interval must be [lo, hi] with 0 <= lo < hi <= 1, but is "
                f"{list(interval)}. Give process times, e.g. [0.1,0.7]."
            )
        self.scale = float(scale)
        self.interval = None if interval is None else (float(interval[0]), float(interval[1]))
        self.form = form
        self.power = float(power)

    def wrap(self, view: Denoiser) -> Denoiser:
        """Return the guided view; scale 1 returns the view itself."""
        return view if self.scale == 1.0 else _GuidedView(self, view)

    def scale_at(self, level: Level, process: NoiseProcess) -> Tensor:
        """Return w of each row of a level, float64 on the CPU; exactly 1 where nothing guides."""
        scale = torch.full_like(level.alpha, self.scale)
        if self.form == "constant" and self.interval is None:
            return scale
        time = process.time_at(level) / process.t_max
        if self.form == "power_cosine":
            grown = 0.5 * (1.0 - torch.cos(math.pi * (1.0 - time).clamp(0.0, 1.0) ** self.power))
            scale = 1.0 + (scale - 1.0) * grown
        if self.interval is not None:
            low, high = self.interval
            scale = torch.where((time > low) & (time <= high), scale, 1.0)
        return scale


class _GuidedView(Denoiser):
    """A view whose rows are guided where the guidance says so.

    Memory is ``{"conditional": ..., "null": ...}``, what the network handed back in each branch;
    that of the null branch is as of the row's last guided evaluation.
    """

    def __init__(self, guidance: ClassifierFree, view: Denoiser) -> None:
        self.guidance = guidance
        self.view = view
        self.process = view.process
        self.sample_shape = view.sample_shape
        self.device = view.device

    def __call__(
        self, x: Tensor, level: Level, cond: Conditioning, memory: Any = None
    ) -> Prediction:
        """Estimate clean sample and noise of ``x`` in one network call.

        Which rows need both branches is known on the CPU beforehand.

        Raises:
            ConfigError: conditions that have no unconditional twin.
            ValueError: a network with memory, and rows whose guidance begins before others'.
        """
        if cond.labels is None and cond.text is None and cond.pooled_text is None:
            raise ConfigError(
                f"guidance.scale={self.guidance.scale:g} needs a class or text condition to guide "
                "by, but none was given (is the model unconditional?). Use guidance=none."
            )
        scale = self.guidance.scale_at(level, self.process)
        guided = (scale != 1.0).expand(len(x)).nonzero()[:, 0]
        memory = memory or {"conditional": None, "null": None}
        if len(guided) == 0:
            own = self.view(x, level, cond, memory["conditional"])
            own.memory = _pack(own.memory, memory["null"])
            return own
        own, null = self._both(x, level, cond, memory, guided)
        null_memory = null.memory
        if len(guided) < len(x):
            null_memory = put_rows(memory["null"], guided, null.memory)
        index = guided.to(x.device, non_blocking=True)
        weight = on(scale if len(scale) == 1 else scale[guided], x)

        def guide(conditional: Tensor, unconditional: Tensor) -> Tensor:
            moved = unconditional + weight * (conditional[index] - unconditional)
            return conditional.index_copy(0, index, moved)

        return Prediction(
            clean=guide(own.clean, null.clean),
            noise=guide(own.noise, null.noise),
            memory=_pack(own.memory, null_memory),
            cost=own.cost.index_add(0, guided, null.cost),
        )

    def _both(
        self, x: Tensor, level: Level, cond: Conditioning, memory: dict[str, Any], guided: Tensor
    ) -> tuple[Prediction, Prediction]:
        """Evaluate all rows with their condition, and the rows ``guided`` without."""
        index = guided.to(x.device, non_blocking=True)
        null_cond = cond.select(guided).null()
        null_memory = take_rows(memory["null"], guided)
        if (memory["conditional"] is None) != (null_memory is None):
            # guidance begins only now: the fresh branch has no memory to lay beside the other's
            own = self.view(x, level, cond, memory["conditional"])
            return own, self.view(x[index], level.select(guided), null_cond, null_memory)
        n = len(x)
        out = self.view(
            torch.cat((x, x[index])),
            level.select(torch.cat((torch.arange(n, device="cpu"), guided))),
            Conditioning.cat([cond, null_cond]),
            cat_tensors([memory["conditional"], null_memory]),
        )
        return _rows(out, slice(0, n)), _rows(out, slice(n, None))


def _rows(out: Prediction, rows: slice) -> Prediction:
    memory = map_tensors(out.memory, lambda tensor: tensor[rows])
    return Prediction(out.clean[rows], out.noise[rows], memory, out.cost[rows])


def _pack(conditional: Any, null: Any) -> dict[str, Any] | None:
    if conditional is None and null is None:
        return None
    return {"conditional": conditional, "null": null}
