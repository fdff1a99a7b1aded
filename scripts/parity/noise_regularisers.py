"""Parity of what keeps optimised noises noise: ReNO's and DNO's regularisers, with gradients."""

from __future__ import annotations

from torch import Tensor

from genscale.search.noise_regularisers import norm_penalty, typicality_penalty
from scripts.parity import Case, Comparison


def run(case: Case) -> list[Comparison]:
    """Compare values and gradients; the noises of one DNO run are one sample's."""
    inputs, settings = case.group("input"), case.config["dno"]
    reno = inputs["reno_noise"].requires_grad_()
    dno = inputs["dno_noise"].requires_grad_()
    found = {
        "reno": (case.config["reno_weight"] * norm_penalty(reno), reno),
        "dno": (
            typicality_penalty(dno[None], inputs["dno_permutations"], block=settings["block"]),
            dno,
        ),
    }
    results = []
    for name, (value, noise) in found.items():
        value.sum().backward()
        results += [
            _compare(case, f"output/{name}_regulariser", value),
            _compare(case, f"grad/{name}_noise", noise.grad),
        ]
    return results


def _compare(case: Case, name: str, got: Tensor | None) -> Comparison:
    """Hold a tensor to its reference, relative to the reference's largest element."""
    if got is None:
        raise ValueError(f"There is no {name} of this case.")
    expected = case.tensors[name]
    rel = float(case.info["tolerance"]["rel"])
    return Comparison(name, got.detach(), expected, rel * float(expected.abs().max()), rel)
