"""Whether a picture shows the text that its caption puts in quotes."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genscale.errors import require
from genscale.rewards.base import Request, Reward, RewardOutput
from genscale.rewards.learned import captions_of
from genscale.rewards.preprocessing import as_unit_rgb, to_pictures

# pairs of quotation marks; a single one inside a word is an apostrophe
_QUOTED = re.compile(
    r"\"([^\"]+)\"|\u201c([^\u201d]+)\u201d|\u00ab([^\u00bb]+)\u00bb|\u2018([^\u2019]+)\u2019"
    r"|(?<!\w)'((?:[^']|(?<=\w)'(?=\w))+)'(?!\w)"
)


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read in one picture.

    Attributes:
        lines: from top to bottom.
        confidence: mean of the lines', 0 to 1; 0 where nothing was read.
    """

    lines: tuple[str, ...] = ()
    confidence: float = 0.0


class OCR(Reward):
    """The share of the quoted text's characters that can be read, by the RapidOCR package.

    The value is 1 - d / n, with n characters in all quoted texts and d the edits between each of
    them and the stretch of the read text that is nearest to it. Case and blanks do not count; the
    package reads lines apart and sees blanks where letters are far from each other.

    Args:
        whole: compare with all text that is read, so that further text costs as much as missing
            text: 1 - d / max(n, characters read).
        min_confidence: lines below it are not taken for text.
    """

    needs = frozenset({"caption"})
    licence = "Apache-2.0 (RapidOCR and its PP-OCR models)"

    def __init__(self, *, whole: bool = False, min_confidence: float = 0.5) -> None:
        self.whole = whole
        self.min_confidence = min_confidence
        self._engine: Any = None

    @property
    def label(self) -> str:
        """The reward with its settings."""
        return f"OCR({'whole, ' * self.whole}confidence {self.min_confidence:g})"

    def check(self) -> list[str]:
        """Return a sentence for each package that is missing."""
        problems = []
        for package in ("rapidocr", "onnxruntime"):
            try:
                require(package, what="reward OCR", extra="rewards")
            except ImportError as error:
                problems.append(str(error))
        return problems

    def problems(self, requests: Sequence[Request]) -> list[str]:
        """Return a sentence where a caption quotes no text."""
        found = super().problems(requests)
        if found:
            return found
        silent = [c for c in captions_of(requests) if not quoted_texts(c)]
        if not silent:
            return []
        return [
            f"reward {self.label} reads the text that captions put in quotes, but "
            f"{len(silent)} of {len(requests)} quote none (first: {silent[0]!r}). Write e.g. "
            'a sign that says "OPEN", or choose another reward=...'
        ]

    def prepare(self, requests: Sequence[Request]) -> list[tuple[str, ...]]:
        """Return the quoted texts of every caption, without case and blanks."""
        return [
            tuple(plain_text(text) for text in quoted_texts(caption))
            for caption in captions_of(requests)
        ]

    def score(self, images: Tensor, handle: list[tuple[str, ...]], index: Tensor) -> RewardOutput:
        """Read pictures and compare; pictures of captions without quotes are not valid."""
        readings = [self.read(picture) for picture in to_pictures(as_unit_rgb(images))]
        values, valid = [], []
        for reading, request in zip(readings, index.tolist(), strict=True):
            wanted = [text for text in handle[request] if text]
            values.append(self._value(wanted, plain_text("".join(reading.lines))))
            valid.append(bool(wanted))
        return RewardOutput(
            torch.tensor(values, dtype=torch.float32),
            {"confidence": torch.tensor([each.confidence for each in readings])},
            torch.tensor(valid),
        )

    def read(self, picture: np.ndarray) -> Reading:
        """Return the text in a picture ``(H, W, 3)`` uint8."""
        if self._engine is None:
            require("onnxruntime", what="reward OCR", extra="rewards")
            package: Any = require("rapidocr", what="reward OCR", extra="rewards")
            self._engine = package.RapidOCR(
                params={
                    "Global.log_level": "critical",  # else it logs every empty picture
                    "Global.text_score": self.min_confidence,
                }
            )
        found = self._engine(np.ascontiguousarray(picture[..., ::-1]))  # blue first
        if not found.txts:
            return Reading()
        return Reading(tuple(found.txts), float(np.mean(found.scores)))

    def _value(self, wanted: list[str], read: str) -> float:
        if not wanted:
            return 0.0
        if self.whole:
            target = "".join(wanted)
            return 1.0 - edit_distance(target, read) / max(len(target), len(read))
        edits = sum(edit_distance(text, read, inside=True) for text in wanted)
        return 1.0 - edits / sum(map(len, wanted))


def quoted_texts(caption: str) -> list[str]:
    """Return what stands in quotation marks, in order."""
    return [next(filter(None, match.groups())) for match in _QUOTED.finditer(caption)]


def plain_text(text: str) -> str:
    """Return a text without case, blanks, and different ways to write one character."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def edit_distance(text: str, other: str, *, inside: bool = False) -> int:
    """Return how many characters to put in, take out or change turn one text into the other.

    Args:
        text: what is wanted.
        other: what is there.
        inside: compare with the stretch of ``other`` that is nearest; what surrounds it is free.
    """
    before = [0] * (len(other) + 1) if inside else list(range(len(other) + 1))
    for i, wanted in enumerate(text, 1):
        row = [i]
        for j, found in enumerate(other, 1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (wanted != found)))
        before = row
    return min(before) if inside else before[-1]
