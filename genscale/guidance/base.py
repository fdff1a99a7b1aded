"""The contract of guidance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from genscale.objectives.base import Family, Level
from genscale.objectives.schedule import NoiseProcess


class Guidance(ABC):
    """Turns a view into a guided view of the same signature, and counts its own cost.

    Attributes:
        families: of objectives whose views it can guide.
    """

    families: ClassVar[frozenset[Family]] = frozenset({"diffusion"})

    def check(self, process: NoiseProcess) -> list[str]:
        """Return a sentence for everything that makes no sense on a model's noising process."""
        return []

    def along(self, levels: Level | None) -> Guidance:
        """Return this guidance for a sampler, where it depends on steps.

        Args:
            levels: at which the sampler's steps begin, and where the last one ends; None for a
                sampler without levels of its own.
        """
        return self

    @property
    def active(self) -> bool:
        """Whether samples are other ones than without it; a scale of 1 says no."""
        return getattr(self, "scale", None) not in (None, 1.0)

    @abstractmethod
    def wrap(self, view: Any) -> Any:
        """Return the guided view; branches run in one batch, each with a memory of its own."""

    @property
    def label(self) -> str:
        """What protocols call it: everything that its scale and interval do not say."""
        return type(self).__name__


class Unguided(Guidance):
    """One conditional evaluation a call."""

    families: ClassVar[frozenset[Family]] = frozenset({"diffusion", "scale_wise"})

    def wrap(self, view: Any) -> Any:
        """Return the view itself."""
        return view
