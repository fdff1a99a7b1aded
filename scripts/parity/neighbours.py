"""Parity of the neighbours of a noise with tt-scale-flux's program (Apache-2.0)."""

from __future__ import annotations

import torch

from genscale.search.neighbours import neighbours
from scripts.parity import Case, Comparison, compare_in_words


def run(case: Case) -> list[Comparison]:
    """Compare the noises, their angle to the pivot, and their norms."""
    given, expected = case.group("input"), case.group("output")
    pivot = given["pivot"]
    directions = given["directions"].reshape(*given["directions"].shape[:2], *pivot.shape[1:])
    found = neighbours(pivot, directions, case.config["threshold"])
    flat, old = found.double().flatten(2), pivot.double().flatten(1)[:, None]
    got = {
        "neighbours": found,
        "cosine": torch.cosine_similarity(flat, old, dim=-1),
        "norm": torch.linalg.vector_norm(flat, dim=-1),
    }
    words = f"{case.info['tolerance']['abs']:g} abs"
    return [compare_in_words(words, name, got[name], expected[name]) for name in expected]
