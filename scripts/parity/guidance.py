"""Parity of guidance: classifier-free, rescaled, adaptive projected, and CFG-Zero*."""

from __future__ import annotations

import torch
from torch import Tensor

from genscale.guidance.apg import projected
from genscale.guidance.branches import extrapolate
from genscale.guidance.cfg import rescaled
from genscale.guidance.zero_star import projection
from scripts.parity import Case, Comparison


def run(case: Case) -> list[Comparison]:
    """Compare every output of a case; the leading axis is time, along which momentum runs."""
    config, inputs = case.config, case.group("input")
    scale = float(config["scale"])
    found: dict[str, list[Tensor]] = {name: [] for name in case.group("output")}

    def apg(update: Tensor, own: Tensor, null: Tensor, max_norm: float) -> Tensor:
        return null + scale * projected(update, own, max_norm, config["apg_eta"])

    momentum = torch.zeros_like(inputs["cond"][0])
    for own, null in zip(inputs["cond"], inputs["uncond"], strict=True):
        momentum = own - null + config["apg_momentum"] * momentum
        guided = extrapolate(own, null, scale)
        alpha = projection(own, null)
        step = {
            "cfg": guided,
            "cfg_rescaled": rescaled(guided, own, config["rescale"]),
            "apg": apg(momentum, own, null, config["apg_norm_threshold"]),
            # without momentum the official program was called without threshold too
            "apg_no_momentum": apg(own - null, own, null, 0.0),
            "cfg_zero_star": extrapolate(own, alpha * null, scale),
            "cfg_zero_star_alpha": alpha.flatten(),
        }
        for name, values in found.items():
            values.append(step[name])
    atol = float(case.info["tolerance"]["abs"])
    return [
        Comparison(name, torch.stack(found[name]), expected, atol, 0.0)
        for name, expected in case.group("output").items()
    ]
