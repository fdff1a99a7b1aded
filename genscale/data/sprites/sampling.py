"""Which clip and which caption stand at an index: the one place where sprites are drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from genscale.data.scenes.grammar import BACKGROUNDS, COLOURS, SHAPES, Colour, Group, Shape
from genscale.data.sprites.grammar import (
    DIRECTIONS,
    SPEEDS,
    Direction,
    Motion,
    Speed,
    Sprite,
    SpriteGroup,
    SpriteRequirement,
    SpriteScene,
    SpriteTask,
    sprite_caption,
)
from genscale.data.sprites.renderer import positions

SMALLEST = 8 / 32  # the tracker tells shapes at 32 pixels from 8 pixels on
LARGEST = (0.4, 0.34, 0.3, 0.28)  # sizes of one, two, ... objects, at most
GAP = 2.5 / 32  # between two boxes at the times looked at, so 2 pixels at 32 at all times
MARGIN = 1 / 32  # from the border to a box, across the motion
USUAL = 0.5  # canvases a second: crossed in two seconds
RATES: dict[Speed | None, float] = {"slowly": USUAL / 2, None: USUAL, "quickly": USUAL * 2}
VARIETY = 0.1  # speeds of a clip are all faster or slower by a factor of up to this much
FASTEST = RATES["quickly"] * (1 + VARIETY)
OBLIQUE = 0.5  # of a bouncing object: the slower axis has at least so much of the faster one's
_LOOKS = 64  # times a second at which objects are kept apart
_TRIES = 60  # places drawn before sizes and motions are drawn anew

_WAYS: dict[Direction, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}


@dataclass(frozen=True, slots=True)
class CaptionedClip:
    """A clip, what is asked for by the caption that describes it, the caption, and its kind."""

    scene: SpriteScene
    requirement: SpriteRequirement
    caption: str
    task: SpriteTask


@lru_cache(maxsize=1 << 12)  # a batch asks for a row three times
def clip_at(
    seed: int, index: int, tasks: tuple[SpriteTask, ...], max_objects: int, horizon: float
) -> CaptionedClip:
    """Return the clip of an index; its numbers come from ``default_rng([seed, index])``.

    Args:
        seed: key of the data set, 0 or more.
        index: row, 0 or more.
        tasks: kinds of captions, drawn with equal chances.
        max_objects: objects of a clip at most.
        horizon: seconds in which objects that move differently must not touch. On a canvas
            without borders two that move across one another always meet in the end.
    """
    rng = np.random.default_rng([seed, index])
    task = tasks[int(rng.integers(len(tasks)))]
    backgrounds = tuple(BACKGROUNDS)
    background = backgrounds[int(rng.integers(len(backgrounds)))]
    kinds = _draw_kinds(rng, task, max_objects)
    factor = float(rng.uniform(1 - VARIETY, 1 + VARIETY))
    while True:
        groups = [SpriteGroup(kind, *_draw_motion(rng, task)) for kind in kinds]
        sprites = _place(rng, groups, factor, horizon)
        if sprites is not None:
            break
    requirement = SpriteRequirement(tuple(groups))
    period = math.ceil(_LOOKS / (USUAL * factor))
    forever = len(groups) == 1 or _apart(sprites, np.arange(period + 1) / _LOOKS)
    lifetime = math.inf if forever else horizon
    scene = SpriteScene(background, sprites, lifetime)
    return CaptionedClip(scene, requirement, sprite_caption(requirement, task), task)


def _draw_kinds(rng: np.random.Generator, task: SpriteTask, max_objects: int) -> list[Group]:
    """Draw number, colour and shape of every group, no two alike."""
    colours: tuple[Colour, ...] = tuple(COLOURS)
    kinds: list[tuple[Colour, Shape]] = [(c, s) for c in colours for s in SHAPES]
    drawn = rng.choice(len(kinds), size=2 if task == "pair" else 1, replace=False).tolist()
    count = int(rng.integers(1, max_objects + 1)) if task == "count" else 1
    if task == "still":
        count = int(rng.integers(1, min(max_objects, 2) + 1))
    return [Group(count, *kinds[each]) for each in drawn]


def _draw_motion(rng: np.random.Generator, task: SpriteTask) -> tuple[Motion | None, Speed | None]:
    """Draw how a group moves and how fast."""
    if task == "still":
        return "still", None
    if task == "bounce":
        return "bouncing", None
    motions: tuple[Motion, ...] = (*DIRECTIONS, "still") if task == "pair" else DIRECTIONS
    motion = motions[int(rng.integers(len(motions)))]
    return motion, SPEEDS[int(rng.integers(len(SPEEDS)))] if task == "speed" else None


def _place(
    rng: np.random.Generator, groups: Sequence[SpriteGroup], factor: float, horizon: float
) -> tuple[Sprite, ...] | None:
    """Give every object a size, a velocity and a place where it keeps its distance.

    Returns:
        the objects, or None where no place was found.
    """
    every = [group for group in groups for _ in range(group.kind.count)]
    sizes = rng.uniform(SMALLEST, LARGEST[len(every) - 1], len(every)).tolist()
    velocities = {group: _velocity(rng, group, factor) for group in groups}
    # what moves at the usual speed, or not at all, is where it was after so many seconds
    looked = min(horizon, 1 / (USUAL * factor))
    times = np.arange(math.ceil(looked * _LOOKS) + 1) / _LOOKS
    for _ in range(_TRIES):
        sprites = tuple(
            _somewhere(rng, group, size, velocities[group])
            for group, size in zip(every, sizes, strict=True)
        )
        if _apart(sprites, times):
            return sprites
    return None


def _velocity(rng: np.random.Generator, group: SpriteGroup, factor: float) -> tuple[float, float]:
    if group.motion is None or group.motion == "still":
        return 0.0, 0.0
    rate = RATES[group.speed] * factor
    if group.motion == "bouncing":
        low = math.atan(OBLIQUE)
        angle = float(rng.uniform(low, math.pi / 2 - low))
        right, down = (1 if rng.integers(2) else -1 for _ in range(2))
        return right * rate * math.cos(angle), down * rate * math.sin(angle)
    right, down = _WAYS[group.motion]
    return right * rate, down * rate


def _somewhere(
    rng: np.random.Generator, group: SpriteGroup, size: float, velocity: tuple[float, float]
) -> Sprite:
    """Put an object anywhere: across its motion inside the canvas, along it wherever it may be."""
    assert group.kind.colour is not None  # the grammar of sprites names every colour
    bounces = group.motion == "bouncing"
    reach = MARGIN + size / 2
    x, y = (
        float(rng.uniform(0, 1) if rate and not bounces else rng.uniform(reach, 1 - reach))
        for rate in velocity
    )
    return Sprite(group.kind.shape, group.kind.colour, size, x, y, velocity, bounces)


def _apart(sprites: Sequence[Sprite], times: NDArray[np.float64]) -> bool:
    """Return whether no two boxes come closer than the gap, across the borders too."""
    paths = [np.stack(positions(each, times)) for each in sprites]  # (2, T) each
    for i, first in enumerate(paths):
        for j in range(i):
            offset = np.abs(first - paths[j])
            distance = np.minimum(offset, 1 - offset).max(0)
            if distance.min() < (sprites[i].size + sprites[j].size) / 2 + GAP:
                return False
    return True
