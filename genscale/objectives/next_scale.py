"""Next-scale prediction: all tokens of a scale at once, given the scales before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.backbones.base import Backbone, ScaleBackbone
from genscale.errors import ConfigError
from genscale.layers.scales import scale_spans
from genscale.objectives.base import Batch, Family, LossOutput, Objective
from genscale.objectives.progressive import ProgressiveScales
from genscale.objectives.scale_view import ScaleView
from genscale.rng import StepRandom


@dataclass(frozen=True, slots=True, kw_only=True)
class NextScale(Objective):
    """Cross-entropy of the tokens of all scales under teacher forcing (arXiv:2404.02905).

    Every token counts 1 / L, so that fine scales, which have most tokens, count most.

    Args:
        label_smoothing: share of the target spread over all codes, in [0, 1).
        progressive: which scales are trained when; None for all, always.
    """

    family: ClassVar[Family] = "scale_wise"

    label_smoothing: float = 0.0
    progressive: ProgressiveScales | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ConfigError(
                f"objective.label_smoothing must be in [0, 1), but {self.label_smoothing} was "
                "given. 0 is the published choice."
            )

    def loss(self, backbone: Backbone, batch: Batch, rng: StepRandom) -> LossOutput:
        """Compute the loss, with loss and accuracy of every scale and of the last one.

        Args:
            backbone: a scale-wise one.
            batch: tokens ``clean`` ``(B, L)`` and their ``features``.
            rng: not used; nothing is drawn.
        """
        assert isinstance(backbone, ScaleBackbone)
        assert batch.features is not None
        spans = scale_spans(backbone.scales)
        count, newest = len(spans), 1.0
        if self.progressive is not None:
            count, newest = self.progressive.stage(batch.samples_seen, count)
        start, end = spans[count - 1]
        tokens = batch.clean[:, :end]
        logits = backbone(batch.features[:, :end], batch.cond, range(count)).logits
        errors = F.cross_entropy(
            logits.flatten(0, 1),
            tokens.flatten(),
            label_smoothing=self.label_smoothing,
            reduction="none",
        ).view_as(tokens)
        weighted = errors
        if newest < 1.0:
            weighted = torch.cat((errors[:, :start], newest * errors[:, start:]), dim=1)
        # over all L tokens also where fewer are trained: a scale keeps its weight
        per_sample = weighted.sum(dim=1) / batch.clean.shape[1]
        with torch.no_grad():
            terms = scale_terms(errors.detach(), logits.argmax(dim=-1) == tokens, backbone)
        time = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
        return LossOutput(per_sample.mean(), terms, per_sample.detach(), time)

    def view(
        self, backbone: Backbone, tokenizer: Any = None, *, shape: tuple[int, ...] | None = None
    ) -> ScaleView:
        """Return the generator view; see :class:`~genscale.objectives.scale_view.ScaleView`."""
        assert isinstance(backbone, ScaleBackbone)
        return ScaleView(backbone, tokenizer, shape=shape)


def scale_terms(errors: Tensor, right: Tensor, backbone: ScaleBackbone) -> dict[str, Tensor]:
    """Return mean loss and accuracy of every scale, from values ``(B, L)`` a token."""
    terms: dict[str, Tensor] = {"accuracy": right.float().mean()}
    for k, (start, end) in enumerate(scale_spans(backbone.scales)):
        if start < errors.shape[1]:
            terms[f"loss_scale_{k}"] = errors[:, start:end].mean()
            terms[f"accuracy_scale_{k}"] = right[:, start:end].float().mean()
    return terms
