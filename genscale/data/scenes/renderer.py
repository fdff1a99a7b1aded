"""From a scene to pixels, at any resolution.

Every pixel is the mean of sample points on a grid. The grid of a resolution R has R times a power
of two points a side: at least 4 R, and at least 512. Resolutions that share a grid (16, 32, 64 and
128; 24, 48 and 96) are exact box-downsamplings of one another, up to the rounding to 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from genscale.data.scenes.grammar import BACKGROUNDS, COLOURS, Scene, SceneObject, Shape

LOWEST, HIGHEST = 16, 512
_FINEST = 512  # points a side of the grid that small resolutions share
_SUPERSAMPLING = 4  # points a pixel and axis, at least

ARM = 1 / 3  # half the width of a cross's arms, of half its size: 5/9 of its box is filled
HOLE = 0.4  # radius of a ring's hole, of its outer radius

_Points = NDArray[np.float64]


def _cross(x: _Points, y: _Points) -> NDArray[np.bool_]:
    across, up = np.abs(x), np.abs(y)
    return ((across <= ARM) & (up <= 1)) | ((up <= ARM) & (across <= 1))


def _ring(x: _Points, y: _Points) -> NDArray[np.bool_]:
    squared = x * x + y * y
    return (squared <= 1) & (squared >= HOLE * HOLE)


# x (1, w) and y (h, 1) run from -1 to 1 over an object's box, y downwards
_INSIDE: dict[Shape, Callable[[_Points, _Points], NDArray[np.bool_]]] = {
    "circle": lambda x, y: x * x + y * y <= 1,
    "square": lambda x, y: (np.abs(x) <= 1) & (np.abs(y) <= 1),
    "triangle": lambda x, y: (np.abs(x) <= (y + 1) / 2) & (y <= 1),  # apex up, half its box
    "cross": _cross,
    "ring": _ring,
}


def points_per_pixel(resolution: int) -> int:
    """Return how many sample points a pixel has along each axis: a power of two."""
    factor = _SUPERSAMPLING
    while resolution * factor < _FINEST:
        factor *= 2
    return factor


def render(scene: Scene, size: int | tuple[int, int]) -> NDArray[np.uint8]:
    """Draw a scene.

    On an oblong canvas places are shares of its width and height, sizes shares of its shorter
    side: objects keep their shape and move apart along the longer side.

    Args:
        scene: the scene.
        size: height and width, or one number for both; 16 to 512.

    Returns:
        uint8 ``(3, height, width)``, sRGB.
    """
    height, width = (size, size) if isinstance(size, int) else size
    canvas = np.empty((3, height, width))
    canvas[:] = np.array(BACKGROUNDS[scene.background])[:, None, None]
    for each in scene.objects:
        rows, columns, share = _coverage(each, height, width)
        part = canvas[:, rows, columns]
        part += share * (np.array(COLOURS[each.colour])[:, None, None] - part)
    return (canvas + 0.5).astype(np.uint8)


def _coverage(
    each: SceneObject, height: int, width: int
) -> tuple[slice, slice, NDArray[np.float64]]:
    """Return the rows and columns an object lies in, and its share of each of their pixels."""
    shorter = min(height, width)
    factor = points_per_pixel(shorter)
    columns, x = _axis(each.x * (width / shorter), each.size, shorter, width, factor)
    rows, y = _axis(each.y * (height / shorter), each.size, shorter, height, factor)
    inside = _INSIDE[each.shape](x[None, :], y[:, None])
    # counts fit 8 bits along one axis (32 points at most): adding bytes is fast
    along = inside.view(np.uint8).reshape(len(y), -1, factor).sum(2, dtype=np.uint8)
    counts = along.reshape(-1, factor, along.shape[1]).sum(1, dtype=np.uint16)
    return rows, columns, counts / (factor * factor)


def _axis(
    centre: float, size: float, unit: int, side: int, factor: int
) -> tuple[slice, NDArray[np.float64]]:
    """Return the pixels an object spans along one axis and their points, -1 to 1 over its box.

    Args:
        centre: in units.
        size: in units.
        unit: pixels of one.
        side: pixels of the axis.
        factor: points a pixel.
    """
    first = max(0, int(np.floor((centre - size / 2) * unit)))
    last = min(side, int(np.ceil((centre + size / 2) * unit)))
    points = (np.arange(first * factor, last * factor) + 0.5) / (unit * factor)
    return slice(first, last), (points - centre) / (size / 2)
