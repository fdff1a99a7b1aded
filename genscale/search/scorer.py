"""From latents to rewards: decode, judge, and count."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from genscale.rewards.base import Request, Reward, RewardOutput

Decode = Callable[[Tensor], Tensor]
"""Latents ``(B, ...)`` -> pictures ``(B, C, H, W)``, or clips ``(B, C, T, H, W)``, in about
[-1, 1]."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What the reward says of n latents; numbers on the CPU.

    Attributes:
        value: ``(n,)`` float64; -inf where the reward was not finite or not valid.
        group: ``(n,)`` int64 prompts.
        latents: ``(n, ...)`` what was judged.
        images: ``(n, C, H, W)``, or clips ``(n, C, T, H, W)``, in [-1, 1], as decoded.
        parts: what the value is made of, ``(n,)`` float64 each.
    """

    value: Tensor
    group: Tensor
    latents: Tensor
    images: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.value)

    def select(self, index: Tensor) -> Scores:
        """Take rows (int64 on the CPU)."""
        far = index.to(self.latents.device)
        return Scores(
            self.value[index],
            self.group[index],
            self.latents[far],
            self.images[far],
            {name: part[index] for name, part in self.parts.items()},
        )

    @staticmethod
    def cat(parts: Sequence[Scores]) -> Scores:
        """Join scores of one scorer."""
        return Scores(
            torch.cat([part.value for part in parts]),
            torch.cat([part.group for part in parts]),
            torch.cat([part.latents for part in parts]),
            torch.cat([part.images for part in parts]),
            {name: torch.cat([part.parts[name] for part in parts]) for name in parts[0].parts},
        )


class Scorer:
    """A decoder, the reward that a search follows, and those that only watch.

    Args:
        decode: latents to pictures; differentiable where a search needs gradients.
        reward: what is searched for.
        held_out: scored on the returned pictures alone, by name: a search raises its own reward
            whether or not the pictures get better.

    Attributes:
        invalid: rewards so far that were not finite or not valid.
    """

    def __init__(
        self, decode: Decode, reward: Reward, held_out: Mapping[str, Reward] | None = None
    ) -> None:
        self.decode = decode
        self.reward = reward
        self.held_out = dict(held_out or {})
        self.invalid = 0
        self._handle: Any = None
        self._watching: dict[str, Any] = {}

    def problems(self, requests: Sequence[Request]) -> list[str]:
        """Return a sentence for everything that rewards or requests lack."""
        found = []
        for reward in (self.reward, *self.held_out.values()):
            found += reward.check() or reward.problems(requests)
        return found

    def prepare(self, requests: Sequence[Request]) -> None:
        """Begin a search for these requests; groups are their numbers."""
        self._handle = self.reward.prepare(requests)
        self._watching = {name: reward.prepare(requests) for name, reward in self.held_out.items()}

    def score(self, latents: Tensor, images: Tensor, group: Tensor) -> Scores:
        """Judge decoded pictures ``(n, C, H, W)`` or clips ``(n, C, T, H, W)`` in [-1, 1]."""
        return self._scores(
            self.reward.score(_unit(images), self._handle, group), latents, images, group
        )

    def score_with_loss(
        self, latents: Tensor, images: Tensor, group: Tensor
    ) -> tuple[Scores, Tensor]:
        """Judge pictures and return the loss ``(n,)``, which alone has gradients.

        Where the loss is minus the value, the reward looks at the pictures once.
        """
        if type(self.reward).loss is Reward.loss and self.reward.differentiable:
            output = self.reward.score(_unit(images), self._handle, group)
            loss = -output.value
        else:
            loss = self.loss(images, group)
            with torch.no_grad():
                output = self.reward.score(_unit(images), self._handle, group)
        return self._scores(output, latents.detach(), images.detach(), group), loss

    def _scores(
        self, output: RewardOutput, latents: Tensor, images: Tensor, group: Tensor
    ) -> Scores:
        value = output.value.detach().double().cpu()
        good = value.isfinite()
        if output.valid is not None:
            good &= output.valid.cpu()
        self.invalid += int((~good).sum())
        parts = {name: part.detach().double().cpu() for name, part in output.parts.items()}
        return Scores(value.where(good, -torch.inf), group, latents, images, parts)

    def loss(self, images: Tensor, group: Tensor) -> Tensor:
        """Return the reward's loss ``(n,)`` with gradients to the pictures."""
        return self.reward.loss(_unit(images), self._handle, group)

    def compare(self, scores: Scores) -> Tensor:
        """Return ``(n,)`` numbers that order the candidates of each prompt; -inf stays last."""
        output = RewardOutput(scores.value, scores.parts)
        ordered = self.reward.compare(output, scores.group).double().cpu()
        return ordered.where(scores.value > -torch.inf, -torch.inf)

    def watch(self, images: Tensor, group: Tensor) -> dict[str, Tensor]:
        """Return the held-out rewards ``(n,)`` float64 of finished pictures, by name."""
        return {
            name: reward.score(_unit(images), self._watching[name], group).value.double().cpu()
            for name, reward in self.held_out.items()
        }


def _unit(images: Tensor) -> Tensor:
    """Map pictures from [-1, 1] to [0, 1], what lies outside to the nearest."""
    return (images.float() * 0.5 + 0.5).clamp(0.0, 1.0)


def best_first(values: Tensor, group: Tensor, count: int) -> Tensor:
    """Return the rows of the ``count`` best of each group, groups in order, best first.

    Equal values keep their order, so that ties go to the lowest row.

    Args:
        values: ``(n,)``.
        group: ``(n,)`` int64; every group has at least ``count`` rows.
        count: rows a group.
    """
    order = torch.argsort(values, descending=True, stable=True)
    order = order[torch.argsort(group[order], stable=True)]
    sizes = torch.unique_consecutive(group[order], return_counts=True)[1]
    first = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    return order[torch.arange(len(order)) - first < count]
