"""The contract of a reward: pictures and what was asked of them -> numbers, higher is better."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor

if TYPE_CHECKING:
    from genscale.data.module import ImageDataModule

Need = Literal["caption", "label"]


@dataclass(frozen=True, slots=True)
class Request:
    """What one picture was asked to be.

    Attributes:
        caption: the prompt, of a model that reads text.
        label: the class, of a model that knows classes.
    """

    caption: str | None = None
    label: int | None = None


@dataclass(slots=True)
class RewardOutput:
    """What a reward says of B pictures.

    Attributes:
        value: ``(B,)`` float32, higher is better.
        parts: what the value is made of, by name, ``(B,)`` each; rewards that are no function of
            a single picture order candidates by them, see :meth:`Reward.compare`. ``met``, 1 where
            nothing is left to ask for, ends optimisations.
        valid: ``(B,)`` bool; false where the reward could not judge. None: all are valid.
    """

    value: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    valid: Tensor | None = None


class Reward(ABC):
    """A frozen judge of pictures; the value of a picture does not depend on its batch mates.

    Attributes:
        needs: what a request must have.
        differentiable: whether gradients reach the pictures through :meth:`loss`.
        potential: whether ``exp(lambda value)`` makes sense as a weight. Ranks within a set are
            no potential, so particle methods refuse them.
        licence: of the weights, told to people; empty where there are none.
        learns: whether :meth:`fit` must be called before the first score.
        clips: whether it judges clips ``(B, C, T, H, W)`` rather than pictures.
    """

    needs: frozenset[Need] = frozenset()
    differentiable: bool = False
    potential: bool = True
    licence: str = ""
    learns: bool = False
    clips: bool = False

    @property
    def label(self) -> str:
        """What reports and protocols call it: everything that changes its numbers."""
        return type(self).__name__

    def check(self) -> list[str]:
        """Return a sentence for everything that is missing: weights, packages."""
        return []

    def problems(self, requests: Sequence[Request]) -> list[str]:
        """Return a sentence for what these requests lack; told before anything is sampled."""
        missing = sorted(
            need for need in self.needs if any(getattr(r, need) is None for r in requests)
        )
        return [
            f"reward {self.label} judges by the {need} of a picture, but the model's samples have "
            f"none. Choose another reward=..., or the run of a model with {need}s."
            for need in missing
        ]

    def fit(self, datamodule: ImageDataModule) -> None:
        """Learn from a data set's pictures and labels; rewards with ``learns`` alone do."""
        raise NotImplementedError(f"Reward {self.label} learns nothing.")

    def prepare(self, requests: Sequence[Request]) -> Any:
        """Return what is computed once a request: embeddings of texts, parsed captions.

        The handle is what :meth:`score` takes; row i belongs to request i.
        """
        return tuple(requests)

    @abstractmethod
    def score(self, images: Tensor, handle: Any, index: Tensor) -> RewardOutput:
        """Judge pictures.

        Args:
            images: ``(B, C, H, W)`` float32 in [0, 1], never quantised by the caller; clips
                ``(B, C, T, H, W)`` where :attr:`clips`.
            handle: from :meth:`prepare`.
            index: ``(B,)`` int64 on the CPU, which request each picture belongs to.
        """

    def loss(self, images: Tensor, handle: Any, index: Tensor) -> Tensor:
        """Return ``(B,)`` numbers to minimise, with gradients to the pictures.

        Raises:
            NotImplementedError: the reward is not differentiable.
        """
        if not self.differentiable:
            raise NotImplementedError(f"Reward {self.label} has no gradient.")
        return -self.score(images, handle, index).value

    def compare(self, output: RewardOutput, group: Tensor) -> Tensor:
        """Return ``(B,)`` numbers that order the candidates of each request among themselves.

        Args:
            output: of all candidates that compete.
            group: ``(B,)`` int64 on the CPU, which request each belongs to.
        """
        return output.value

    def to(self, device: torch.device | str) -> Self:
        """Move the reward's network, if it has one."""
        return self
