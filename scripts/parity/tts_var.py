"""Parity of TTS-VAR: features, clusters, resampling weights, and what follows a candidate."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from genscale import rng
from genscale.objectives.memory import take_rows
from genscale.rng import Purpose
from genscale.search.diversity import (
    FeatureMode,
    candidate_clusters,
    candidate_features,
    canonical_sign,
    select_diverse,
)
from genscale.search.tts_var import guarded_weights, potential
from scripts.parity import Case, Comparison

_DRAWN = re.compile(r"multinomial\(rate_(\w+),\s*B//(\d+),.*generator seed (\d+)\)")
_MODES: dict[str, FeatureMode] = {"pool": "pool", "pca": "pca_raw", "pca_all": "pca_all"}


def run(case: Case) -> list[Comparison]:
    """Compare every output of a case."""
    expected = case.group("output")
    return [_compare(case, name, expected[name]) for name in sorted(expected)]


def _compare(case: Case, name: str, expected: Tensor) -> Comparison:
    stated = case.info["tolerance"]
    if name.startswith("rate_"):
        got = _weights(case, name.removeprefix("rate_")).to(expected)
        return Comparison(name, got, expected, 0.0, _number(stated["rates"]))
    if name.endswith(("_features", "_scores")):
        got = _features(case, name.rpartition("_")[0]).to(expected)
        return Comparison(name, _signed_as(got, expected), expected, _number(stated["pca"]), 0.0)
    if name.endswith("_selected_ids"):
        return _compare_selection(case, name, expected)
    drawn = _drawn(case)
    if name == "cached_k_after":
        keys = case.tensors["input/cached_k"]
        memory = {"cond": keys[: len(keys) // 2], "null": keys[len(keys) // 2 :]}
        after = take_rows(memory, drawn)
        return Comparison(name, torch.cat((after["cond"], after["null"])), expected, 0.0, 0.0)
    if name.startswith("resampled_ids_"):
        return Comparison(name, drawn, expected, 0.0, 0.0)
    raise ValueError(f"The output '{name}' of {case.system}/{case.name} is not known.")


def _number(words: str) -> float:
    found = re.search(r"[\d.]+e[+-]?\d+", words)
    if found is None:
        raise ValueError(f"The case's tolerance '{words}' names no number.")
    return float(found[0])


def _weights(case: Case, kind: str) -> Tensor:
    """Return the unnormalised weights exp(lambda potential) ``(B,)``."""
    past = case.tensors["input/score_history"][:, : case.config["current_scale"]]
    history = torch.cat((past, case.tensors["input/score"][:, None]), dim=1)
    strength = float(case.config["lam"])
    return torch.exp(strength * potential(history, kind))


def _features(case: Case, kind: str) -> Tensor:
    tokens = case.tensors[f"input/patch_tokens_{'pool' if kind == 'pool' else 'pca'}"]
    return candidate_features(tokens, _MODES[kind])


def _signed_as(got: Tensor, expected: Tensor) -> Tensor:
    """Flip rows that point the other way: a principal direction's sign means nothing."""
    return torch.where((got * expected).sum(dim=1, keepdim=True) < 0, -got, got)


def _compare_selection(case: Case, name: str, expected: Tensor) -> Comparison:
    """Compare selections as sets.

    The two members of a cluster of two are equally near to its centroid. Ours takes the lower one;
    which one the program took was left to rounding, so it is named by the lower one here. A member
    that is further away keeps its own name, and fails.
    """
    kind, count = name.removesuffix("_selected_ids"), case.config["target"]
    features = (
        canonical_sign(_features(case, "pca")) if kind == "pca_canonical" else _features(case, kind)
    )
    keys = rng.key(torch.zeros((), dtype=torch.int64), Purpose.DIVERSITY)
    uniforms = rng.uniform(keys, (16, count))
    got = select_diverse(features, count, uniforms)
    labels, squares = candidate_clusters(features, uniforms)
    slack = 1e-7 * float(torch.cdist(features.double(), features.double()).max()) ** 2
    named = []
    for row in expected.tolist():
        distance = squares[labels[row]]
        equal = (distance - distance[row]).abs() <= 1e-5 * distance[row] + slack
        named.append(int((equal & (labels == labels[row])).nonzero()[0, 0]))
    return Comparison(name, got, torch.tensor(sorted(named)), 0.0, 0.0)


def _drawn(case: Case) -> Tensor:
    """Return the candidates that live on, drawn by torch's own generator as the case says."""
    words = next(
        text for key, text in case.info["outputs"].items() if key.startswith("resampled_ids_")
    )
    found = _DRAWN.search(words)
    if found is None:
        raise ValueError(f"The case does not say how it draws: '{words}'.")
    kind, part, seed = found.groups()
    weights = guarded_weights(_weights(case, kind)[None])[0]
    generator = torch.Generator("cpu").manual_seed(int(seed))
    count = case.config["B"] // int(part)
    return torch.multinomial(weights, count, replacement=True, generator=generator)
