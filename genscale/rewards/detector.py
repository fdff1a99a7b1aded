"""What counts things in pictures: scored boxes for the classes that were asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(slots=True)
class Detections:
    """Candidates of B pictures and K classes each.

    Attributes:
        logits: ``(B, K, N)`` log-odds that candidate n is an object of class k, with gradients to
            the pictures.
        boxes: ``(B, K, N, 4)`` left, top, right, bottom in shares of the picture, detached; an
            expanded view where candidates have one box for all classes.
    """

    logits: Tensor
    boxes: Tensor


class Detector(ABC):
    """A frozen detector; what it says of a picture does not depend on the picture's batch mates.

    Attributes:
        threshold: score above which a candidate counts as found, 0 to 1.
        overlapping: whether several candidates may stand for one object, so that they must be
            thinned out; detectors of the DETR family predict a set.
        anything: name of the class that every object belongs to; None if there is no such class.
        licence: of the weights; empty where there are none.
    """

    threshold: float = 0.5
    overlapping: bool = True
    anything: str | None = None
    licence: str = ""

    @property
    def label(self) -> str:
        """What reports and protocols call it: everything that changes its numbers."""
        return type(self).__name__

    def check(self) -> list[str]:
        """Return a sentence for everything that is missing: weights, packages."""
        return []

    @abstractmethod
    def read(self, caption: str) -> dict[str, int]:
        """Return how many of which class a caption asks for.

        Raises:
            ConfigError: it asks for nothing that this detector knows; the sentence quotes it.
        """

    @abstractmethod
    def number(self, name: str) -> int:
        """Return the number of a class that :meth:`read` names, or of :attr:`anything`."""

    @abstractmethod
    def detect(self, images: Tensor, classes: Tensor) -> Detections:
        """Find candidates.

        Args:
            images: ``(B, 3, H, W)`` float32 in [0, 1].
            classes: ``(B, K)`` int64 on the CPU, the classes to look for in each picture.
        """

    def to(self, device: torch.device | str) -> Self:
        """Move the network, if there is one."""
        return self
