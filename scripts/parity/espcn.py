"""Parity of ESPCN with two PyTorch ports: outputs and gradients."""

from __future__ import annotations

import torch

from genscale.io.converters.espcn import config_from_official, from_official
from genscale.upscaling.espcn import ESPCN
from scripts.parity import Case, Comparison


def run(case: Case) -> list[Comparison]:
    """Compare the picture and the gradient of its mean square."""
    model: ESPCN = ESPCN(**config_from_official(case.config))
    model.load_state_dict(from_official(case.group("state")))
    model.eval()
    out = model(case.group("input")["lr"], model.scale)
    results = [case.compare("sr", out, case.group("output")["sr"])]
    torch.autograd.backward(out.square().mean())
    own = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, expected in from_official(case.group("grad")).items():
        grad = own[name]
        assert grad is not None
        results.append(case.compare(f"grad {name}", grad, expected))
    return results
