"""From moving objects to clips, at any resolution and at any times.

A pixel's colour is the exact mean over its area of a fine picture of each shape: the overlap of
fine cells and pixels is separable, so an object in a frame is two small matrix products. What
leaves the canvas on one side is drawn on the other.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from genscale.data.scenes.grammar import BACKGROUNDS, COLOURS, Scene, SceneObject, Shape
from genscale.data.scenes.renderer import render
from genscale.data.sprites.grammar import Sprite, SpriteScene

EDGE = 1 / 32  # between the border and a box that bounces, at least

_Floats = NDArray[np.float64]


def positions(sprite: Sprite, times: _Floats) -> tuple[_Floats, _Floats]:
    """Return the centre of an object at some times ``(T,)``: x and y, ``(T,)`` each in [0, 1)."""
    moved = (
        start + rate * times
        for start, rate in zip((sprite.x, sprite.y), sprite.velocity, strict=True)
    )
    x, y = (_reflect(each, sprite.size) if sprite.bounces else each % 1.0 for each in moved)
    return x, y


def _reflect(along: _Floats, size: float) -> _Floats:
    """Fold a straight path into the canvas, so that a box of this size stays inside."""
    low = EDGE + size / 2
    room = 1 - 2 * low
    folded = (along - low) % (2 * room)
    return low + np.where(folded < room, folded, 2 * room - folded)


def render_clip(scene: SpriteScene, times: _Floats, resolution: int) -> NDArray[np.uint8]:
    """Draw the frames of a clip.

    Args:
        scene: what moves.
        times: ``(T,)`` seconds.
        resolution: height and width.

    Returns:
        uint8 ``(3, T, resolution, resolution)``, sRGB.
    """
    frames = len(times)
    canvas = np.empty((frames, resolution, resolution, 3))
    canvas[:] = BACKGROUNDS[scene.background]
    number = np.arange(frames)[:, None, None]
    for each in scene.sprites:
        mask = _mask(each.shape, _fineness(each.size * resolution))
        x, y = positions(each, times)
        columns, across = _overlaps(x, each.size, resolution, len(mask))
        rows, down = _overlaps(y, each.size, resolution, len(mask))
        share = (down @ mask @ across.transpose(0, 2, 1))[..., None]  # (T, h, w, 1)
        where = (number, rows[:, :, None], columns[:, None, :])
        canvas[where] += share * (np.array(COLOURS[each.colour]) - canvas[where])
    clip: NDArray[np.uint8] = (canvas + 0.5).astype(np.uint8).transpose(3, 0, 1, 2)
    return clip


def _fineness(pixels: float) -> int:
    """Return how many cells a side the picture of a shape of so many pixels has."""
    cells = 64
    while cells < 4 * pixels and cells < 512:
        cells *= 2
    return cells


@cache
def _mask(shape: Shape, cells: int) -> _Floats:
    """Return how much of each cell ``(cells, cells)`` of its own box a shape covers."""
    whole = Scene("black", (SceneObject(shape, "white", 0.5, 0.5, 1.0),))
    covered: _Floats = render(whole, cells)[0] / 255.0
    return covered


def _overlaps(
    centre: _Floats, size: float, resolution: int, cells: int
) -> tuple[NDArray[np.int64], _Floats]:
    """Return the pixels ``(T, w)`` an object spans along one axis, and its cells' shares of them.

    The shares ``(T, w, cells)`` are the lengths, in pixels, of cell and pixel in common.
    """
    edges = (centre[:, None] + size * (np.arange(cells + 1) / cells - 0.5)) * resolution
    first = np.floor(edges[:, :1]).astype(np.int64)
    width = min(int(np.ceil(size * resolution)) + 1, resolution)
    pixels = first + np.arange(width)
    begins = np.maximum(edges[:, None, :-1], pixels[:, :, None])
    ends = np.minimum(edges[:, None, 1:], pixels[:, :, None] + 1)
    return pixels % resolution, np.maximum(ends - begins, 0.0)
