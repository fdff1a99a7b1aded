"""What a pipeline hands out: a batch of finished samples, and how they came about."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from genscale.search.base import SearchResult


@dataclass(frozen=True, slots=True)
class Generated:
    """A batch of finished samples.

    Shapes:
        ids: ``(n,)`` int64 numbers of the samples in their set.
        images: ``(n, C, H, W)`` uint8, or clips ``(n, C, T, H, W)``.
        labels: ``(n,)`` int64, or None for an unconditional model.
        nfe: ``(n,)`` network evaluations spent on each.
        captions: n prompts, or None for a model that reads no text.
        search: how they were found, where they were searched for; its rows are the samples.
    """

    ids: Tensor
    images: Tensor
    labels: Tensor | None
    nfe: Tensor
    captions: tuple[str, ...] | None = None
    search: SearchResult | None = None
