"""Parity of norm-aware linear attention with its official module: output and gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from genscale.layers.linear_attention import NormAwareLinearAttention, axial_rotation
from scripts.parity import Case, Comparison

# (ours, official)
_NAMES = (("local.", "lepe."), ("norm.", "ln."), ("out.", "out_proj."))
# what the cases state in words
_ATOL, _RTOL, _GRADIENT = 5e-4, 1e-3, 5e-3


def run(case: Case) -> list[Comparison]:
    """Run one case: tables of the rotation, output, and gradients of mean(output^2)."""
    height, width = case.config["H"], case.config["W"]
    size, heads = case.config["dim"], case.config["num_heads"]
    module = NormAwareLinearAttention(size, heads)
    state = case.group("state")
    module.load_state_dict({name: state[_official(name)] for name in module.state_dict()})
    inputs = case.group("input")
    cosine, sine = axial_rotation(
        torch.arange(height).double(), torch.arange(width).double(), size // heads
    )
    results = [
        _compare(name, table[0].repeat_interleave(2, dim=-1), inputs[name])
        for name, table in (("cos", cosine), ("sin", sine))
        if name in inputs
    ]
    x = inputs["x"].requires_grad_()
    y = module(x.flatten(2).transpose(1, 2), (height, width), (cosine, sine))
    y = y.transpose(1, 2).unflatten(-1, (height, width))
    results.append(_compare("out", y, case.group("output")["out"]))
    torch.autograd.backward(y.square().mean())
    own = {_official(name): parameter.grad for name, parameter in module.named_parameters()}
    for name, expected in case.group("grad").items():
        grad = x.grad if name == "x" else own[name]
        if grad is None:
            raise KeyError(f"The case holds grad/{name}, which got none here.")
        bound = _GRADIENT * expected.abs().max().item()
        results.append(Comparison(f"grad {name}", grad, expected, bound, 0.0))
    return results


def _official(name: str) -> str:
    for ours, official in _NAMES:
        if name.startswith(ours):
            return official + name[len(ours) :]
    return name


def _compare(name: str, got: Tensor, expected: Tensor) -> Comparison:
    return Comparison(name, got.detach(), expected, _ATOL, _RTOL)
