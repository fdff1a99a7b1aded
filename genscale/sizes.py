"""Samples of another size than the trained one: what is asked for and what can be had."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from genscale.backbones.base import Backbone
from genscale.errors import ConfigError

Size = tuple[int, int]
"""Height and width."""

_NEAR = 1.25  # sides and proportions up to so many times the trained ones need no operator


def as_size(size: object) -> Size:
    """Return height and width of a size: a side of squares, or height and width.

    Raises:
        ConfigError: it is neither.
    """
    sides: Any = (size, size) if isinstance(size, int) else size
    pair = isinstance(sides, Sequence) and not isinstance(sides, str) and len(sides) == 2
    if not pair or any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in sides):
        raise ConfigError(
            f"size must be a side in pixels, or a height and a width, but {size!r} was given. "
            "Give e.g. size=64 or size=[48,64]."
        )
    return sides[0], sides[1]


def shape_at(model: Backbone, downsample: int, size: Size) -> tuple[int, ...]:
    """Return the shape of what a network models where pictures are to have another size.

    Args:
        model: the network.
        downsample: pixels along one side of a cell of its input.
        size: height and width of the pictures, in pixels.

    Returns:
        ``(C, H, W)``, or ``(C, T, H, W)`` of clips.

    Raises:
        ConfigError: the network cannot work at that size.
    """
    steps = [step * downsample for step in model.size_step]
    if any(side % step for side, step in zip(size, steps, strict=True)):
        near = [max(1, round(side / step)) * step for side, step in zip(size, steps, strict=True)]
        unit = f"{steps[0]}" if steps[0] == steps[1] else f"{steps[0]} and {steps[1]}"
        raise ConfigError(
            f"size={_shown(size)} cannot be made by {type(model).__name__}: height and width must "
            f"be multiples of {unit} pixels, its smallest units. Give e.g. size={_shown(near)}."
        )
    height, width = (side // downsample for side in size)
    problem = model.size_problem(height, width)
    if problem is not None:
        raise ConfigError(
            f"size={_shown(size)} cannot be made by {type(model).__name__}: {problem}"
        )
    return (*model.sample_shape[:-2], height, width)


def size_hint(trained: Size, size: Size) -> str | None:
    """Return a sentence where a size is far from the trained one; None where it is near."""
    ratios = [now / before for now, before in zip(size, trained, strict=True)]
    factor = math.sqrt(math.prod(ratios))
    oblong = max(ratios) / min(ratios)
    if max(factor, 1 / factor) <= _NEAR and oblong <= _NEAR**2:
        return None
    change = "that of" if factor == 1 else f"{factor:.3g} times"
    return (
        f"hint: size={_shown(size)} is far from the trained {_shown(trained)} (a mean side "
        f"{change} the trained one), where networks repeat or blur structure. "
        "resolution=entropy keeps attention as sharp as in training."
    )


def _shown(size: Sequence[int]) -> str:
    """Return a size as the command line takes it."""
    height, width = size
    return str(height) if height == width else f"[{height},{width}]"
