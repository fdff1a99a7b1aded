"""Parity of where one box lies from another with GenEval's own program (MIT)."""

from __future__ import annotations

import torch

from genscale.data.scenes.grammar import RELATIONS
from genscale.data.scenes.relations import THRESHOLD, directions
from scripts.parity import Case, Comparison


def run(case: Case) -> list[Comparison]:
    """Compare the four relations of pairs of boxes; overlaps of boxes are not used here."""
    found = []
    for (left, top, right, bottom), other in case.group("input")["boxes"].tolist():
        offset = (
            (left + right - other[0] - other[2]) / 2,
            (top + bottom - other[1] - other[3]) / 2,
        )
        sides = (right - left + other[2] - other[0], bottom - top + other[3] - other[1])
        ways = directions(offset, sides)
        found.append([int(ways[name] > THRESHOLD) for name in RELATIONS])
    return [case.compare("relations", torch.tensor(found), case.group("output")["relations"])]
