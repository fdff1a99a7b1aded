"""Samples against their captions, beside the level of chance: what such metrics share."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from genscale.errors import ConfigError, DataError, did_you_mean
from genscale.metrics.keyed import KeyedMetric
from genscale.metrics.protocol import Setting

CAPTION_BYTES = 128  # the longest caption of six objects has 121
_SHIFTS = 8  # foreign captions that every sample is held against for the level of chance


class CaptionedMetric(KeyedMetric):
    """How well samples show what their captions say, by an oracle that reads pixels.

    Every measure is the mean over the samples whose caption it applies to. The details of each
    give its level of chance: the same samples against captions of others (up to eight each, a
    fixed choice). A model that ignores its captions scores that.

    Args:
        measures: names, each ``<prefix>_<result>``.
        known: all names there are.
        kind: what is measured, for the sentence that refuses an unknown name.
        rows: axes and type of what is kept of a sample beside its caption.

    Attributes:
        prefix: of the names.
        description: name of the oracle in protocols; the number grows when its rules change.

    Raises:
        ConfigError: if a measure is unknown.
    """

    prefix: str
    description: str

    def __init__(
        self,
        measures: Sequence[str],
        known: tuple[str, ...],
        kind: str,
        rows: dict[str, tuple[int, torch.dtype]],
    ) -> None:
        for name in measures:
            if name not in known:
                raise ConfigError(
                    f"'{name}' is no measure of {kind}. Known are {', '.join(known)}."
                    f"{did_you_mean(name, known)}"
                )
        super().__init__(measures, {"captions": (2, torch.uint8), **rows})

    @property
    def settings(self) -> tuple[Setting, ...]:
        """Numbers that change the values, for the protocol."""
        return ()

    @abstractmethod
    def update(
        self,
        images: Tensor,
        captions: Sequence[str] | None = None,
        sample_ids: Tensor | None = None,
    ) -> None:
        """Read samples and keep what is seen with the captions.

        Args:
            images: uint8.
            captions: what each sample was to show; None for samples without captions.
            sample_ids: ``(B,)`` int64 global numbers; on one process they may be left out.

        Raises:
            ConfigError: if a caption does not follow the grammar.
            DataError: if the number of captions is another, or the samples cannot be read.
        """

    @abstractmethod
    def _asked(self, caption: str) -> Any:
        """Return what a caption asks for; it is spelt as its own ``str``."""

    @abstractmethod
    def _seen(self, row: Tensor) -> Any:
        """Return what was seen of a sample, of what :meth:`update` kept as ``seen``."""

    @abstractmethod
    def _results(self, seen: Any, asked: Any) -> Mapping[str, float | None]:
        """Return every result by name; None where it does not apply."""

    def _keep(
        self, sample_ids: Tensor | None, captions: Sequence[str] | None, seen: Tensor
    ) -> None:
        """Keep captions (as the grammar spells them) and what was seen, a row each."""
        texts = torch.zeros(len(seen), CAPTION_BYTES, dtype=torch.uint8)
        for i, caption in enumerate(captions or ()):
            text = str(self._asked(caption)).encode()
            texts[i, : len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._append(sample_ids, len(seen), {"captions": texts, "seen": seen})

    def compute(self) -> dict[str, float]:
        """Return every active measure by name, as far as it applies to some caption.

        Returns:
            The measures; an empty dict if no sample has a caption. :attr:`details` holds for each
            the number of samples it applies to and its level of chance.

        Raises:
            DataError: if there are no samples.
        """
        started = time.perf_counter()
        _, rows = self.collected()
        captioned = rows["captions"][:, 0] > 0
        asked = [self._asked(_text(row)) for row in rows["captions"][captioned]]
        seen = [self._seen(row) for row in rows["seen"][captioned]]
        own = self._means(asked, seen)
        shifts = range(1, min(_SHIFTS + 1, len(asked)))
        foreign = [each for by in shifts for each in asked[by:] + asked[:by]]
        chance = self._means(foreign, seen * len(shifts))
        seconds = round((time.perf_counter() - started) / max(1, len(self.active)), 3)
        values: dict[str, float] = {}
        self.details = {}
        for name in self.active:
            if name not in own:
                continue
            values[name], count = own[name]
            self.details[name] = {"n": count, "seconds": seconds}
            if name in chance:
                self.details[name]["chance"] = chance[name][0]
        return values

    def _means(self, asked: Sequence[Any], seen: Sequence[Any]) -> dict[str, tuple[float, int]]:
        """Return mean and number of the results of every measure that applies to some caption."""
        results: dict[str, list[float]] = {}
        for requirement, each in zip(asked, seen, strict=True):
            for task, result in self._results(each, requirement).items():
                if result is not None:
                    results.setdefault(f"{self.prefix}_{task}", []).append(result)
        return {name: (sum(each) / len(each), len(each)) for name, each in results.items()}


def _text(row: Tensor) -> str:
    return row.numpy().tobytes().rstrip(b"\0").decode()


def check_captions(captions: Sequence[str] | None, count: int) -> None:
    """Raise a ``DataError`` unless there is one caption a sample, or none at all."""
    if captions is not None and len(captions) != count:
        raise DataError(f"{count} images came with {len(captions)} captions. Give one an image.")
