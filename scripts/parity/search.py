"""Parity of what searches are made of; cases that are not known here are skipped."""

from __future__ import annotations

from scripts.parity import (
    Case,
    Comparison,
    d2d_loss,
    feynman_kac,
    flow_sde,
    geneval,
    neighbours,
    noise_regularisers,
)


def run(case: Case) -> list[Comparison] | None:
    """Run a case, or return None."""
    if case.name.startswith("geneval"):
        return geneval.run(case)
    if case.name.startswith("d2d_loss"):
        return d2d_loss.run(case)
    if case.name.startswith("fk_"):
        return feynman_kac.run(case)
    if case.name.startswith("neighbours"):
        return neighbours.run(case)
    if case.name.startswith("noise_regularisers"):
        return noise_regularisers.run(case)
    return flow_sde.run(case) if case.name.startswith("flow_sde") else None
