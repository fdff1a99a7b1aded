"""What a scene is, what its caption says, and what a caption asks for.

A caption names groups of like objects, and a relation where there are two single ones::

    caption  = group | group relation group | group {"," group} "and" group
    group    = number [colour] shape
    number   = "a" | "an" | "one" | "two" | ... | "six"
    relation = "left of" | "right of" | "above" | "below"

The shape stands in the plural after two and more. A caption is complete: the picture shows what
it names and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from genscale.errors import ConfigError, did_you_mean

Shape = Literal["circle", "square", "triangle", "cross", "ring"]
Colour = Literal["red", "green", "blue", "yellow", "magenta", "cyan", "orange", "white"]
Background = Literal["black", "grey", "navy", "maroon", "forest"]
Relation = Literal["left of", "right of", "above", "below"]
Task = Literal["count", "colour", "shape", "relation", "multi"]

SHAPES: tuple[Shape, ...] = get_args(Shape)
RELATIONS: tuple[Relation, ...] = get_args(Relation)
TASKS: tuple[Task, ...] = get_args(Task)

COLOURS: dict[Colour, tuple[int, int, int]] = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "magenta": (255, 0, 255),
    "cyan": (0, 255, 255),
    "orange": (255, 165, 0),  # linear green 0.38: 0.38 from red, 0.62 from yellow
    "white": (255, 255, 255),
}
"""Colours of objects, 8-bit sRGB."""

BACKGROUNDS: dict[Background, tuple[int, int, int]] = {
    "black": (0, 0, 0),
    "grey": (88, 88, 88),
    "navy": (0, 0, 88),
    "maroon": (88, 0, 0),
    "forest": (0, 72, 0),
}
"""Colours behind objects: dark, 0.9 or more in linear RGB from every colour of an object."""

NUMBERS = ("one", "two", "three", "four", "five", "six")
MAX_OBJECTS = len(NUMBERS)


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object; lengths are shares of the canvas, the origin is its upper left corner.

    Attributes:
        shape: its shape.
        colour: its colour.
        x: centre of its bounding box, to the right.
        y: centre of its bounding box, downwards.
        size: side of its bounding box, which is square.
    """

    shape: Shape
    colour: Colour
    x: float
    y: float
    size: float


@dataclass(frozen=True, slots=True)
class Scene:
    """Objects that do not touch, on a background."""

    background: Background
    objects: tuple[SceneObject, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """A number of like objects; ``colour`` is None where the caption names none."""

    count: int
    colour: Colour | None
    shape: Shape

    def __str__(self) -> str:
        kind = f"{self.colour} {self.shape}" if self.colour else self.shape
        if self.count > 1:
            return f"{NUMBERS[self.count - 1]} {kind}{'es' if kind.endswith('s') else 's'}"
        return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


@dataclass(frozen=True, slots=True)
class Requirement:
    """What a caption asks for.

    Attributes:
        groups: the groups it names.
        relation: where the first group lies as seen from the second, if the caption says so.
    """

    groups: tuple[Group, ...]
    relation: Relation | None = None

    @property
    def count(self) -> int:
        """The number of objects."""
        return sum(group.count for group in self.groups)

    @property
    def objects(self) -> tuple[tuple[Colour | None, Shape], ...]:
        """Colour and shape of every object, in the order of the caption."""
        return tuple((each.colour, each.shape) for each in self.groups for _ in range(each.count))

    def __str__(self) -> str:
        words = [str(group) for group in self.groups]
        if self.relation is not None:
            return f"{words[0]} {self.relation} {words[1]}"
        if len(words) == 1:
            return words[0]
        return f"{', '.join(words[:-1])} and {words[-1]}"


def caption_of(requirement: Requirement, task: Task) -> str:
    """Return the caption that asks for something; a count of one is spelt ``one``."""
    text = str(requirement)
    if task == "count" and requirement.count == 1:
        return f"one {text.split(' ', 1)[1]}"
    return text


def parse_caption(caption: str) -> Requirement:
    """Read a caption; upper case and a full stop at the end are allowed.

    Raises:
        ConfigError: if it does not follow the grammar; the sentence names the word that fails.
    """
    text = " ".join(caption.lower().rstrip(". \n").split())
    for relation in RELATIONS:
        first, found, second = text.partition(f" {relation} ")
        if found:
            groups = (_parse_group(first, caption), _parse_group(second, caption))
            if any(group.count > 1 for group in groups):
                raise _refused(caption, f"a relation ('{relation}') holds between single objects")
            return Requirement(groups, relation)
    head, found, last = text.rpartition(" and ")
    parts = [*head.split(", "), last] if found else [last]
    requirement = Requirement(tuple(_parse_group(part, caption) for part in parts))
    if requirement.count > MAX_OBJECTS:
        raise _refused(caption, f"a scene has at most {MAX_OBJECTS} objects")
    return requirement


def _parse_group(text: str, caption: str) -> Group:
    words = text.split()
    if len(words) not in (2, 3):
        raise _refused(caption, f"'{text}' is no number, colour and shape")
    number, shape = words[0], words[-1]
    numbers = {"a": 1, "an": 1} | {word: i + 1 for i, word in enumerate(NUMBERS)}
    if number not in numbers:
        raise _unknown(caption, number, "number", tuple(numbers))
    count = numbers[number]
    shapes = {_shape_word(each, count): each for each in SHAPES}
    if shape not in shapes:
        raise _unknown(caption, shape, f"shape after '{number}'", tuple(shapes))
    if len(words) == 2:
        return Group(count, None, shapes[shape])
    colours = {str(each): each for each in COLOURS}
    if words[1] not in colours:
        raise _unknown(caption, words[1], "colour", tuple(colours))
    return Group(count, colours[words[1]], shapes[shape])


def _shape_word(shape: Shape, count: int) -> str:
    return str(Group(count, None, shape)).split()[-1]


def _unknown(caption: str, word: str, what: str, known: tuple[str, ...]) -> ConfigError:
    hint = did_you_mean(word, known)
    return _refused(caption, f"'{word}' is no {what} ({', '.join(known)})", hint)


def _refused(caption: str, reason: str, hint: str = "") -> ConfigError:
    return ConfigError(
        f"'{caption}' is no caption of a scene: {reason}.{hint} Write for example 'three red "
        "circles', 'a red circle left of a blue square' or 'two red circles and a blue square'."
    )
