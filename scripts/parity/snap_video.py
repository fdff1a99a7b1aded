"""Parity of FIT with the program of its authors' audio model: outputs, every block, gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from genscale.backbones.fit import FIT
from genscale.conditioning.base import Conditioning
from genscale.io.converters.fit import config_from_official, from_official, to_official
from scripts.parity import Case, Comparison


def run(case: Case) -> list[Comparison]:
    """Run one case: whatever outputs and gradients it holds."""
    model: FIT = FIT(**config_from_official(case.config, parity=True))
    model.load_state_dict(from_official(case.group("state"), model))
    model.eval()
    inputs, outputs = case.group("input"), case.group("output")
    x = inputs["x"]
    # clips have their frames before their channels there
    clip = x.transpose(1, 2) if x.dim() == 5 else x
    got: dict[str, Tensor] = {}

    def listen(name: str) -> Any:
        def keep(module: Any, given: Any, output: tuple[Tensor, Tensor]) -> None:
            patches, latents = output
            got[f"{name}/patches"] = patches.reshape(len(x), -1, patches.shape[-1])
            got[f"{name}/latents"] = latents

        return keep

    for i, block in enumerate(model.blocks):
        block.register_forward_hook(listen(f"block{i}"))
    output = model(clip, inputs["noise_labels"], _condition(inputs), _memory(inputs))
    sample = output.sample
    got["F_x"] = sample.transpose(1, 2) if sample.dim() == 5 else sample
    got["latents"] = output.memory["latents"]
    unknown = set(outputs) - set(got)
    if unknown:
        raise KeyError(f"The case holds output/{min(unknown)}, which this adapter does not know.")
    results = [case.compare(name, got[name], expected) for name, expected in outputs.items()]
    if grads := case.group("grad"):
        torch.autograd.backward(sample.square().mean())
        own = {
            name: torch.zeros_like(value) if value.grad is None else value.grad
            for name, value in model.named_parameters()
        }
        official = to_official(own, model.config)
        results += [case.compare(f"grad {name}", official[name], g) for name, g in grads.items()]
    return results


def _condition(inputs: dict[str, Tensor]) -> Conditioning:
    text, mask = inputs.get("text_embeddings"), inputs.get("text_mask")
    if text is not None and mask is not None:  # a sample has all of its text, or none
        mask = mask.bool()[:, None].expand(text.shape[:2])
    return Conditioning(text=text, text_mask=mask, size=inputs.get("resolution"))


def _memory(inputs: dict[str, Tensor]) -> dict[str, Tensor] | None:
    latents = inputs.get("self_cond_latents")
    if latents is None:
        return None
    known = inputs.get("self_cond_mask", torch.ones(len(latents)))
    return {"latents": latents, "known": known.bool()}
