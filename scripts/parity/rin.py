"""Parity of RIN with lucidrains' program: outputs and gradients."""

from __future__ import annotations

import torch

from genscale.backbones.rin import RIN
from genscale.conditioning.base import Conditioning
from genscale.io.converters.rin import config_from_official, from_official, to_official
from scripts.parity import Case, Comparison


def run(case: Case) -> list[Comparison]:
    """Run one case: whatever outputs and gradients it holds."""
    model: RIN = RIN(**config_from_official(case.config, parity=True))
    model.load_state_dict(from_official(case.group("state"), model))
    model.eval()
    inputs, outputs = case.group("input"), case.group("output")
    latents = inputs.get("latent_self_cond")
    memory = None
    if latents is not None:
        memory = {"latents": latents, "known": torch.ones(len(latents), dtype=torch.bool)}
    cond = Conditioning(reference=inputs.get("x_self_cond"))
    output = model(inputs["x"], inputs["time"], cond, memory)
    got = {"pixels": output.sample, "latents": output.memory["latents"]}
    unknown = set(outputs) - set(got)
    if unknown:
        raise KeyError(f"The case holds output/{min(unknown)}, which this adapter does not know.")
    results = [case.compare(name, got[name], expected) for name, expected in outputs.items()]
    if grads := case.group("grad"):
        torch.autograd.backward(output.sample.square().mean())
        own = {
            name: torch.zeros_like(value) if value.grad is None else value.grad
            for name, value in model.named_parameters()
        }
        official = to_official(own, model.config)
        results += [case.compare(f"grad {name}", official[name], g) for name, g in grads.items()]
    return results
