"""D2D: a detector's logits as a differentiable critic of how many there are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.errors import ConfigError
from genscale.rewards.base import Request, Reward, RewardOutput
from genscale.rewards.detector import Detections, Detector

Mode = Literal["margin", "plain"]
_NONE = -1  # class of places in a request's row that hold no class


@dataclass(frozen=True, slots=True)
class CountLoss:
    """How far the candidates of a class are from the number asked for; see the paper's critic.

    With the logits sorted, z_(1) >= z_(2) >= ..., c of them above logit(threshold), n asked for,
    and u = beta_low (z - logit(threshold)):

    - c < n: sum over j = c+1..n of softplus(-(u_(j) - beta_low margin)): raise the next best;
    - c > n: sum over j = n+1..c of softplus(u_(j) + beta_low margin): lower the weakest extras;
    - c = n: both for j = n and j = n+1, times ``equal_weight``: keep away from the threshold.

    The plain loss is the distance of n from the soft count, the sum over candidates of
    sigmoid(beta (z - logit(threshold))). Its gradient vanishes far below the threshold, which is
    why the margin loss has a slope of its own.

    Args:
        threshold: score above which a candidate counts, 0 to 1.
        beta: steepness of the soft indicators.
        beta_low: slope of the margin loss.
        margin: logits that candidates should keep from the threshold.
        equal_weight: of the margin terms where the count is right.
        mode: which of both :meth:`loss` is.
    """

    threshold: float = 0.3
    beta: float = 8.0
    beta_low: float = 1.0
    margin: float = 0.5
    equal_weight: float = 0.1
    mode: Mode = "margin"

    @property
    def level(self) -> float:
        """Logit of the threshold."""
        return math.log(self.threshold / (1.0 - self.threshold))

    def count(self, logits: Tensor, kept: Tensor | None = None) -> Tensor:
        """Return how many candidates count, ``(...)`` int64.

        Args:
            logits: ``(..., N)``.
            kept: ``(..., N)`` bool, candidates that stand for no other's object; None: all.
        """
        return _where_kept(logits > self.level, kept).sum(-1)

    def soft_count(self, logits: Tensor, kept: Tensor | None = None) -> Tensor:
        """Return the sum of the soft indicators ``(...)``."""
        return _where_kept(torch.sigmoid(self.beta * (logits - self.level)), kept).sum(-1)

    def met(self, logits: Tensor, targets: Tensor, kept: Tensor | None = None) -> Tensor:
        """Return whether the count is right, and no logit within the margin, ``(...)`` bool."""
        near = _where_kept((logits - self.level).abs() < self.margin, kept).any(-1)
        return (self.count(logits, kept) == targets) & ~near

    def loss(self, logits: Tensor, targets: Tensor, kept: Tensor | None = None) -> Tensor:
        """Return the loss ``(...)``, with gradients to the logits.

        Args:
            logits: ``(..., N)``.
            targets: ``(...)`` int64.
            kept: as for :meth:`count`; gradients reach no other candidate.
        """
        if self.mode == "plain":
            return (self.soft_count(logits, kept) - targets).abs()
        masked = logits if kept is None else logits.masked_fill(~kept, -math.inf)
        ordered = masked.sort(dim=-1, descending=True, stable=True).values
        there = ordered > -math.inf
        height = self.beta_low * (ordered.masked_fill(~there, 0.0) - self.level)
        reach = self.beta_low * self.margin
        place = torch.arange(logits.shape[-1], device=logits.device)  # j - 1
        found, wanted = self.count(logits, kept)[..., None], targets[..., None]
        right = self.equal_weight * (found == wanted)
        to_raise = ((place >= found) & (place < wanted)) + right * (place == wanted - 1)
        to_lower = ((place >= wanted) & (place < found)) + right * (place == wanted)
        terms = to_raise * F.softplus(reach - height) + to_lower * F.softplus(height + reach)
        return (terms * there).sum(-1)


def _where_kept(values: Tensor, kept: Tensor | None) -> Tensor:
    return values if kept is None else values * kept


@torch.no_grad()
def suppress(logits: Tensor, boxes: Tensor, *, overlap: float = 0.5, most: int = 32) -> Tensor:
    """Return which candidates stay when each keeps others off its place, ``(..., N)`` bool.

    The best candidate stays, and those that overlap it by more than ``overlap`` (intersection
    over union) go; then the best of the rest, ``most`` times. What stays above any threshold is
    the same whatever lies below, so that no threshold is needed: the weakest that stay are those
    that could become objects.

    Args:
        logits: ``(..., N)``.
        boxes: ``(..., N, 4)``.
        overlap: intersection over union, 0 to 1.
        most: candidates that stay at most.
    """
    score = logits.detach().clone()
    left, top, right, bottom = boxes.unbind(-1)
    area = (right - left).clamp(min=0) * (bottom - top).clamp(min=0)
    kept = torch.zeros_like(score, dtype=torch.bool)
    for _ in range(min(most, score.shape[-1])):
        value, best = score.max(-1, keepdim=True)
        kept.scatter_(-1, best, kept.gather(-1, best) | (value > -math.inf))
        width = torch.minimum(right, right.gather(-1, best)) - torch.maximum(
            left, left.gather(-1, best)
        )
        height = torch.minimum(bottom, bottom.gather(-1, best)) - torch.maximum(
            top, top.gather(-1, best)
        )
        both = width.clamp(min=0) * height.clamp(min=0)
        union = area + area.gather(-1, best) - both
        score.masked_fill_(both > overlap * union, -math.inf)
        score.scatter_(-1, best, -math.inf)
    return kept


@dataclass(frozen=True, slots=True)
class Asked:
    """Which classes requests ask for, and how many of each.

    Attributes:
        classes: ``(R, K)`` int64, -1 where a request asks for fewer classes.
        targets: ``(R, K)`` int64.
    """

    classes: Tensor
    targets: Tensor

    def of(self, index: Tensor) -> Asked:
        """Return the rows of requests ``index``."""
        return Asked(self.classes[index], self.targets[index])


def read_requests(
    detector: Detector, requests: Sequence[Request], *, exclude: bool = False
) -> Asked:
    """Return what a detector has to look for.

    Args:
        detector: reads the captions.
        requests: all with captions.
        exclude: count all objects too, so that there may be no others.

    Raises:
        ConfigError: a caption that the detector cannot read.
    """
    rows = []
    for request in requests:
        asked = dict(detector.read(request.caption or ""))
        if exclude and detector.anything is not None:
            asked[detector.anything] = sum(asked.values())
        rows.append([(detector.number(name), count) for name, count in asked.items()])
    width = max(map(len, rows))
    filled = torch.tensor([row + [(_NONE, 0)] * (width - len(row)) for row in rows])
    return Asked(filled[..., 0], filled[..., 1])


def detector_problems(reward: str, detector: Detector, requests: Sequence[Request]) -> list[str]:
    """Return a sentence for the first caption that a reward's detector cannot read."""
    for request in requests:
        try:
            detector.read(request.caption or "")
        except ConfigError as error:
            return [f"reward {reward} counts what captions name: {error}"]
    return []


class D2D(Reward):
    """A detector as a differentiable critic of counts (arXiv:2510.19278).

    The loss is :class:`CountLoss` of every class that the caption names, summed. The value is
    -sum of (c - n)^2, less a small share of the loss, so that equal counts are ordered by how
    sure they are. Parts are ``wrong``, the sum of abs(c - n), ``loss``, and ``met``: 1 where all
    counts are right with the margin, at which an optimisation may stop.

    No official program is public; the formula is this project's reading of the paper. An
    optimised picture may please its detector alone: watch another one.

    Args:
        detector: finds the objects.
        threshold: score above which a candidate counts; None takes the detector's own.
        mode: ``margin`` or ``plain``, the ablation.
        exclude: no objects beside those the caption names.
        beta: see :class:`CountLoss`, as those that follow.
        beta_low: slope of the margin loss.
        margin: logits to keep from the threshold.
        equal_weight: of the margin terms where the count is right.
        overlap: candidates that overlap by more stand for one object.
        most: objects of a class that are told apart at most.
        tie_break: share of the loss in the value.

    Raises:
        ConfigError: an unknown mode, a threshold outside (0, 1), or nothing to exclude by.
    """

    needs = frozenset({"caption"})
    differentiable = True

    def __init__(
        self,
        detector: Detector,
        *,
        threshold: float | None = None,
        mode: Mode = "margin",
        exclude: bool = False,
        beta: float = 8.0,
        beta_low: float = 1.0,
        margin: float = 0.5,
        equal_weight: float = 0.1,
        overlap: float = 0.5,
        most: int = 32,
        tie_break: float = 1e-3,
    ) -> None:
        if mode not in get_args(Mode):
            raise ConfigError(
                f"reward.mode='{mode}' is unknown. Choose one of {', '.join(get_args(Mode))}."
            )
        chosen = detector.threshold if threshold is None else threshold
        if not 0.0 < chosen < 1.0:
            raise ConfigError(
                f"reward.threshold={chosen:g} is outside 0 to 1, where scores lie. Give 0.3, say."
            )
        if exclude and detector.anything is None:
            raise ConfigError(
                f"reward.exclude=true counts objects of all classes, which {detector.label} "
                "cannot. Set reward.exclude=false."
            )
        self.detector = detector
        self.exclude = exclude
        self.critic = CountLoss(chosen, beta, beta_low, margin, equal_weight, mode)
        self.overlap = overlap
        self.most = most
        self.tie_break = tie_break
        self.licence = detector.licence

    @property
    def label(self) -> str:
        """Detector, mode and threshold."""
        others = ", exclude" if self.exclude else ""
        critic = self.critic
        return f"D2D({self.detector.label}, {critic.mode}, {critic.threshold:g}{others})"

    def check(self) -> list[str]:
        """Return what the detector lacks."""
        return self.detector.check()

    def problems(self, requests: Sequence[Request]) -> list[str]:
        """Return a sentence for the first caption that cannot be counted by."""
        found = super().problems(requests)
        return found or detector_problems(self.label, self.detector, requests)

    def prepare(self, requests: Sequence[Request]) -> Asked:
        """Return the classes to look for and their numbers."""
        return read_requests(self.detector, requests, exclude=self.exclude)

    def score(self, images: Tensor, handle: Asked, index: Tensor) -> RewardOutput:
        """Judge pictures ``(B, 3, H, W)``; see :class:`~genscale.rewards.base.Reward`."""
        asked, found, kept, there = self._look(images, handle, index)
        wrong = (self.critic.count(found.logits, kept) - asked.targets).abs() * there
        loss = (self.critic.loss(found.logits, asked.targets, kept) * there).sum(1)
        met = (self.critic.met(found.logits, asked.targets, kept) | ~there).all(1)
        value = -wrong.square().sum(1).float() - self.tie_break * loss.float()
        return RewardOutput(
            value,
            {"wrong": wrong.sum(1).float(), "loss": loss.float(), "met": met.float()},
        )

    def loss(self, images: Tensor, handle: Asked, index: Tensor) -> Tensor:
        """Return the critic's loss ``(B,)``, with gradients to the pictures."""
        asked, found, kept, there = self._look(images, handle, index)
        return (self.critic.loss(found.logits, asked.targets, kept) * there).sum(1)

    def _look(
        self, images: Tensor, handle: Asked, index: Tensor
    ) -> tuple[Asked, Detections, Tensor | None, Tensor]:
        """Return what is asked of each picture, candidates, those kept, and ``(B, K)`` asked."""
        asked = handle.of(index)
        found = self.detector.detect(images, asked.classes.clamp(min=0))
        kept = None
        if self.detector.overlapping:
            kept = suppress(found.logits, found.boxes, overlap=self.overlap, most=self.most)
        there = (asked.classes != _NONE).to(images.device)
        return Asked(asked.classes, asked.targets.to(images.device)), found, kept, there

    def to(self, device: torch.device | str) -> Self:
        """Move the detector."""
        self.detector.to(device)
        return self
