"""Parity of M-VAR with its official program: logits, gradients, and greedy sampling."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from genscale.backbones.base import ScaleBackbone
from genscale.backbones.mvar import MVAR
from genscale.conditioning.base import Conditioning
from genscale.io.converters.mvar import config_from_official, from_official, to_official
from genscale.layers.scales import features_at
from scripts.parity import Case, Comparison
from scripts.parity.scale_sampling import (
    QuantizerAlone,
    conditions,
    gradients,
    sample,
    whole_features,
)


def run(case: Case) -> list[Comparison]:
    """Run one case."""
    model: MVAR = MVAR(**config_from_official(case.config, parity=True))
    state = case.group("state")
    weights = {name: value for name, value in state.items() if not name.startswith("quantize.")}
    model.load_state_dict(from_official(weights, model))
    model.eval()
    inputs, outputs = case.group("input"), case.group("output")
    features = whole_features(inputs["x_BLCv_wo_first_l"], model)
    logits = model(features, conditions(inputs["label"], model)).logits
    results = [_compare(case, "logits", logits, outputs["logits_teacher_forced"])]
    torch.autograd.backward(logits.square().mean())
    official = to_official(gradients(model), model.config)
    share = _number(case, r"relative-to-max (\S+)")
    for name, grad in case.group("grad").items():
        atol = share * grad.abs().max().item()
        results.append(Comparison(f"grad {name}", official[name], grad, atol, 0.0))
    if "ar_label" in inputs:
        results += _greedy(case, model, state)
    return results


def _greedy(case: Case, model: MVAR, state: dict[str, Tensor]) -> list[Comparison]:
    """Compare greedy sampling: raw logits of both halves at every scale, and the latent."""
    outputs, labels = case.group("output"), case.group("input")["ar_label"]
    quantiser = QuantizerAlone(state, case.config["patch_nums"], case.config["vae"])
    factor = float(_stated(case.info["how"], r"cfg=([\d.]+)"))
    settings = {"B": len(labels), "label_B": labels.tolist(), "cfg": factor}
    found = sample(model, quantiser, {**settings, "g_seed": 0, "top_k": 1, "top_p": 0.0})
    results = [_compare(case, "latent", found.latent, outputs["ar_f_hat"])]
    for k, raw in enumerate(_raw_logits(model, quantiser, labels, found.tokens)):
        expected = outputs[f"ar_logits_scale{k}"]
        results.append(_compare(case, f"logits of scale {k}", raw, expected))
        wanted, unwanted = expected.chunk(2)
        t = factor * k / (len(model.scales) - 1)
        guided = (1 + t) * wanted - t * unwanted
        results.append(_compare(case, f"guided logits of scale {k}", found.logits[k], guided))
    return results


@torch.no_grad()
def _raw_logits(
    model: ScaleBackbone, quantiser: QuantizerAlone, labels: Tensor, tokens: Tensor
) -> list[Tensor]:
    """Return logits ``(2 B, l, V)`` scale by scale on given tokens, the null half behind."""
    cond = conditions(labels, model)
    both = Conditioning.cat([cond, cond.null()])
    running = torch.zeros(len(labels), *model.sample_shape)
    memory = model.begin(both, len(both), running.device)
    result = []
    for k, part in enumerate(quantiser.quantizer.split(tokens)):
        features = features_at(running, model.scales[k]).repeat(2, 1, 1)
        output = model(features, both, range(k, k + 1), memory)
        memory = output.memory
        result.append(output.logits)
        running = quantiser.add_scale(running, quantiser.codes(part), k)[0]
    return result


def _compare(case: Case, name: str, got: Tensor, expected: Tensor) -> Comparison:
    atol, rtol = _number(case, r"logits atol (\S+)"), _number(case, r"rtol ([\d.e+-]+)")
    return Comparison(name, got.detach(), expected, atol, rtol)


def _number(case: Case, pattern: str) -> float:
    """Read a tolerance, which the cases say in words."""
    return float(_stated(case.info["tolerance"], pattern))


def _stated(words: str, pattern: str) -> str:
    match = re.search(pattern, words)
    if match is None:
        raise KeyError(f"The case does not say '{pattern}'.")
    return match[1]
