"""Parity of DiMR with its official program: model outputs, losses, targets and gradients."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from genscale.backbones.dimr import DiMR
from genscale.conditioning.base import NULL_LABEL, Conditioning
from genscale.io.converters.dimr import config_from_official, from_official, to_official
from genscale.objectives.pyramid import pyramid_targets
from scripts.parity import Case, Comparison


def run(case: Case) -> list[Comparison]:
    """Run one case; what kind it is follows from the settings it holds."""
    if "solver" in case.config or "n_timestep" in case.config:
        # loaded only where it is needed: it brings the samplers with it
        sampling = import_module("scripts.parity.dimr_sampling")
        comparisons: list[Comparison] = sampling.run(case)
        return comparisons
    return _run_model(case)


def _build(case: Case, *, fused: bool) -> DiMR:
    settings = config_from_official(case.config["model"], parity=True)
    model: DiMR = DiMR(**settings, fused_upsample=fused)
    model.load_state_dict(from_official(case.group("state"), model))
    model.eval()
    return model


def _run_model(case: Case) -> list[Comparison]:
    inputs, outputs, grads = (case.group(name) for name in ("input", "output", "grad"))
    labels = inputs.get("y")
    if labels is not None:
        null = case.config["model"].get("num_classes", 0) - 1
        labels = labels.masked_fill(labels == null, NULL_LABEL)
    cond, t = Conditioning(labels=labels), inputs["log_snr"]
    results: list[Comparison] = []
    for fused in (True, False):
        way = "fused" if fused else "plain"
        model = _build(case, fused=fused)
        output = model(inputs["x"], t, cond)
        pyramid = output.aux["pyramid"]
        found: dict[str, Tensor] = {f"pred_{r}": y for r, y in enumerate(pyramid)}
        if "eps" in inputs:
            targets = pyramid_targets(inputs["eps"], [(y.shape[2], y.shape[3]) for y in pyramid])
            found |= {f"target_{target.shape[-1]}": target for target in targets}
            if "loss_coeffs" in case.config:
                found["loss"] = torch.stack(
                    [
                        weight * (y - target).square().mean((1, 2, 3))
                        for weight, y, target in zip(
                            case.config["loss_coeffs"], pyramid, targets, strict=True
                        )
                    ]
                ).sum(0)
        for name, expected in outputs.items():
            if name not in found:
                raise KeyError(f"The case holds output/{name}, which this adapter does not know.")
            results.append(case.compare(f"{name} ({way})", found[name], expected))
        if bool((t == t[0]).all()):  # the shared-time hint must change nothing
            shared = model(inputs["x"], t[:1], cond).sample
            expected = outputs[f"pred_{len(pyramid) - 1}"]
            results.append(case.compare(f"shared time ({way})", shared, expected))
        if grads:
            results += _compare_grads(case, model, output.sample, grads, way)
    return results


def _compare_grads(
    case: Case, model: DiMR, sample: Tensor, grads: dict[str, Tensor], way: str
) -> list[Comparison]:
    """Compare gradients of mean(sample^2), through the converter that renames the weights."""
    torch.autograd.backward(sample.square().mean())
    own = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }
    official = to_official(own, model.config)
    return [
        case.compare(f"grad {name} ({way})", official[name], expected)
        for name, expected in grads.items()
    ]
