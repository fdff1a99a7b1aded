"""Parity of resampling with the programs of DAS and of the twisted diffusion sampler (MIT)."""

from __future__ import annotations

from typing import get_args

from genscale.search.resampling import Scheme, effective_size, normalise, resample
from scripts.parity import Case, Comparison


def run(case: Case) -> list[Comparison]:
    """Resample every population with every scheme that the case has."""
    inputs, outputs = case.group("input"), case.group("output")
    weights = normalise(inputs["log_weights"])
    atol = float(case.info["tolerance"]["weights"])
    found = {"weights": weights, "ess": effective_size(inputs["log_weights"])}
    # sizes grow with the particles, as their rounding does
    results = [
        Comparison(name, got, outputs[name], atol, atol)
        for name, got in found.items()
        if name in outputs
    ]
    for scheme in get_args(Scheme):
        if scheme in outputs:
            draws = outputs[scheme].shape[1]
            got = resample(weights, inputs["uniforms"], scheme, draws)
            results.append(Comparison(scheme, got, outputs[scheme], 0.0, 0.0))
    return results
