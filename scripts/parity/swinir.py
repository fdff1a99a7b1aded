"""Parity of SwinIR with its official program: outputs, features of the trunk and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from genscale.io.converters.swin import config_from_official, from_official, to_official
from genscale.upscaling.swinir import SwinIR
from scripts.parity import Case, Comparison


def run(case: Case) -> list[Comparison]:
    """Run one case."""
    model = SwinIR(**config_from_official(case.config))
    model.load_state_dict(from_official(case.group("state"), model))
    model.eval()
    scale = model.scales[0]
    inputs = case.group("input")
    results = compare_outputs(case, model, inputs["lr"], {"sr": scale})
    results += compare_gradients(
        case,
        model,
        lambda: model(inputs.get("lr_grad", inputs["lr"]), scale),
        {},
    )
    return results


def compare_outputs(case: Case, model: Any, x: Tensor, scales: dict[str, int]) -> list[Comparison]:
    """Compare upscaled inputs, and the features of the trunk.

    Args:
        case: the case.
        model: a SwinIR or LUA.
        x: its input.
        scales: of the outputs by name.
    """
    results = []
    for name, expected in case.group("output").items():
        if name != "features" and name not in scales:
            raise KeyError(f"The case holds output/{name}, which this adapter does not know.")
        with torch.no_grad():
            if name == "features":
                got = model.trunk(model.trunk.enter(x))
            else:
                got = model(x, scales[name])
        results.append(case.compare(name, got, expected))
    return results


def compare_gradients(
    case: Case, model: Any, run_model: Callable[[], Tensor], names: dict[int, str]
) -> list[Comparison]:
    """Compare gradients of the mean of squared outputs.

    Args:
        case: the case.
        model: a SwinIR or LUA.
        run_model: gives the output.
        names: what heads are called officially.
    """
    grads = case.group("grad")
    if not grads:
        return []
    torch.autograd.backward(run_model().square().mean())
    own = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }
    official = to_official(own, model.config, names=names)
    return [case.compare(f"grad {name}", official[name], grad) for name, grad in grads.items()]
