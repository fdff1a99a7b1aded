"""Classifier-free guidance of scale-wise models: a weight a scale, and an end to the null half."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError, did_you_mean
from genscale.guidance.base import Guidance
from genscale.objectives.base import Family, ScaleDecoder, ScalePrediction
from genscale.objectives.memory import map_tensors

Form = Literal["ramp", "constant"]


class ScaleGuidance(Guidance):
    """u + w_k (c - u) on the logits of scale k, with conditional c and unconditional u.

    Both halves run in one batch. From scale ``stop`` on the unconditional half is not computed at
    all, which saves most of its cost: the last scales have most tokens (arXiv:2412.01819).

    Args:
        scale: weight w at the last scale; 1 means none. Programs that write (1 + t) c - t u, as
            VAR's, have w = 1 + t: the published 1.5 is scale 2.5.
        form: ``"ramp"``: w_k = 1 + (w - 1) k / (S - 1), none at the first scale (arXiv:2404.02905);
            ``"constant"``: the same at every scale.
        per_scale: a weight for every scale instead of ``scale`` and ``form``.
        start: the first scale that is guided; before it samples differ more.
        stop: the first scale that is not guided any more; None guides to the end.

    Raises:
        ConfigError: an unknown form or an impossible number.
    """

    families: ClassVar[frozenset[Family]] = frozenset({"scale_wise"})

    def __init__(
        self,
        scale: float = 2.5,
        *,
        form: Form = "ramp",
        per_scale: Sequence[float] | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> None:
        for name, value in (("scale", scale), *(("per_scale", w) for w in per_scale or ())):
            if not 0.0 <= value < math.inf:
                raise ConfigError(
                    f"guidance.{name} must be finite and not negative, but is {value}. "
                    "1 means no guidance, 2 to 5 is usual."
                )
        if form not in get_args(Form):
            raise ConfigError(
                f"guidance.form must be one of {', '.join(get_args(Form))}, but is {form!r}."
                f"{did_you_mean(str(form), get_args(Form))}"
            )
        if start < 0 or (stop is not None and stop < start):
            raise ConfigError(
                f"guidance.start={start} and guidance.stop={stop} must be scales with "
                "0 <= start <= stop. stop=null guides to the end."
            )
        self.scale = float(scale)
        self.form = form
        self.per_scale = None if per_scale is None else tuple(float(w) for w in per_scale)
        self.start = start
        self.stop = stop

    @property
    def label(self) -> str:
        """The name, and everything that makes the weights."""
        weights = f" {list(self.per_scale)}" if self.per_scale is not None else f" {self.form}"
        begin = f" from scale {self.start}" if self.start else ""
        return f"ScaleGuidance{weights}{begin}" + (
            "" if self.stop is None else f" up to scale {self.stop}"
        )

    def weight(self, scale: int, num_scales: int) -> float:
        """Return w_k of a scale.

        Raises:
            ConfigError: ``per_scale`` of another number of scales.
        """
        if self.per_scale is not None and len(self.per_scale) != num_scales:
            raise ConfigError(
                f"guidance.per_scale has {len(self.per_scale)} weights, but the model has "
                f"{num_scales} scales. Give one weight a scale."
            )
        if scale < self.start or not self.runs_null(scale):
            return 1.0
        if self.per_scale is not None:
            return self.per_scale[scale]
        if self.form == "constant":
            return self.scale
        return 1.0 + (self.scale - 1.0) * (scale / max(num_scales - 1, 1))

    def runs_null(self, scale: int) -> bool:
        """Whether the unconditional half is computed at a scale."""
        return self.stop is None or scale < self.stop

    def branches(self, scale: int) -> int:
        """Return how many rows a particle has at a scale: 1 or 2."""
        return 1 if self.neutral or not self.runs_null(scale) else 2

    @property
    def neutral(self) -> bool:
        """Whether no scale is guided."""
        weights = (self.scale,) if self.per_scale is None else self.per_scale
        return all(w == 1.0 for w in weights) or self.stop == 0

    def wrap(self, view: ScaleDecoder) -> ScaleDecoder:
        """Return the guided view; without any guidance the view itself."""
        self.weight(0, len(view.scales))  # speaks up before anything runs
        return view if self.neutral else GuidedScales(self, view)


class GuidedScales(ScaleDecoder):
    """A view whose particles have two rows: with the condition, and without.

    Memory is the network's for 2B rows, seen as ``(B, 2, ...)``, so that it follows particles like
    any other. After the last guided scale, only rows ``[:, 0]`` are computed and written.

    Args:
        guidance: weights.
        view: the network.
    """

    def __init__(self, guidance: ScaleGuidance, view: ScaleDecoder) -> None:
        self.guidance = guidance
        self.view = view
        self.tokenizer = view.tokenizer
        self.scales = view.scales
        self.vocab_size = view.vocab_size
        self.needs_prefix = view.needs_prefix
        self.sample_shape = view.sample_shape
        self.device = view.device

    def begin(self, cond: Conditioning, batch: int) -> Any:
        """Return the memory of both halves of trajectories that begin.

        Raises:
            ConfigError: conditions that have no unconditional twin.
        """
        if cond.labels is None and cond.text is None and cond.pooled_text is None:
            raise ConfigError(
                f"guidance.scale={self.guidance.scale:g} needs a class or text condition to guide "
                "by, but none was given (is the model unconditional?). Use guidance=none."
            )
        asked = replace(cond, requests=None)  # no network reads them
        both = Conditioning.cat([asked, asked.null()])
        order = torch.arange(2 * batch, device=self.device).view(2, batch).t().flatten()
        memory = self.view.begin(both.select(order), 2 * batch)
        return map_tensors(memory, lambda rows: rows.unflatten(0, (batch, 2)))

    def __call__(
        self, features: Tensor, scale: int, cond: Conditioning, memory: Any = None
    ) -> ScalePrediction:
        """Predict the guided logits of one scale, in one network call."""
        batch = len(features)
        if memory is None:
            memory = self.begin(cond, batch)
        weight = self.guidance.weight(scale, len(self.scales))
        if not self.guidance.runs_null(scale):
            own = map_tensors(memory, lambda rows: rows[:, 0])
            out = self.view(features, scale, cond, own)
            return ScalePrediction(out.logits, _put_back(memory, out.memory), out.cost)
        rows = map_tensors(memory, lambda rows: rows.flatten(0, 1))
        out = self.view(features.repeat_interleave(2, dim=0), scale, cond, rows)
        wanted, unwanted = out.logits.unflatten(0, (batch, 2)).unbind(1)
        logits = wanted if weight == 1.0 else weight * wanted - (weight - 1.0) * unwanted
        kept = map_tensors(out.memory, lambda rows: rows.unflatten(0, (batch, 2)))
        return ScalePrediction(logits, kept, out.cost.view(batch, 2).sum(1))


def _put_back(both: Any, own: Any) -> Any:
    """Return memory ``(B, 2, ...)`` with new rows of the first branch.

    Buffers that the network wrote in place are these rows already.
    """
    if isinstance(both, Tensor):
        mine = both[:, 0]
        if mine.data_ptr() == own.data_ptr() and mine.shape == own.shape:
            return both
        return torch.stack((own, both[:, 1]), dim=1)
    if isinstance(both, dict):
        return {name: _put_back(part, own[name]) for name, part in both.items()}
    if isinstance(both, list | tuple):
        return type(both)(_put_back(part, new) for part, new in zip(both, own, strict=True))
    return both
