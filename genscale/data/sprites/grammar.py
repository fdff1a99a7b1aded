"""What moves in a clip, what its caption says, and what a caption asks for.

A caption names one group of like objects, or two::

    caption = group | group "and" group
    group   = number colour shape motion | number "still" colour shape | number colour shape
    number  = "a" | "an" | "one" | "two" | "three" | "four"
    motion  = "moving" ["slowly" | "quickly"] direction | "bouncing"
    direction = "left" | "right" | "up" | "down"

The shape stands in the plural after two and more. Without a motion it is the caption of a
picture. A caption is complete: the clip shows what it names and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from genscale.data.scenes.grammar import COLOURS, NUMBERS, SHAPES, Background, Colour, Group, Shape
from genscale.data.scenes.grammar import parse_caption as parse_scene
from genscale.errors import ConfigError, did_you_mean

Direction = Literal["left", "right", "up", "down"]
Motion = Literal["left", "right", "up", "down", "still", "bouncing"]
Speed = Literal["slowly", "quickly"]
SpriteTask = Literal["motion", "count", "pair", "speed", "still", "bounce"]

DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
SPEEDS: tuple[Speed, ...] = get_args(Speed)
SPRITE_TASKS: tuple[SpriteTask, ...] = get_args(SpriteTask)
MAX_SPRITES = 4

_MIRRORED = {"left": "right", "right": "left"}
_EXAMPLES = "'a red circle moving right', 'two still blue squares' or 'a white ring bouncing'"


@dataclass(frozen=True, slots=True)
class Sprite:
    """One moving object; lengths are shares of the canvas, the origin is its upper left corner.

    Attributes:
        shape: its shape.
        colour: its colour.
        size: side of its bounding box, which is square.
        x: centre of its box at time 0, to the right.
        y: centre of its box at time 0, downwards.
        velocity: to the right and downwards, in canvases a second.
        bounces: it turns back at the borders; else it leaves on one side and enters on the other.
    """

    shape: Shape
    colour: Colour
    size: float
    x: float
    y: float
    velocity: tuple[float, float]
    bounces: bool = False


@dataclass(frozen=True, slots=True)
class SpriteScene:
    """Moving objects on a plain background.

    Attributes:
        background: its colour.
        sprites: the objects, drawn in this order.
        lifetime: seconds from time 0 in which no two objects touch; infinite where they never do.
    """

    background: Background
    sprites: tuple[Sprite, ...]
    lifetime: float


@dataclass(frozen=True, slots=True)
class SpriteGroup:
    """A number of like objects that move alike.

    Attributes:
        kind: number, colour and shape.
        motion: how they move; None where the caption does not say.
        speed: how fast; None where the caption does not say.
    """

    kind: Group
    motion: Motion | None = None
    speed: Speed | None = None

    def __str__(self) -> str:
        if self.motion is None:
            return str(self.kind)
        if self.motion == "still":
            number, rest = str(self.kind).split(" ", 1)
            return f"{'a' if number == 'an' else number} still {rest}"
        if self.motion == "bouncing":
            return f"{self.kind} bouncing"
        speed = "" if self.speed is None else f"{self.speed} "
        return f"{self.kind} moving {speed}{self.motion}"


@dataclass(frozen=True, slots=True)
class SpriteRequirement:
    """What a caption asks for: the groups it names."""

    groups: tuple[SpriteGroup, ...]

    @property
    def count(self) -> int:
        """The number of objects."""
        return sum(group.kind.count for group in self.groups)

    @property
    def objects(self) -> tuple[SpriteGroup, ...]:
        """The group of every object, in the order of the caption."""
        return tuple(group for group in self.groups for _ in range(group.kind.count))

    def unmoved(self) -> SpriteRequirement:
        """Return what a picture of it shows: the same without motions."""
        return SpriteRequirement(tuple(SpriteGroup(group.kind) for group in self.groups))

    def __str__(self) -> str:
        return " and ".join(str(group) for group in self.groups)


def sprite_caption(requirement: SpriteRequirement, task: SpriteTask) -> str:
    """Return the caption that asks for something; a count of one is spelt ``one``."""
    text = str(requirement)
    if task == "count" and requirement.count == 1:
        return f"one {text.split(' ', 1)[1]}"
    return text


def mirrored_caption(caption: str) -> str:
    """Return what a caption says of the mirrored clip: left and right change places."""
    return " ".join(_MIRRORED.get(word, word) for word in caption.split(" "))


def parse_sprites(caption: str) -> SpriteRequirement:
    """Read a caption; upper case and a full stop at the end are allowed.

    Raises:
        ConfigError: if it does not follow the grammar; the sentence names what fails.
    """
    text = " ".join(caption.lower().rstrip(". \n").split())
    parts = text.split(" and ")
    if len(parts) > 2:
        raise _refused(caption, f"it names {len(parts)} groups and at most 2 are known")
    requirement = SpriteRequirement(tuple(_parse_group(part, caption) for part in parts))
    if requirement.count > MAX_SPRITES:
        raise _refused(caption, f"a clip has at most {MAX_SPRITES} objects")
    return requirement


def _parse_group(text: str, caption: str) -> SpriteGroup:
    kind, moving, way = text.partition(" moving ")
    motion: Motion | None = None
    speed: Speed | None = None
    if moving:
        speeds: dict[str, Speed] = {str(each): each for each in SPEEDS}
        ways: dict[str, Direction] = {str(each): each for each in DIRECTIONS}
        words = way.split()
        if words[0] in speeds:
            speed = speeds[words.pop(0)]
        if len(words) != 1 or words[0] not in ways:
            known = (*SPEEDS, *DIRECTIONS)
            word = words[0] if words else ""
            raise _refused(
                caption,
                f"'{way}' after 'moving' is no direction ({', '.join(DIRECTIONS)}), after one of "
                f"{', '.join(SPEEDS)} at most",
                did_you_mean(word, known),
            )
        motion = ways[words[0]]
    elif kind.endswith(" bouncing"):
        kind, motion = kind.removesuffix(" bouncing"), "bouncing"
    elif " still " in kind:
        kind, motion = kind.replace(" still ", " ", 1), "still"
    return SpriteGroup(_parse_kind(kind, caption), motion, speed)


def _parse_kind(text: str, caption: str) -> Group:
    """Read number, colour and shape with the grammar of scenes."""
    known = {"a", "an", *NUMBERS[:MAX_SPRITES], *COLOURS}
    known |= {str(Group(count, None, shape)).split()[-1] for shape in SHAPES for count in (1, 2)}
    for word in text.split():
        if word not in known:
            hint = did_you_mean(word, sorted(known))
            raise _refused(caption, f"'{word}' is no number, colour or shape", hint)
    if len(text.split()) != 3:
        raise _refused(caption, f"'{text}' is no number, colour and shape")
    try:
        (group,) = parse_scene(text).groups
    except ConfigError as error:
        raise _refused(caption, f"'{text}' is no number, colour and shape") from error
    return group


def _refused(caption: str, reason: str, hint: str = "") -> ConfigError:
    return ConfigError(
        f"'{caption}' is no caption of moving sprites: {reason}.{hint} Write for example "
        f"{_EXAMPLES}."
    )
