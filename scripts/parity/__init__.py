"""Parity with official programs: reads golden cases, runs our objects, compares numbers.

A case is ``<folder>/<name>.json`` beside ``<name>.safetensors``. An adapter for a system is a
module ``scripts/parity/<system>.py`` with one function ``run(case) -> list[Comparison]``; the
system is the name of the folder. Adapters read everything from the json.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Comparison:
    """One number or tensor of ours beside the reference, with its tolerance."""

    name: str
    got: Tensor
    expected: Tensor
    atol: float
    rtol: float

    @property
    def absolute(self) -> float:
        """Largest absolute difference (infinite where shapes differ or values are not finite)."""
        if self.got.shape != self.expected.shape:
            return float("inf")
        if self.got.numel() == 0:
            return 0.0
        got, expected = self.got.double(), self.expected.double()
        error = (got - expected).abs().masked_fill(got == expected, 0.0).max().item()
        return error if error == error else float("inf")

    @property
    def relative(self) -> float:
        """Largest absolute difference over the largest reference value."""
        scale = self.expected.double().abs().max().item() if self.expected.numel() else 0.0
        return self.absolute / scale if 0 < scale < float("inf") else self.absolute

    @property
    def passed(self) -> bool:
        """Whether every element is within atol + rtol * |expected|."""
        if self.got.shape != self.expected.shape:
            return False
        return bool(
            torch.allclose(
                self.got.double(), self.expected.double(), rtol=self.rtol, atol=self.atol
            )
        )


class Case:
    """One golden case."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.system = path.parent.name
        self.name = path.stem
        self.info: dict[str, Any] = json.loads(path.read_text())
        self.config: dict[str, Any] = self.info.get("config", {})

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the case by their full name."""
        return load_file(self.path.with_suffix(".safetensors"))

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors below ``prefix/``, the prefix removed."""
        start = prefix + "/"
        return {
            name[len(start) :]: value
            for name, value in self.tensors.items()
            if name.startswith(start)
        }

    def tolerance(self) -> tuple[float, float]:
        """Return (atol, rtol) as the case states them."""
        stated = self.info.get("tolerance", {})
        return float(stated.get("atol", 0.0)), float(stated.get("rtol", 0.0))

    def compare(self, name: str, got: Tensor | float, expected: Tensor | float) -> Comparison:
        """Put a result beside its reference, with the case's own tolerance."""
        atol, rtol = self.tolerance()
        return Comparison(
            name,
            torch.as_tensor(got).detach(),
            torch.as_tensor(expected, dtype=torch.float64)
            if isinstance(expected, float)
            else expected,
            atol,
            rtol,
        )


def compare_in_words(words: str, name: str, got: Tensor, expected: Tensor) -> Comparison:
    """Put a result beside its reference within a tolerance like ``1e-5 abs + 1e-5 rel (...)``.

    Integers must be equal. A relative tolerance without an absolute one is meant of the tensor as
    a whole: entries near zero of a gradient are sums that cancel.
    """
    if not expected.is_floating_point():
        return Comparison(name, got, expected, 0.0, 0.0)
    stated = {kind: float(number) for number, kind in re.findall(r"([\d.e+-]+) (abs|rel)", words)}
    if not stated:
        raise ValueError(f"The case's tolerance '{words}' names no number with abs or rel.")
    atol, rtol = stated.get("abs", 0.0), stated.get("rel", 0.0)
    if atol == 0:
        atol = rtol * expected.abs().max().item()
    return Comparison(name, got.detach(), expected, atol, rtol)


def find_cases(root: Path, systems: list[str] | None = None) -> Iterator[Case]:
    """Yield the cases below ``root`` in order of their names, optionally of some systems only."""
    for path in sorted(root.glob("*/*.json")):
        if systems is None or path.parent.name in systems:
            yield Case(path)


def run_case(case: Case) -> list[Comparison] | None:
    """Run one case, or return None where no adapter for its system exists."""
    if not (HERE / f"{case.system}.py").is_file():
        return None
    adapter = importlib.import_module(f"scripts.parity.{case.system}")
    comparisons: list[Comparison] | None = adapter.run(case)
    return comparisons
