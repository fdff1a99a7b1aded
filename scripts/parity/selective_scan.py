"""Parity of the selective scan with the official sequential program: outputs and gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from genscale.layers.scan import selective_scan
from genscale.layers.scan.backends import Implementation
from scripts.parity import Case, Comparison

WAYS: dict[str, tuple[Implementation, int, int]] = {
    "reference": ("reference", 64, 1),
    "chunks of 64": ("chunked", 64, 1),
    "chunks of 16": ("chunked", 16, 1),
    "5 lanes": ("chunked", 64, 5),
}


def run(case: Case) -> list[Comparison]:
    """Run one case with every implementation."""
    results: list[Comparison] = []
    outputs, grads = case.group("output"), case.group("grad")
    for way, (implementation, chunk_size, num_lanes) in WAYS.items():
        inputs = {name: value.requires_grad_() for name, value in case.group("input").items()}
        out, last = selective_scan(
            *(inputs[name] for name in ("u", "delta", "A", "B", "C")),
            **{name: inputs.get(name) for name in ("D", "z", "delta_bias")},  # type: ignore[arg-type]
            delta_softplus=case.config["delta_softplus"],
            implementation=implementation,
            chunk_size=chunk_size,
            num_lanes=num_lanes,
        )
        found = {"out": out, "last_state": last}
        for name, expected in outputs.items():
            # stated as "atol 2e-5 + rtol 2e-5", in units of the largest output
            scale = max(1.0, expected.abs().max().item())
            results.append(
                Comparison(f"{name} ({way})", found[name].detach(), expected, 2e-5 * scale, 2e-5)
            )
        torch.autograd.backward(out.square().mean())
        results += [
            _compare_grad(f"grad {name} ({way})", inputs[name].grad, expected)
            for name, expected in grads.items()
        ]
        for value in inputs.values():
            value.grad = None
    return results


def _compare_grad(name: str, got: Tensor | None, expected: Tensor) -> Comparison:
    """Compare with the stated tolerance: 1e-4 of the largest entry."""
    got = torch.zeros_like(expected) if got is None else got
    return Comparison(name, got.detach().clone(), expected, 1e-4 * expected.abs().max().item(), 0.0)
