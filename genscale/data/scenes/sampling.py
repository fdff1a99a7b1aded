"""Which scene and which caption stand at an index: the one place where scenes are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from genscale.data.scenes.grammar import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    Colour,
    Group,
    Relation,
    Requirement,
    Scene,
    SceneObject,
    Shape,
    Task,
    caption_of,
)
from genscale.data.scenes.relations import directions_between

MARGIN = 1 / 32  # from the edge of the canvas to a box, at least: one pixel at 32
GAP = 2 / 32  # between two boxes, at least: two pixels at 32
SMALLEST = 8 / 32  # the oracle tells shapes at 32 pixels from 8 pixels on
_LARGEST = (0.5, 0.44, 0.38, 0.32, 0.27, 0.27)  # sizes of one, two, ... objects, at most
_SCATTERED = 4  # so many objects find room by chance
_CLEAR = 0.6  # a relation that is captioned holds by more than the threshold of 0.5
_TRIES = 24  # places tried for an object before the scene starts anew
_STARTS = 50  # of a scene, before its objects get other sizes: some pairs have no room at all

Kind = tuple[Colour, Shape]


@dataclass(frozen=True, slots=True)
class CaptionedScene:
    """A scene, the caption that describes it, and the kind of the caption."""

    scene: Scene
    caption: str
    task: Task


def scene_at(seed: int, index: int, tasks: Sequence[Task], max_objects: int) -> CaptionedScene:
    """Return the scene of an index; its numbers come from ``default_rng([seed, index])``.

    Args:
        seed: key of the data set, 0 or more.
        index: row, 0 or more.
        tasks: kinds of captions, drawn with equal chances.
        max_objects: objects of a scene at most.
    """
    rng = np.random.default_rng([seed, index])
    task = tasks[int(rng.integers(len(tasks)))]
    kinds, counts = _draw_kinds(rng, task, max_objects)
    backgrounds = tuple(BACKGROUNDS)
    background = backgrounds[int(rng.integers(len(backgrounds)))]
    every = [kind for kind, count in zip(kinds, counts, strict=True) for _ in range(count)]
    relation: Relation | None = None
    while True:
        objects = _place(rng, every)
        if task != "relation":
            break
        clear, relation = max((v, k) for k, v in directions_between(objects[0], objects[1]).items())
        if clear > _CLEAR:
            break
    groups = tuple(
        Group(count, None if task == "shape" else colour, shape)
        for (colour, shape), count in zip(kinds, counts, strict=True)
    )
    requirement = Requirement(groups, relation)
    return CaptionedScene(Scene(background, objects), caption_of(requirement, task), task)


def _draw_kinds(
    rng: np.random.Generator, task: Task, max_objects: int
) -> tuple[list[Kind], list[int]]:
    """Draw colour and shape of every group, no two alike, and how many objects it has."""
    colours = tuple(COLOURS)
    groups = {"relation": 2, "multi": min(int(rng.integers(2, 4)), max_objects)}.get(task, 1)
    drawn = rng.choice(len(colours) * len(SHAPES), size=groups, replace=False)
    kinds = [(colours[each // len(SHAPES)], SHAPES[each % len(SHAPES)]) for each in drawn.tolist()]
    counts = [1] * groups
    if task == "count":
        counts = [int(rng.integers(1, max_objects + 1))]
    elif task == "multi":
        for _ in range(int(rng.integers(0, max_objects - groups + 1))):
            counts[int(rng.integers(groups))] += 1
    return kinds, counts


def _place(rng: np.random.Generator, kinds: Sequence[Kind]) -> tuple[SceneObject, ...]:
    """Give every object a size and a place where its box keeps the gap to the others."""
    places = None
    while places is None:
        sizes = rng.uniform(SMALLEST, _LARGEST[len(kinds) - 1], len(kinds)).tolist()
        places = _scatter(rng, sizes) if len(kinds) <= _SCATTERED else _in_lines(rng, sizes)
    return tuple(
        SceneObject(shape, colour, x, y, size)
        for (colour, shape), (x, y), size in zip(kinds, places, sizes, strict=True)
    )


def _scatter(rng: np.random.Generator, sizes: Sequence[float]) -> list[tuple[float, float]] | None:
    """Put boxes one after the other wherever there is room; start anew when there is none.

    Returns:
        their centres, or None where all starts failed.
    """
    placed: list[tuple[float, float]] = []
    starts = 0
    while len(placed) < len(sizes):
        size = sizes[len(placed)]
        reach = MARGIN + size / 2
        for x, y in rng.uniform(reach, 1 - reach, (_TRIES, 2)).tolist():
            if all(
                max(abs(x - a), abs(y - b)) >= (size + other) / 2 + GAP
                for (a, b), other in zip(placed, sizes, strict=False)
            ):
                placed.append((x, y))
                break
        else:
            placed, starts = [], starts + 1
            if starts == _STARTS:
                return None
    return placed


def _in_lines(rng: np.random.Generator, sizes: Sequence[float]) -> list[tuple[float, float]]:
    """Put five or six boxes into three rows, or columns, of at most two.

    Scattered boxes of these sizes block one another almost always.
    """
    order = rng.permutation(len(sizes)).tolist()
    lines = [order[:2], order[2:4], order[4:]]
    rng.shuffle(lines)
    heights = [max(sizes[i] for i in line) for line in lines]
    places: dict[int, tuple[float, float]] = {}
    for line, height, begin in zip(lines, heights, _spread(rng, heights), strict=True):
        for i, across in zip(line, _spread(rng, [sizes[i] for i in line]), strict=True):
            down = begin + float(rng.uniform(0, height - sizes[i]))
            places[i] = (across + sizes[i] / 2, down + sizes[i] / 2)
    columns = bool(rng.integers(2))
    return [places[i][::-1] if columns else places[i] for i in range(len(sizes))]


def _spread(rng: np.random.Generator, lengths: Sequence[float]) -> list[float]:
    """Return where pieces begin along one axis: every arrangement in this order equally likely."""
    room = 1 - 2 * MARGIN - sum(lengths) - GAP * (len(lengths) - 1)
    begins, taken = [], MARGIN
    for length, slack in zip(lengths, np.sort(rng.uniform(0, room, len(lengths))), strict=True):
        begins.append(taken + float(slack))
        taken += length + GAP
    return begins
