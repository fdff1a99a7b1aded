"""Parity of VAR with its official program: logits, gradients, sampling, and the recipe's laws."""

from __future__ import annotations

import re
from importlib import import_module

import torch
from torch import Tensor

from genscale.backbones.var import VAR
from genscale.io.converters.var import config_from_official, from_official, to_official
from genscale.layers.scales import scale_spans
from scripts.parity import Case, Comparison
from scripts.parity.scale_sampling import (
    QuantizerAlone,
    conditions,
    gradients,
    sample,
    whole_features,
)

# of a case, not of the constructor
_NOT_THE_MODEL = ("prog_si", "cond_drop_rate")


def run(case: Case) -> list[Comparison]:
    """Run one case; what kind it is follows from the settings it holds."""
    if "depth" not in case.config:
        # loaded only where it is needed: it brings the training room with it
        recipe = import_module("scripts.parity.var_recipe")
        comparisons: list[Comparison] = recipe.run(case)
        return comparisons
    settings = {name: v for name, v in case.config.items() if name not in _NOT_THE_MODEL}
    model: VAR = VAR(**config_from_official(settings, parity=True))
    model.load_state_dict(from_official(case.group("state"), model))
    model.eval()
    return [*_logits_and_gradients(case, model), *_sampling(case, model)]


def _logits_and_gradients(case: Case, model: VAR) -> list[Comparison]:
    inputs = case.group("input")
    features = whole_features(inputs["x_BLCv_wo_first_l"], model)
    last = case.config.get("prog_si")
    stop = scale_spans(model.scales)[-1 if last is None or last < 0 else last][1]
    logits = model(features[:, :stop], conditions(inputs["label"], model)).logits
    results = [_compare(case, "logits", logits, case.tensors["output/logits"], "logits")]
    torch.autograd.backward(logits.square().mean())
    official = to_official(gradients(model), model.config)
    for name, grad in case.group("grad").items():
        atol = _number(case, "grad", r"(\S+) rel") * grad.abs().max().item()
        results.append(Comparison(f"grad {name}", official[name], grad, atol, 0.0))
    return results


def _sampling(case: Case, model: VAR) -> list[Comparison]:
    runs = case.info.get("runs", {})
    if not runs:
        return []
    quantiser = QuantizerAlone(case.group("vae_state"), case.config["patch_nums"], case.config)
    results = []
    for name, stated in runs.items():
        found = sample(model, quantiser, stated["kw"])
        expected = {k: case.tensors[f"output/{name}_{k}"] for k in ("ids", "guided_logits", "fhat")}
        smooth = stated["kw"].get("more_smooth")
        results += [
            Comparison(f"{name} ids", found.tokens, expected["ids"], 0.0, 0.0),
            _compare(
                case,
                f"{name} guided logits",
                torch.cat(found.logits, dim=1),
                expected["guided_logits"],
                "fhat" if smooth else "logits",
                smooth=smooth,
            ),
            _compare(case, f"{name} latent", found.latent, expected["fhat"], "fhat", smooth=smooth),
        ]
    return results


def _compare(
    case: Case, name: str, got: Tensor, expected: Tensor, kind: str, *, smooth: bool = False
) -> Comparison:
    start = r"smooth runs " if smooth else ""
    atol = _number(case, kind, start + r"(\S+) abs")
    rtol = 0.0 if kind == "fhat" else _number(case, kind, r"(\S+) rel")
    return Comparison(name, got.detach(), expected, atol, rtol)


def _number(case: Case, kind: str, pattern: str) -> float:
    """Read a tolerance, which the cases say in words."""
    match = re.search(pattern, case.info["tolerance"][kind])
    if match is None:
        raise KeyError(f"The case does not say '{pattern}' of its {kind}.")
    return float(match[1])
