"""Parity of the noise levels of block-causal video: Self-Forcing, SkyReels-V2, diffusion forcing.

Cases hold any number of tables (``skyN``, ``dfN``) whose settings are in the config.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from genscale.objectives.block_schedules import (
    ShiftedTable,
    autoregressive,
    full_sequence,
    pyramid,
    staircase,
    trapezoid,
)
from scripts.parity import Case, Comparison


def run(case: Case) -> list[Comparison]:
    """Compare every output that the case holds."""
    config, outputs, results = case.config, case.group("output"), []
    tables = {name for name in config if re.fullmatch(r"sky\d+", name)}
    found: dict[str, Tensor] = {}
    if "shift" in config:
        found |= _shifted(case)
    for name in tables:
        found |= _sky(case, name)
    for name in config:
        if re.fullmatch(r"df\w*\d+", name):
            found[name] = _forcing(config[name])
    for name, expected in outputs.items():
        got = found[name]
        if not expected.is_floating_point():
            results.append(Comparison(name, got, expected, 0.0, 0.0))
        else:
            results.append(case.compare(name, got, expected))
    return results


def _shifted(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.group("input")
    table = ShiftedTable(
        config["shift"],
        config["num_train_timesteps"],
        config.get("sigma_min", 0.0),
        config.get("extra_one_step", False),
    )
    found = {
        "sigmas": table.sigmas,
        "timesteps": table.timesteps,
        "training_weights": table.weights,
    }
    if "warp_in" in inputs:
        found["warp_out"] = table.warped(inputs["warp_in"])
    if "t" in inputs:
        t, clean, noise = (inputs[name].double() for name in ("t", "x0", "noise"))
        sigma = table.sigma_at(t).view(-1, *[1] * (clean.dim() - 1))
        then = table.next_sigma(t).view_as(sigma)
        x, velocity = (1.0 - sigma) * clean + sigma * noise, noise - clean
        found["add_noise"] = x
        found["training_weight_at_t"] = table.weight_at(t)
        found["x0_then_step"] = x + velocity * (then - sigma)
    return found


def _sky(case: Case, name: str) -> dict[str, Tensor]:
    settings, template = case.config[name], case.group("input")[f"{name}_step_template"]
    found = staircase(
        settings["num_frames"],
        len(template),
        delay=settings["ar_step"],
        window=settings["base_num_frames"],
        ready=settings["num_pre_ready"],
        block_size=settings["causal_block_size"],
    )
    # what frames that have not begun, and clean ones, are labelled with
    ends = template.new_tensor([999]), template.new_tensor([0])
    labels = torch.cat((ends[0], template, ends[1]))
    return {
        f"{name}_step_matrix": labels[found.index],
        f"{name}_step_index": found.index,
        f"{name}_update_mask": found.update.to(torch.uint8),
        f"{name}_valid_interval": found.window,
    }


def _forcing(settings: dict[str, object]) -> Tensor:
    kind, length = str(settings["kind"]), int(str(settings["horizon"]))
    steps, delay = int(str(settings["sampling_timesteps"])), settings.get("uncertainty_scale", 1)
    if kind == "autoregressive":
        return autoregressive(length, steps)
    if kind == "full_sequence":
        return full_sequence(length, steps)
    make = trapezoid if kind == "trapezoid" else pyramid
    return make(length, steps, float(str(delay)))
