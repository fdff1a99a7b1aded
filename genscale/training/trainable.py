"""The contract of what is trained without being a backbone: losses, and who learns from which."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from genscale.rng import StepRandom

MODEL = "model"  # the group that every trainable has: what is averaged and exported


@dataclass(frozen=True, slots=True)
class PictureBatch:
    """What a :class:`Trainable` learns from.

    Attributes:
        images: ``(B, C, H, W)`` float32 in [-1, 1].
        position: ``(B,)`` int64 places of the pictures in the global stream.
        step: optimizer steps taken before this one.
        size: pictures of the whole optimizer step, over all processes and micro-batches; their
            positions are ``step * size`` to ``(step + 1) * size - 1``.
    """

    images: Tensor
    position: Tensor
    step: int
    size: int


@dataclass(frozen=True, slots=True)
class GroupLosses:
    """One loss for every group of parameters that learns from this batch.

    Attributes:
        by_group: scalars by the group's name; each is differentiated by the parameters of its own
            group only. A group without a loss does not step.
        terms: detached scalars for the log.
    """

    by_group: dict[str, Tensor]
    terms: dict[str, Tensor] = field(default_factory=dict)


class Trainable(nn.Module, ABC):
    """A network with all that its training needs besides: rivals, statistics, weights of losses.

    The network itself is no submodule: the training run owns it, with its averages, and its
    weights lie in a checkpoint once. Whatever else is a parameter or buffer here is saved too, so
    that an interrupted run continues with the same bits.

    Args:
        model: the network.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._held = (model,)

    @property
    def model(self) -> Any:
        """The network that is trained."""
        return self._held[0]

    def groups(self) -> dict[str, nn.Module]:
        """Return what learns, by name: one optimizer each, ``model`` first."""
        return {MODEL: self.model}

    @abstractmethod
    def losses(self, batch: PictureBatch, rng: StepRandom) -> GroupLosses:
        """Return the losses of one batch of this process.

        Statistics of the batch may be put aside here; they are used by :meth:`end_step`, since a
        step may have several batches.
        """

    def end_step(self, step: int, finite: Tensor) -> None:
        """Do what follows an optimizer step, on all processes together.

        Args:
            step: optimizer steps taken before this one.
            finite: bool ``()`` on the device: False where the step was skipped for a gradient that
                is not finite, the same on all processes.
        """

    def counts(self) -> dict[str, Tensor]:
        """Return running numbers for the log, scalars on the device."""
        return {}

    def finish(self, network: nn.Module, images: Tensor) -> None:
        """Write what can be known only after training into a network, before it is exported.

        Args:
            network: a copy of :attr:`model` with the weights that are exported.
            images: ``(n, C, H, W)`` training pictures in [-1, 1].
        """


class TrainableRecipe(ABC):
    """Settings of a training, from which a :class:`Trainable` is built around a network."""

    @abstractmethod
    def build(self, model: nn.Module, *, seed: int) -> Trainable:
        """Return the training of ``model``.

        Raises:
            ConfigError: a network that the recipe does not train.
        """

    def check(self) -> list[str]:
        """Return a sentence for everything that would be missing once training begins."""
        return []


def all_reduce(tensor: Tensor) -> Tensor:
    """Return the sum over all processes; of one process, the tensor itself."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor


def all_mean(tensor: Tensor) -> Tensor:
    """Return the mean over all processes; of one process, the tensor itself."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return all_reduce(tensor) / torch.distributed.get_world_size()
    return tensor
