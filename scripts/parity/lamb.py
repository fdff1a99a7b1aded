"""Parity of LAMB: parameters after every step, given the gradients of every step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genscale.training.lamb import Lamb
from scripts.parity import Case, Comparison


def run(case: Case) -> list[Comparison]:
    """Compare every output of a case: ``<name>`` starts at ``<name>_0`` with ``grad_<name>``."""
    config, inputs, expected = case.config, case.group("input"), case.group("output")
    model = nn.ParameterDict({name: nn.Parameter(inputs[f"{name}_0"]) for name in expected})
    known = {"lr", "betas", "eps", "weight_decay", "clamp_value"}
    if unknown := set(config) - known:
        raise KeyError(f"The case sets {sorted(unknown)}, which this adapter does not know.")
    settings = {"clamp" if name == "clamp_value" else name: v for name, v in config.items()}
    optimizer = Lamb(**settings).build(model)
    found: dict[str, list[Tensor]] = {name: [] for name in expected}
    for i in range(len(next(iter(expected.values())))):
        for name, parameter in model.items():
            parameter.grad = inputs[f"grad_{name}"][i].clone()
        optimizer.step()
        for name, parameter in model.items():
            found[name].append(parameter.detach().clone())
    return [
        case.compare(name, torch.stack(found[name]), tensor) for name, tensor in expected.items()
    ]
