"""Video drift error of LV-Bench, and VBench's arithmetic of consistency and dynamic degree."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from genscale.metrics.video.consistency import frame_consistency
from genscale.metrics.video.drift import vde
from genscale.metrics.video.motion import MoveRule, flow_strength
from scripts.parity import Case, Comparison


def run(case: Case) -> list[Comparison]:
    inputs = case.group("input")
    results: dict[str, Callable[[], Tensor]] = {}
    if "chunk_metric" in inputs:
        results |= _of_chunks(inputs["chunk_metric"])
    if "features" in inputs:
        results |= _of_features(inputs["features"])
    if "flow" in inputs:
        results |= _of_flow(inputs["flow"])
    return [
        case.compare(name, results[name]().to(expected.dtype).reshape(expected.shape), expected)
        for name, expected in case.group("output").items()
    ]


def _of_chunks(chunks: Tensor) -> dict[str, Callable[[], Tensor]]:
    without_start = torch.cat((torch.zeros_like(chunks[:1]), chunks[1:]))
    return {
        "vde_linear": lambda: torch.tensor(vde(chunks)),
        "vde_log": lambda: torch.tensor(vde(chunks, weights="log")),
        "vde_uniform": lambda: torch.tensor(vde(chunks, weights="uniform")),
        "vde_late": lambda: torch.tensor(vde(chunks, weights="late")),
        "vde_first_zero": lambda: torch.tensor(vde(without_start)),
        "vde_single_chunk": lambda: torch.tensor(vde(chunks[:1])),
    }


def _of_features(features: Tensor) -> dict[str, Callable[[], Tensor]]:
    consistency = frame_consistency(features).mean(dim=-1)
    of_subject: dict[str, Callable[[], Tensor]] = {
        "per_chunk": lambda: consistency,
        "drift": lambda: torch.tensor(vde(consistency)),
    }
    return {
        "subject_per_chunk": of_subject["per_chunk"],
        "background_per_chunk": of_subject["per_chunk"],
        "vde_subject": of_subject["drift"],
        "vde_background": of_subject["drift"],
    }


def _of_flow(flow: Tensor) -> dict[str, Callable[[], Tensor]]:
    strengths = flow_strength(flow)
    rule = MoveRule.of(len(flow) + 1, *flow.shape[-2:])
    return {
        "flow_top5": lambda: strengths,
        "dynamic_threshold": lambda: torch.tensor(rule.threshold),
        "dynamic_count": lambda: torch.tensor(rule.count),
        "moves": lambda: rule.moves(strengths).long(),
    }
