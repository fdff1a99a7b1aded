"""The contract of guidance."""

from __future__ import annotations

from abc import ABC, abstractmethod

from genscale.objectives.base import Denoiser


class Guidance(ABC):
    """Turns a view into a guided view of the same signature, and counts its own cost."""

    @abstractmethod
    def wrap(self, view: Denoiser) -> Denoiser:
        """Return the guided view; branches run in one batch, each with a memory of its own."""


class Unguided(Guidance):
    """One conditional evaluation a call."""

    def wrap(self, view: Denoiser) -> Denoiser:
        """Return the view itself."""
        return view
