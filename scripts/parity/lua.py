"""Parity of LUA with its official program: both heads, features of the trunk and gradients."""

from __future__ import annotations

from genscale.io.converters.swin import config_from_official, from_official
from genscale.upscaling.lua import LUA
from scripts.parity import Case, Comparison
from scripts.parity.swinir import compare_gradients, compare_outputs


def run(case: Case) -> list[Comparison]:
    """Run one case; gradients are those of the head that its settings name first."""
    model = LUA(**config_from_official(case.config))
    model.load_state_dict(from_official(case.group("state"), model))
    model.eval()
    inputs = case.group("input")
    scales = {head["name"]: int(head["scale"]) for head in case.config["heads"]}
    results = compare_outputs(case, model, inputs["latent"], scales)
    first = next(iter(scales.values()))
    names = {scale: name for name, scale in scales.items()}
    results += compare_gradients(
        case, model, lambda: model(inputs.get("latent_grad", inputs["latent"]), first), names
    )
    return results
