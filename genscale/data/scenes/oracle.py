"""From pixels back to a scene, and whether a picture shows what a caption says.

Nothing is learned and nothing is drawn at random; the rules are those of section "oracle" in
docs/workflows/data_captions.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, optimize

from genscale.data.scenes.grammar import (
    BACKGROUNDS,
    COLOURS,
    Background,
    Colour,
    Requirement,
    Scene,
    SceneObject,
    Shape,
    parse_caption,
)
from genscale.data.scenes.relations import holds
from genscale.data.scenes.renderer import ARM, HOLE
from genscale.data.scenes.sampling import SMALLEST
from genscale.errors import DataError

COLOUR_DISTANCE = 0.25  # in linear RGB; farther than this from every colour is background
SMALLEST_AREA = 0.2  # of the smallest object's nominal area; what is smaller is no object
NEARLY = 0.15  # of a pixel: shares so close to none or all are none or all
HOLE_SHARE = 0.06  # of the area with its holes; nominally 0.16, a ring's
SKEWNESS = -0.28  # of the rows: below it is a triangle, nominally -0.57; all others 0
ON_DIAGONALS, ON_AXES = -0.21, 0.28  # fourfold moment: square -0.43, circle 0, cross 0.57
_FRINGE = 2  # pixels around a component that may hold its anti-aliased edge

_FILL: dict[Shape, float] = {
    "circle": math.pi / 4,
    "square": 1.0,
    "triangle": 0.5,
    "cross": 1 - (1 - ARM) ** 2,
    "ring": math.pi / 4 * (1 - HOLE * HOLE),
}
"""Share of its box that a shape fills."""


def read_scene(image: NDArray[np.uint8]) -> Scene:
    """Return the scene a picture shows; the objects in order of their area, largest first.

    Places are shares of the picture's width and height, sizes shares of its shorter side.

    Args:
        image: uint8 ``(3, H, W)`` sRGB.

    Raises:
        DataError: if the picture is no such array.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise DataError(
            f"A scene is read from uint8 pictures of shape (3, H, W), but this is {image.dtype} of "
            f"shape {image.shape}. Convert it first."
        )
    height, width = image.shape[1:]
    nearest = _nearest_colour(image)
    ground = _ground(image, nearest < 0)
    least = SMALLEST_AREA * _FILL["triangle"] * (SMALLEST * min(height, width)) ** 2
    found: list[tuple[int, SceneObject]] = []
    for number, colour in enumerate(COLOURS):
        mask = nearest == number
        if np.count_nonzero(mask) < least:
            continue
        labelled, count = ndimage.label(mask)  # 4 neighbours
        areas = np.bincount(labelled.ravel(), minlength=count + 1)
        for label, (rows, columns) in enumerate(ndimage.find_objects(labelled), start=1):
            if areas[label] < least:
                continue
            rows, columns = _widen(rows, height), _widen(columns, width)
            own = labelled[rows, columns] == label
            share = _share(image[:, rows, columns], ground, colour)
            share[nearest[rows, columns] >= 0] = 0.0  # other objects
            share[own] = 1.0
            corner = (columns.start, rows.start)
            found.append((int(areas[label]), _as_object(share, corner, colour, (height, width))))
    found.sort(key=lambda pair: -pair[0])
    return Scene(_background(ground), tuple(each for _, each in found))


@cache
def _linear() -> NDArray[np.float32]:
    """Return the linear intensity (256,) of every 8-bit sRGB level."""
    level = np.arange(256) / 255
    linear = np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)
    return linear.astype(np.float32)


def _nearest_colour(image: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the number of the colour of every pixel ``(H, W)``, -1 for background."""
    linear = _linear()
    pixels = linear[image].reshape(3, -1)
    palette = linear[np.array(list(COLOURS.values()))]  # (8, 3)
    squared = (
        (palette**2).sum(1)[:, None] - 2 * palette @ pixels + (pixels**2).sum(0)[None, :]
    )  # (8, H W)
    nearest: NDArray[np.int64] = squared.argmin(0)
    nearest[squared.min(0) >= COLOUR_DISTANCE**2] = -1
    return nearest.reshape(image.shape[1:])


def _ground(image: NDArray[np.uint8], where: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the colour (3,) behind the objects, 8-bit sRGB; black where all is object."""
    if not where.any():
        return np.zeros(3)
    ground: NDArray[np.float64] = np.median(image[:, where], axis=1)
    return ground


def _background(ground: NDArray[np.float64]) -> Background:
    def distance(name: Background) -> float:
        return float(np.square(ground - np.array(BACKGROUNDS[name])).sum())

    return min(BACKGROUNDS, key=distance)


def _widen(pixels: slice, side: int) -> slice:
    return slice(max(0, pixels.start - _FRINGE), min(side, pixels.stop + _FRINGE))


def _share(
    pixels: NDArray[np.uint8], ground: NDArray[np.float64], colour: Colour
) -> NDArray[np.float64]:
    """Return how much of each pixel ``(h, w)`` an object covers, 0 to 1.

    What is nearly 0 or 1 is taken for it: noise far from the centre would weigh on moments.
    """
    direction = np.array(COLOURS[colour]) - ground
    along = np.einsum("c,chw->hw", direction, pixels - ground[:, None, None])
    share = along / (direction @ direction)
    certain: NDArray[np.float64] = np.clip((share - NEARLY) / (1 - 2 * NEARLY), 0.0, 1.0)
    return certain


def _as_object(
    share: NDArray[np.float64], corner: tuple[int, int], colour: Colour, sides: tuple[int, int]
) -> SceneObject:
    """Tell shape, centre and size from the share of each pixel that is covered."""
    area = float(share.sum())
    rows, columns = share.sum(1), share.sum(0)
    y, x = (np.arange(len(sums), dtype=np.float64) for sums in (rows, columns))
    y, x = y - float(rows @ y) / area, x - float(columns @ x) / area
    shape = _shape_of(share, x, y)
    size = math.sqrt(area / _FILL[shape])
    centre_x, centre_y = corner[0] - float(x[0]) + 0.5, corner[1] - float(y[0]) + 0.5
    if shape == "triangle":
        centre_y -= size / 6  # its centre of mass lies below the middle of its box
    height, width = sides
    return SceneObject(shape, colour, centre_x / width, centre_y / height, size / min(sides))


def _shape_of(share: NDArray[np.float64], x: NDArray[np.float64], y: NDArray[np.float64]) -> Shape:
    """Tell a shape by its hole, or by two moments about its centre of mass.

    The skewness of the rows tells the triangle. The mean of r^4 cos(4 angle) over the mean of
    r^4 is 0 for a disc, negative for mass on the diagonals, positive for mass on the axes.
    """
    part = share > 0.5
    filled = int(np.count_nonzero(ndimage.binary_fill_holes(part)))
    if filled - int(np.count_nonzero(part)) > HOLE_SHARE * filled:
        return "ring"
    rows = share.sum(1)
    variance = float(rows @ y**2) / float(rows.sum())
    third = float(rows @ y**3) / float(rows.sum())
    if third < SKEWNESS * variance**1.5:
        return "triangle"
    across, down = (x**2)[None, :], (y**2)[:, None]
    whole = float((share * (across + down) ** 2).sum())
    fourfold = float((share * (across**2 - 6 * across * down + down**2)).sum())
    if fourfold < ON_DIAGONALS * whole:
        return "square"
    return "cross" if fourfold > ON_AXES * whole else "circle"


@dataclass(frozen=True, slots=True)
class CaptionAgreement:
    """How well a picture shows what a caption says.

    Attributes:
        count: 1 if the picture has as many objects as the caption names, else 0.
        shape: share of the caption's objects that find one of their shape, one to one.
        colour: share of them that find one of their colour and shape, one to one; None if the
            caption names no colour.
        relation: 1 if two objects of the colours and shapes named lie so, else 0; None if the
            caption names no relation.
    """

    count: float
    shape: float
    colour: float | None
    relation: float | None

    @property
    def all(self) -> float:
        """1 if everything is as the caption says, else 0."""
        parts = (self.count, self.shape, self.colour, self.relation)
        return float(all(part in (None, 1.0) for part in parts))

    def results(self) -> dict[str, float | None]:
        """Return the result of every task by name, ``all`` last; None where it does not apply."""
        return {
            "count": self.count,
            "colour": self.colour,
            "shape": self.shape,
            "relation": self.relation,
            "all": self.all,
        }


def agreement(image: NDArray[np.uint8], caption: str) -> CaptionAgreement:
    """Return how well a picture shows what a caption says.

    Args:
        image: uint8 ``(3, H, W)``.
        caption: a caption of the grammar.

    Raises:
        ConfigError: if the caption does not follow the grammar.
        DataError: if the picture has another layout.
    """
    return agreement_of(read_scene(image).objects, parse_caption(caption))


def agreement_of(objects: Sequence[SceneObject], asked: Requirement) -> CaptionAgreement:
    """Return how well objects meet a requirement; see :class:`CaptionAgreement`."""
    shape = _matched([(None, each) for _, each in asked.objects], objects)
    coloured = all(colour is not None for colour, _ in asked.objects)
    relation = None
    if asked.relation is not None:
        first, second = (
            [each for each in objects if _fits(wanted, each)] for wanted in asked.objects
        )
        relation = float(
            any(a is not b and holds(asked.relation, a, b) for a in first for b in second)
        )
    return CaptionAgreement(
        count=float(len(objects) == asked.count),
        shape=shape,
        colour=_matched(asked.objects, objects) if coloured else None,
        relation=relation,
    )


def _fits(wanted: tuple[Colour | None, Shape], each: SceneObject) -> bool:
    return wanted[0] in (None, each.colour) and wanted[1] == each.shape


def _matched(
    wanted: Sequence[tuple[Colour | None, Shape]], objects: Sequence[SceneObject]
) -> float:
    """Return the largest share of what is wanted that can be given objects one to one."""
    fits = np.array([[_fits(kind, each) for each in objects] for kind in wanted], dtype=np.float64)
    fits = fits.reshape(len(wanted), len(objects))
    chosen = optimize.linear_sum_assignment(fits, maximize=True)
    return float(fits[chosen].sum()) / len(wanted)
