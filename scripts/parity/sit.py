"""Parity of SiT with its official program: outputs, guided outputs and gradients.

Paths, losses and sampling are checked in ``sit_sampling``.
"""

from __future__ import annotations

from importlib import import_module

from scripts.parity import Case, Comparison, dit


def run(case: Case) -> list[Comparison]:
    """Run one case; what kind it is follows from the settings it holds."""
    if "hidden_size" in case.config:
        return dit.run_model(case, whole=False)
    # loaded only where it is needed: it brings the samplers with it
    sampling = import_module("scripts.parity.sit_sampling")
    comparisons: list[Comparison] = sampling.run(case)
    return comparisons
