"""Parity of IRN with its official program: both directions, log-determinants and gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from genscale.io.converters.irn import config_from_official
from genscale.upscaling.irn import IRN
from genscale.upscaling.rescaling_losses import quantise
from scripts.parity import Case, Comparison


def run(case: Case) -> list[Comparison]:
    """Compare outputs as the case holds them; gradients with and without kept activations."""
    model: IRN = IRN(**config_from_official(case.config))
    model.load_state_dict(case.group("state"))
    inputs, expected = case.group("input"), case.group("output")
    got: dict[str, Tensor] = {}
    with torch.no_grad():
        got["forward"], log_det = model.transform(inputs["hr"])
        got["jacobian_forward"] = log_det.reshape(1)
        got["lr_quantised"] = quantise(got["forward"][:, : model.small_channels])
        got["inverse_of_forward"], inverse = model.transform(got["forward"], inverse=True)
        got["jacobian_inverse"] = inverse.reshape(1)
        if "z_sample" in inputs:
            got["inverse_sampled"] = model.restore(got["lr_quantised"], inputs["z_sample"])
    results = [case.compare(name, got[name], value) for name, value in expected.items()]
    results.append(case.compare("invertible", got["inverse_of_forward"], inputs["hr"]))
    for reversible in (True, False):
        model.zero_grad()
        model.operations.reversible = reversible
        torch.autograd.backward(model.transform(inputs["hr"])[0].square().mean())
        own = dict(model.named_parameters())
        word = "rebuilt" if reversible else "kept"
        for name, value in case.group("grad").items():
            grad = own[name].grad
            assert grad is not None
            results.append(case.compare(f"grad {name} ({word})", grad, value))
    return results
