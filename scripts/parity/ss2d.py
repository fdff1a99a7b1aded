"""Parity of the 2-D selective scan with the official program: index tables, outputs, gradients."""

from __future__ import annotations

import torch

from genscale.layers.scan import ScanKind, scan_orders
from genscale.layers.ss2d import SS2D
from scripts.parity import Case, Comparison

NAMES = {
    "in_proj.weight": "in_proj.weight",
    "conv.weight": "conv2d.weight",
    "conv.bias": "conv2d.bias",
    "select": "x_proj_weight",
    "step_weight": "dt_projs_weight",
    "step_bias": "dt_projs_bias",
    "log_rate": "A_logs",
    "skip": "Ds",
    "out_norm.weight": "out_norm.weight",
    "out_norm.bias": "out_norm.bias",
    "out_proj.weight": "out_proj.weight",
}


def run(case: Case) -> list[Comparison]:
    """Run one case."""
    config, state = case.config, case.group("state")
    kind: ScanKind = "continuous" if config["continuous_scan"] else "cross"
    module = SS2D(
        config["d_model"],
        state_size=config["d_state"],
        expansion=config["ssm_ratio"],
        kernel_size=config["d_conv"],
        conv_bias=config["conv_bias"],
        scan=kind,
    )
    module.load_state_dict({name: state[NAMES[name]] for name in module.state_dict()})
    x, outputs = case.group("input")["x"].requires_grad_(), case.group("output")
    out = module(x)
    orders, inverses = scan_orders(kind, x.shape[1], x.shape[2], x.device)
    found = {
        "paths": orders,
        "inverse_paths": inverses,
        "scanned_index_image": orders.float()[None, :, None],
    }
    results = [Comparison("out", out.detach(), outputs["out"], 1e-4, 5e-4)]
    results += [
        Comparison(name, found[name], expected, 0.0, 0.0)
        for name, expected in outputs.items()
        if name != "out"
    ]
    torch.autograd.backward(out.square().mean())
    ours = {NAMES[name]: parameter.grad for name, parameter in module.named_parameters()}
    ours["x"] = x.grad
    for name, grad in case.group("grad").items():
        got = ours[name]
        assert got is not None
        results.append(Comparison(f"grad {name}", got, grad, 1e-3 * grad.abs().max().item(), 0.0))
    return results
