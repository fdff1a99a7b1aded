"""Where one object lies as seen from another: the rule of GenEval (arXiv:2310.11513)."""

from __future__ import annotations

import math

from genscale.data.scenes.grammar import RELATIONS, Relation, SceneObject

OVERLAP = 0.1  # share of both boxes by which an offset is shortened
THRESHOLD = 0.5  # of the shortened offset, in lengths of the full one


def directions(offset: tuple[float, float], sides: tuple[float, float]) -> dict[Relation, float]:
    """Return how far a box lies in each direction from another, -1 to 1.

    The offset is shortened along each axis by a tenth of both boxes, to 0 at least, and divided
    by its length as it was.

    Args:
        offset: centre of the first box as seen from the second, to the right and downwards.
        sides: width of both boxes together, and height of both together.
    """
    length = math.hypot(*offset)
    if length == 0:
        return dict.fromkeys(RELATIONS, 0.0)
    right, down = (
        math.copysign(max(abs(way) - OVERLAP * side, 0.0), way) / length
        for way, side in zip(offset, sides, strict=True)
    )
    return {"left of": -right, "right of": right, "above": -down, "below": down}


def directions_between(first: SceneObject, second: SceneObject) -> dict[Relation, float]:
    """Return :func:`directions` of the first object from the second."""
    both = first.size + second.size
    return directions((first.x - second.x, first.y - second.y), (both, both))


def holds(relation: Relation, first: SceneObject, second: SceneObject) -> bool:
    """Return whether the first object lies there; on a diagonal two relations may hold."""
    return directions_between(first, second)[relation] > THRESHOLD
