"""Parity of DiT with its official program: outputs, guided outputs and gradients.

Training losses and sampling are checked in ``dit_sampling``.
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from genscale.backbones.base import BackboneOutput
from genscale.backbones.dit import DiT
from genscale.conditioning.base import NULL_LABEL, Conditioning
from genscale.io.converters.dit import config_from_official, from_official, to_official
from scripts.parity import Case, Comparison


def run(case: Case) -> list[Comparison]:
    """Run one case; what kind it is follows from the settings it holds."""
    if "model" in case.config:
        # loaded only where it is needed: it brings the samplers with it
        sampling = import_module("scripts.parity.dit_sampling")
        comparisons: list[Comparison] = sampling.run(case)
        return comparisons
    return run_model(case, whole=True)


def run_model(case: Case, *, whole: bool) -> list[Comparison]:
    """Compare one network's outputs and gradients.

    Args:
        case: holds the official model's settings, and ``cfg_scale`` where guided outputs are.
        whole: the official network returns the logits of the variance too.
    """
    settings = {name: value for name, value in case.config.items() if name != "cfg_scale"}
    model: DiT = DiT(**config_from_official(settings, parity=True))
    model.load_state_dict(from_official(case.group("state"), model))
    model.eval()
    inputs, outputs = case.group("input"), case.group("output")
    known = {"out": "", "out_cfg": "2"}
    results: list[Comparison] = []
    for name, expected in outputs.items():
        if name not in known:
            raise KeyError(f"The case holds output/{name}, which this adapter does not know.")
        suffix = known[name]
        x, t, cond = (
            inputs["x" + suffix],
            inputs["t" + suffix].float(),
            _labels(model, inputs["y" + suffix]),
        )
        if name == "out_cfg":
            x = x[: len(x) // 2].repeat(2, 1, 1, 1)  # the second half is ignored there
        got = _channels(model(x, t, cond), whole=whole)
        if name == "out_cfg":
            got = _guide_three_channels(got, case.config["cfg_scale"])
        results.append(case.compare(name, got, expected))
        if name == "out" and bool((t == t[0]).all()):  # the shared-time hint must change nothing
            shared = _channels(model(x, t[:1], cond), whole=whole)
            results.append(case.compare("shared time", shared, expected))
    if grads := case.group("grad"):
        output = model(inputs["x"], inputs["t"].float(), _labels(model, inputs["y"]))
        torch.autograd.backward(_channels(output, whole=whole).square().mean())
        own = {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in model.named_parameters()
        }
        official = to_official(own, model.config)
        results += [
            case.compare(f"grad {name}", official[name], grad) for name, grad in grads.items()
        ]
    return results


def _labels(model: DiT, labels: Tensor) -> Conditioning:
    return Conditioning(labels=labels.masked_fill(labels == model.num_classes, NULL_LABEL))


def _channels(output: BackboneOutput, *, whole: bool) -> Tensor:
    """Return the official output: with the logits of the variance where there are some."""
    if whole and "variance" in output.aux:
        return torch.cat((output.sample, output.aux["variance"]), dim=1)
    return output.sample


def _guide_three_channels(output: Tensor, scale: float) -> Tensor:
    """Guide the first three channels only, as the official programs do; both halves get them."""
    cond, uncond = output[:, :3].chunk(2)
    guided = uncond + scale * (cond - uncond)
    return torch.cat((torch.cat((guided, guided)), output[:, 3:]), dim=1)
