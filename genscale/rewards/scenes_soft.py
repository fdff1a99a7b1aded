"""How well a picture shows what its caption says, with gradients: the scene detector's view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from genscale.data.scenes.grammar import RELATIONS, Requirement
from genscale.data.scenes.relations import OVERLAP, THRESHOLD
from genscale.rewards.base import Request, Reward, RewardOutput
from genscale.rewards.counting import Asked, CountLoss, read_requests, suppress
from genscale.rewards.detector import Detections
from genscale.rewards.scene_detector import SceneDetector
from genscale.rewards.scenes import requirements, scene_problems

_MOST = 16  # objects of a class that are told apart
_AXIS = {"left of": (-1.0, 0.0), "right of": (1.0, 0.0), "above": (0.0, -1.0), "below": (0.0, 1.0)}


@dataclass(frozen=True, slots=True)
class SoftHandle:
    """What requests ask for.

    Attributes:
        asked: their groups in the order of the caption, then all objects together.
        relation: ``(R,)`` int64 number of the relation, -1 where there is none.
    """

    asked: Asked
    relation: Tensor


class SceneSoft(Reward):
    """A differentiable stand-in for the oracle of scenes, with the same parts, from 0 to 1.

    With soft counts c_k of the groups that the caption names, n_k asked of each, n in all, and C
    the soft count of all objects:

    - ``count``: exp(-abs(C - n)), 1 where there are as many objects as asked for;
    - ``found``: sum over groups of min(c_k, n_k) / n, as the oracle's colour, or shape where the
      caption names no colour;
    - ``relation``: how surely the likeliest two objects lie as the caption says, by GenEval's
      rule, times how surely they are there; 1 where the caption says nothing (and no part of the
      value then).

    The value is their mean, less a small multiple of the margin loss of
    :class:`~genscale.rewards.counting.D2D`, whose gradient does not vanish where nothing is
    nearly there. Soft counts sum sigmoid(beta z) over candidates that do not overlap.

    Args:
        beta: steepness of the soft indicators.
        pull: weight of the margin loss in the value.
    """

    needs = frozenset({"caption"})
    differentiable = True

    def __init__(self, *, beta: float = 2.0, pull: float = 0.01) -> None:
        self.detector = SceneDetector()
        self.critic = CountLoss(self.detector.threshold, beta=beta)
        self.pull = pull

    @property
    def label(self) -> str:
        """Name and settings."""
        return f"SceneSoft({self.critic.beta:g}, {self.pull:g})"

    def problems(self, requests: Sequence[Request]) -> list[str]:
        """Return a sentence for the first caption that cannot be judged."""
        return super().problems(requests) or scene_problems(self.label, requests)

    def prepare(self, requests: Sequence[Request]) -> SoftHandle:
        """Return what each caption asks for."""
        return SoftHandle(
            read_requests(self.detector, requests, exclude=True),
            torch.tensor([_relation(each) for each in requirements(requests)]),
        )

    def score(self, images: Tensor, handle: SoftHandle, index: Tensor) -> RewardOutput:
        """Judge pictures ``(B, 3, H, W)``; the value has gradients to them."""
        asked = handle.asked.of(index)
        found = self.detector.detect(images, asked.classes.clamp(min=0))
        kept = suppress(found.logits, found.boxes, most=_MOST)
        targets, there = (x.to(images.device) for x in (asked.targets, asked.classes >= 0))
        whole = asked.classes == self.detector.number(self.detector.anything)
        every = whole.to(images.device)
        counts = self.critic.soft_count(found.logits, kept)
        total = (targets * every).sum(1)
        count = torch.exp(-((counts * every).sum(1) - total).abs())
        named = there & ~every
        matched = (torch.minimum(counts, targets.to(counts)) * named).sum(1) / total
        relation = handle.relation[index].to(images.device)
        holds = _holds(found, kept, relation, self.critic)
        applies = relation >= 0
        mean = (count + matched + holds * applies) / (2 + applies.to(count))
        loss = (self.critic.loss(found.logits, targets, kept) * there).sum(1)
        parts = {"count": count, "found": matched, "relation": holds, "loss": loss}
        return RewardOutput(mean - self.pull * loss, parts)

    def to(self, device: torch.device | str) -> Self:
        """Move the detector."""
        self.detector.to(device)
        return self


def _relation(asked: Requirement) -> int:
    return -1 if asked.relation is None else RELATIONS.index(asked.relation)


def _holds(found: Detections, kept: Tensor, relation: Tensor, critic: CountLoss) -> Tensor:
    """Return how surely the best two objects of the first two classes lie as asked ``(B,)``.

    Places are means over the candidates that are kept, weighted by their odds, so that they have
    gradients through the odds; ones where nothing is asked.
    """
    if found.logits.shape[1] < 2:
        return torch.ones_like(relation, dtype=found.logits.dtype)
    logits = found.logits.masked_fill(~kept, -torch.inf)[:, :2]
    weight = torch.softmax(critic.beta * logits, dim=2)
    box = (weight[..., None] * found.boxes[:, :2]).sum(2)  # (B, 2, 4)
    centre, side = (box[..., :2] + box[..., 2:]) / 2, box[..., 2:] - box[..., :2]
    offset = centre[:, 0] - centre[:, 1]
    length = offset.norm(dim=1, keepdim=True).clamp(min=1e-6)
    shortened = torch.sign(offset) * (offset.abs() - OVERLAP * side.sum(1)).clamp(min=0.0)
    axes = torch.tensor([_AXIS[name] for name in RELATIONS], device=offset.device)
    toward = ((shortened / length) * axes[relation.clamp(min=0)]).sum(1)
    sure = torch.sigmoid(critic.beta * (logits.amax(2) - critic.level)).prod(1)
    lies = torch.sigmoid(10.0 * (toward - THRESHOLD)) * sure
    return torch.where(relation >= 0, lies, 1.0)
