"""Parity of LaMamba with its official program: predictions, guided predictions, gradients."""

from __future__ import annotations

import torch

from genscale.backbones.lamamba import LaMamba
from genscale.conditioning.base import NULL_LABEL, Conditioning
from genscale.io.converters.lamamba import config_from_official, from_official, to_official
from scripts.parity import Case, Comparison

GUIDANCE_SCALE = 2.5  # the cases say so in words


def run(case: Case) -> list[Comparison]:
    """Run one case."""
    model: LaMamba = LaMamba(**config_from_official(case.config))
    model.load_state_dict(from_official(case.group("state"), model))
    model.eval()
    inputs, outputs = case.group("input"), case.group("output")
    x, t = inputs["x"], inputs["t"]
    labels = inputs["y"].masked_fill(inputs["y"] == case.config["num_classes"], NULL_LABEL)
    cond = Conditioning(labels=labels)
    output = model(x, t, cond)
    out = torch.cat((output.sample, output.aux["variance"]), dim=1)

    # the official guidance gives both halves of its batch the first half's picture and time
    half = len(x) // 2
    first, time = x[:half].repeat(2, 1, 1, 1), t[:1]
    with torch.no_grad():
        both = model(first, time, cond)
    wanted, unwanted = both.sample.split(half)
    guided = (unwanted + GUIDANCE_SCALE * (wanted - unwanted)).repeat(2, 1, 1, 1)
    found = {"out": out.detach(), "cfg_out": torch.cat((guided, both.aux["variance"]), dim=1)}
    results = [Comparison(name, found[name], expected, 2e-4, 1e-3)
               for name, expected in outputs.items()]  # fmt: skip

    torch.autograd.backward(out.square().mean())
    own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    grads = to_official(own, model.config)
    for name, grad in case.group("grad").items():
        tolerance = 2e-3 * grad.abs().max().item()
        results.append(Comparison(f"grad {name}", grads[name], grad, tolerance, 0.0))
    return results
