"""Parity of attention whose entropy is kept: outputs, entropies and factors."""

from __future__ import annotations

import math

import torch.nn.functional as F

from genscale.resolution.entropy import attention_entropy, entropy_factor
from scripts.parity import Case, Comparison


def run(case: Case) -> list[Comparison]:
    """Scale the queries, attend, and compare with softmax at the official scale."""
    inputs, outputs = case.group("input"), case.group("output")
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    factor = entropy_factor(case.config["num_tokens"], case.config["train_tokens"])
    got = {
        "out": F.scaled_dot_product_attention(q * factor, k, v),
        "out_unscaled": F.scaled_dot_product_attention(q, k, v),
        "entropy": attention_entropy(q, k, factor),
        "entropy_unscaled": attention_entropy(q, k),
    }
    results = [case.compare(name, got[name], expected) for name, expected in outputs.items()]
    if "lam" in case.config:
        results.append(case.compare("lam", factor, case.config["lam"]))
    if "softmax_scale" in case.config:
        scale = factor / math.sqrt(case.config["head_dim"])
        results.append(case.compare("softmax scale", scale, case.config["softmax_scale"]))
    return results
