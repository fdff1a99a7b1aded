"""Parity of the Mamba-2 block with the official program: outputs and gradients."""

from __future__ import annotations

import torch

from genscale.layers.mamba2 import Mamba2
from scripts.parity import Case, Comparison

NAMES = {
    "in_proj.weight": "in_proj.weight",
    "conv.weight": "conv1d.weight",
    "conv.bias": "conv1d.bias",
    "step_bias": "dt_bias",
    "log_rate": "A_log",
    "skip": "D",
    "norm_scale": "norm.weight",
    "out_proj.weight": "out_proj.weight",
}


def run(case: Case) -> list[Comparison]:
    """Run one case at once and, as a whole again, in pieces that hand on the state."""
    config, state = case.config, case.group("state")
    block = Mamba2(
        config["d_model"],
        state_size=config["d_state"],
        expansion=config["expand"],
        head_size=config.get("headdim", 64),
        num_groups=config.get("ngroups", 1),
        kernel_size=config["d_conv"],
    )
    block.load_state_dict({ours: state[official] for ours, official in NAMES.items()})
    u, expected = case.group("input")["u"].requires_grad_(), case.group("output")["out"]
    out, _ = block(u)
    atol, rtol = 1e-4, 1e-3  # as stated by the cases, in words
    results = [Comparison("out", out.detach(), expected, atol, rtol)]

    pieces, memory = [], None
    for piece in torch.split(u, [1, 4, 9, u.shape[1] - 14], dim=1):
        y, memory = block(piece, memory)
        pieces.append(y)
    results.append(Comparison("out in pieces", torch.cat(pieces, 1).detach(), expected, atol, rtol))

    torch.autograd.backward(out.square().mean())
    ours = {NAMES[name]: parameter.grad for name, parameter in block.named_parameters()}
    ours["u"] = u.grad
    for name, grad in case.group("grad").items():
        got = ours[name]
        assert got is not None
        results.append(Comparison(f"grad {name}", got, grad, 1e-3 * grad.abs().max().item(), 0.0))
    return results
