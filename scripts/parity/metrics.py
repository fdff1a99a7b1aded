"""Metric cases: Frechet distance, KID, precision and recall, inception score, Inception features.

The kind of a case is the second half of its json's ``system`` ("metrics/frechet").
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genscale.errors import DataError
from genscale.metrics.frechet import compare_features, compare_gaussians
from genscale.metrics.inception import InceptionFID, InceptionGraph
from genscale.metrics.inception_score import inception_score
from genscale.metrics.kid import cmmd, kernel_distance, kernel_distance_full
from genscale.metrics.moments import Moments
from genscale.metrics.prdc import ball_radii, fidelity_diversity
from genscale.metrics.resize import RESIZE_MODES
from scripts.parity import Case, Comparison


def run(case: Case) -> list[Comparison]:
    kind = str(case.info.get("system", "")).split("/")[-1]
    adapters = {
        "frechet": _frechet,
        "kid": _kid,
        "precision_recall": _precision_recall,
        "inception_score": _inception_score,
        "inception_fid": _inception,
    }
    if kind not in adapters:
        raise DataError(
            f"{case.path} is of the unknown kind '{case.info.get('system')}'. "
            f"Known are metrics/{', metrics/'.join(adapters)}."
        )
    return adapters[kind](case)


def _frechet(case: Case) -> list[Comparison]:
    features = case.group("input")
    first, second = features["features_1"], features["features_2"]
    moments = {"1": Moments.of(first), "2": Moments.of(second)}
    exact = compare_features(first, second).value
    ours: dict[str, Tensor | float] = {"fid": exact}
    for side, value in moments.items():
        ours[f"mu_{side}"] = value.mean
        ours[f"trace_cov_{side}"] = float(value.covariance().trace())
    expected = {name: exact for name in case.info.get("expected", {}) if name.startswith("fid")}
    results = _outputs(case, ours) + _expected(case, expected)
    if min(len(first), len(second)) > first.shape[1]:
        gaussians = [(value.mean, value.covariance()) for value in moments.values()]
        again = compare_gaussians(*gaussians[0], *gaussians[1]).value
        results += _outputs(case, {"fid": again}, only="fid")
    return results


def _kid(case: Case) -> list[Comparison]:
    inputs = case.group("input")
    first, second = inputs["features_1"], inputs["features_2"]
    indices = inputs["subset_indices_1"], inputs["subset_indices_2"]
    distance = kernel_distance(first, second, indices=indices)
    full, embedded = kernel_distance_full(first, second), cmmd(first, second)
    ours: dict[str, Tensor | float] = {
        "kid_subsets": distance.subsets,
        "kid_full": full,
        "cmmd": embedded,
    }
    expected: dict[str, float] = {
        "kid_mean": distance.mean,
        "kid_std_population": distance.std,
        "kid_full": full,
        "cmmd": embedded,
        "torch_fidelity_kernel_inception_distance_mean": distance.mean,
        "torch_fidelity_kernel_inception_distance_std": distance.std,
    }
    return _outputs(case, ours) + _expected(case, expected)


def _precision_recall(case: Case) -> list[Comparison]:
    sets = case.group("input")
    radii: dict[str, Tensor | float] = {}
    ours: dict[str, float] = {}
    for k in case.config["ks"]:
        for side, features in sets.items():
            radii[f"radii_{side}_k{k}"] = ball_radii(features, k)
        for suffix, strict in (("", False), ("_strict", True)):
            shares = fidelity_diversity(sets["real"], sets["fake"], num_neighbours=k, strict=strict)
            for name in ("precision", "recall", "density", "coverage"):
                ours[f"k{k}_{name}{suffix}"] = getattr(shares, name)
                # that program returns float32, so the value is rounded the same way
                ours[f"k{k}_torch_fidelity_{name}"] = float(np.float32(ours[f"k{k}_{name}"]))
    return _outputs(case, radii) + _expected(case, ours)


def _inception_score(case: Case) -> list[Comparison]:
    logits = case.group("input")["logits"]
    splits = int(case.config["splits"])
    score = inception_score(logits, num_splits=splits)
    ours = {"mean": score.mean, "std": score.std}
    for name in case.info.get("expected", {}):
        shuffled = re.fullmatch(r"torch_fidelity_shuffled(\d+)_inception_score_(mean|std)", name)
        if shuffled:
            # that program shuffles the rows with this seed before it splits them
            order = np.random.RandomState(int(shuffled[1])).permutation(len(logits))
            other = inception_score(logits[torch.from_numpy(order)], num_splits=splits)
            ours[name] = getattr(other, shuffled[2])
    tensor = torch.tensor([score.mean, score.std], dtype=torch.float64)
    return _outputs(case, {"inception_score": tensor}) + _expected(case, ours)


def _inception(case: Case) -> list[Comparison]:
    images = case.group("input")["images"]
    state = _recipe_weights(str(case.config["salt"]))
    results = [
        Comparison(f"check/{name}", state[name].flatten()[: len(value)], value, 0.0, 0.0)
        for name, value in case.group("check").items()
    ]
    graph = InceptionGraph()
    counts = {
        "parameters": sum(parameter.numel() for parameter in graph.parameters()),
        "state_dict_entries": len(graph.state_dict()),
    }
    for name, value in counts.items():
        if name in case.info:
            results.append(_exact(name, value, int(case.info[name])))
    taps = _features(InceptionFID(), state, images)
    taps["spatial_2023"] = taps.pop("spatial")
    for mode in RESIZE_MODES:
        if f"2048_{mode}" in case.group("output"):
            taps[f"2048_{mode}"] = _features(InceptionFID(mode=mode), state, images)["2048"]
    atol, rtol = case.tolerance()
    for name, expected in case.group("output").items():
        # the tolerance is relative to the largest value of each tensor
        scale = float(expected.abs().max())
        results.append(Comparison(name, taps[name], expected, atol * scale, rtol))
    return results


def _features(network: InceptionFID, state: dict[str, Tensor], images: Tensor) -> dict[str, Tensor]:
    network.load_weights(state, source="the weight recipe")
    taps: dict[str, Tensor] = network(images)
    return taps


@lru_cache(maxsize=1)
def _recipe_weights(salt: str) -> dict[str, Tensor]:
    """Return the random weights of the cases' recipe, a function of the salt and of each key."""
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in InceptionGraph().state_dict().items()}
    state = {}
    for name, shape in shapes.items():
        seed = int.from_bytes(hashlib.sha256(f"{salt}:{name}".encode()).digest()[:8], "little")
        generator = np.random.default_rng(seed)
        if name.endswith("num_batches_tracked"):
            state[name] = torch.zeros((), dtype=torch.int64)
            continue
        if name.endswith(".running_var"):
            values = generator.uniform(0.5, 1.5, shape)
        else:
            values = generator.standard_normal(shape)
            if name.endswith(".conv.weight"):
                values = values * math.sqrt(2 / math.prod(shape[1:]))
            elif name.endswith(".bn.weight"):
                values = 1 + 0.1 * values
            elif name == "fc.weight":
                values = 0.02 * values
            else:
                values = 0.1 * values
        state[name] = torch.from_numpy(np.asarray(values, dtype=np.float32))
    return state


def _outputs(
    case: Case, ours: Mapping[str, Tensor | float], *, only: str | None = None
) -> list[Comparison]:
    """Compare every ``output/*`` tensor, or one; a missing result of ours is an error."""
    results = []
    for name, expected in case.group("output").items():
        if only not in (None, name):
            continue
        got = torch.as_tensor(ours[name], dtype=torch.float64).reshape(expected.shape)
        results.append(case.compare(name, got, expected))
    return results


def _expected(case: Case, ours: dict[str, float]) -> list[Comparison]:
    """Compare every number under the json's ``expected``; a missing one of ours is an error."""
    expected: dict[str, Any] = case.info.get("expected", {})
    return [
        case.compare(
            f"expected/{name}", torch.tensor(ours[name], dtype=torch.float64), float(value)
        )
        for name, value in expected.items()
    ]


def _exact(name: str, got: int, expected: int) -> Comparison:
    return Comparison(name, torch.tensor(got), torch.tensor(expected), 0.0, 0.0)
