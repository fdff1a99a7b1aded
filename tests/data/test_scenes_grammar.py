"""Captions of scenes: what is written, what is read back, and the words that are refused."""

from __future__ import annotations

from itertools import product

import pytest

from genscale.data.scenes.grammar import (
    COLOURS,
    RELATIONS,
    SHAPES,
    Group,
    Requirement,
    SceneObject,
    caption_of,
    parse_caption,
)
from genscale.data.scenes.relations import directions, directions_between, holds
from genscale.errors import ConfigError

EXAMPLES = {
    "three red circles": Requirement((Group(3, "red", "circle"),)),
    "an orange ring": Requirement((Group(1, "orange", "ring"),)),
    "a cross": Requirement((Group(1, None, "cross"),)),
    "six crosses": Requirement((Group(6, None, "cross"),)),
    "a red circle left of a blue square": Requirement(
        (Group(1, "red", "circle"), Group(1, "blue", "square")), "left of"
    ),
    "two cyan triangles and a white square": Requirement(
        (Group(2, "cyan", "triangle"), Group(1, "white", "square"))
    ),
    "a red ring, two blue rings and a red cross": Requirement(
        (Group(1, "red", "ring"), Group(2, "blue", "ring"), Group(1, "red", "cross"))
    ),
}


@pytest.mark.parametrize(("caption", "requirement"), EXAMPLES.items())
def test_a_caption_says_what_is_asked_for_and_is_read_back(
    caption: str, requirement: Requirement
) -> None:
    assert str(requirement) == caption
    assert parse_caption(caption) == requirement


def test_every_group_is_read_back() -> None:
    for count, colour, shape in product(range(1, 7), (None, *COLOURS), SHAPES):
        wanted = Requirement((Group(count, colour, shape),))
        assert parse_caption(str(wanted)) == wanted
        assert wanted.count == count
        assert wanted.objects == ((colour, shape),) * count


def test_every_relation_is_read_back() -> None:
    for relation in RELATIONS:
        wanted = Requirement((Group(1, "red", "ring"), Group(1, None, "cross")), relation)
        assert parse_caption(str(wanted)) == wanted


def test_a_count_of_one_is_spelt_and_means_the_same() -> None:
    one = Requirement((Group(1, "orange", "circle"),))
    assert caption_of(one, "count") == "one orange circle"
    assert caption_of(one, "colour") == "an orange circle"
    assert parse_caption("one orange circle") == one


def test_case_spaces_and_a_full_stop_do_not_matter() -> None:
    assert parse_caption(" Three  red\tCircles. ") == EXAMPLES["three red circles"]


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("three rde circles", r"'rde' is no colour .* Did you mean 'red'\?"),
        ("three red circle", r"'circle' is no shape after 'three' .* Did you mean 'circles'\?"),
        ("a red circles", r"'circles' is no shape after 'a' .* Did you mean 'circle'\?"),
        ("seven red circles", r"'seven' is no number"),
        ("red", r"'red' is no number, colour and shape"),
        ("", r"'' is no caption of a scene"),
        ("two red circles left of a ring", r"a relation \('left of'\) holds between single"),
        ("four red rings and three blue rings", r"a scene has at most 6 objects"),
        ("an astronaut riding a horse", r"Write for example 'three red circles'"),
    ],
)
def test_other_captions_are_refused_with_the_word_that_fails(caption: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse_caption(caption)


def _at(x: float, y: float, size: float = 0.2) -> SceneObject:
    return SceneObject("circle", "red", x, y, size)


def test_relations_follow_the_offset_shortened_by_a_tenth_of_both_boxes() -> None:
    # offset (-0.5, 0.3), shortened by 0.04 along each axis, over sqrt(0.34) = 0.5831
    ways = directions_between(_at(0.2, 0.6), _at(0.7, 0.3))
    assert ways["left of"] == pytest.approx(0.46 / 0.34**0.5)
    assert ways["below"] == pytest.approx(0.26 / 0.34**0.5)
    assert ways == pytest.approx(directions((-0.5, 0.3), (0.4, 0.4)))
    assert (ways["right of"], ways["above"]) == (-ways["left of"], -ways["below"])
    assert holds("left of", _at(0.2, 0.6), _at(0.7, 0.3))
    assert not holds("below", _at(0.2, 0.6), _at(0.7, 0.3))  # 0.446 is not above 0.5


def test_on_a_diagonal_two_relations_hold_and_on_one_spot_none() -> None:
    upper, lower = _at(0.2, 0.2), _at(0.8, 0.8)
    assert [r for r in RELATIONS if holds(r, upper, lower)] == ["left of", "above"]
    assert [r for r in RELATIONS if holds(r, lower, upper)] == ["right of", "below"]
    assert not any(holds(r, upper, upper) for r in RELATIONS)
