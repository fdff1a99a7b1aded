"""Where one object lies as seen from another: the rule of GenEval (arXiv:2310.11513)."""

from __future__ import annotations

import math

from genscale.data.scenes.grammar import Relation, SceneObject

OVERLAP = 0.1  # share of both boxes by which an offset is shortened
THRESHOLD = 0.5  # of the shortened offset, in lengths of the full one


def components(first: SceneObject, second: SceneObject) -> dict[Relation, float]:
    """Return how far the first object lies in each direction from the second, -1 to 1.

    The offset of the centres is shortened along each axis by a tenth of both boxes, to 0 at
    least, and divided by the length of the offset as it was.
    """
    offset = (first.x - second.x, first.y - second.y)
    length = math.hypot(*offset)
    if length == 0:
        return dict.fromkeys(("left of", "right of", "above", "below"), 0.0)
    shrink = OVERLAP * (first.size + second.size)
    right, down = (math.copysign(max(abs(o) - shrink, 0.0), o) / length for o in offset)
    return {"left of": -right, "right of": right, "above": -down, "below": down}


def holds(relation: Relation, first: SceneObject, second: SceneObject) -> bool:
    """Return whether the first object lies there; on a diagonal two relations may hold."""
    return components(first, second)[relation] > THRESHOLD
