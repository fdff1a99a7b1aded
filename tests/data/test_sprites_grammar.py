"""Captions of moving sprites: what is written, what is read back, and what is refused."""

from __future__ import annotations

import pytest

from genscale.data.scenes.grammar import Group
from genscale.data.sprites.grammar import (
    SpriteGroup,
    SpriteRequirement,
    mirrored_caption,
    parse_sprites,
    sprite_caption,
)
from genscale.errors import ConfigError


@pytest.mark.parametrize(
    ("caption", "groups"),
    [
        ("a red circle moving right", [(1, "red", "circle", "right", None)]),
        ("two blue squares moving up", [(2, "blue", "squares", "up", None)]),
        ("a yellow triangle moving quickly down", [(1, "yellow", "triangle", "down", "quickly")]),
        ("an orange ring moving slowly left", [(1, "orange", "ring", "left", "slowly")]),
        ("a still orange ring", [(1, "orange", "ring", "still", None)]),
        ("three still green crosses", [(3, "green", "crosses", "still", None)]),
        ("a white ring bouncing", [(1, "white", "ring", "bouncing", None)]),
        ("two red circles", [(2, "red", "circles", None, None)]),
        (
            "a red circle moving left and a still green square",
            [(1, "red", "circle", "left", None), (1, "green", "square", "still", None)],
        ),
    ],
)
def test_captions_are_read_back_as_they_were_written(caption: str, groups: list) -> None:
    singular = {"squares": "square", "circles": "circle", "crosses": "cross"}
    asked = SpriteRequirement(
        tuple(
            SpriteGroup(Group(count, colour, singular.get(shape, shape)), motion, speed)
            for count, colour, shape, motion, speed in groups
        )
    )
    assert str(asked) == caption
    assert parse_sprites(caption) == asked
    assert parse_sprites(f"{caption.upper()}.") == asked
    assert asked.count == len(asked.objects) == sum(group[0] for group in groups)


def test_a_count_of_one_is_spelt_in_counting_captions_only() -> None:
    asked = parse_sprites("one red circle moving up")
    assert sprite_caption(asked, "count") == "one red circle moving up"
    assert sprite_caption(asked, "motion") == "a red circle moving up"
    assert str(asked.unmoved()) == "a red circle"


def test_mirroring_changes_left_and_right_alone() -> None:
    assert mirrored_caption("a red circle moving left and a blue ring moving up") == (
        "a red circle moving right and a blue ring moving up"
    )


@pytest.mark.parametrize(
    ("caption", "sentence"),
    [
        ("a dog", r"'dog' is no number, colour or shape"),
        ("a red circl moving up", r"'circl' is no .*Did you mean 'circle'"),
        ("a red circle moving rigt", r"'rigt' after 'moving' .*Did you mean 'right'"),
        ("a red circle moving", r"'moving' is no number, colour or shape"),
        ("a red circle moving quickly", r"'quickly' after 'moving' is no direction"),
        ("two red circle moving up", r"'two red circle' is no number, colour and shape"),
        ("a circle moving up", r"'a circle' is no number, colour and shape"),
        ("three red circles and two red rings", r"a clip has at most 4 objects"),
        ("a red ring and a red ring and a red ring", r"it names 3 groups"),
        ("", r"'' is no number, colour and shape"),
    ],
)
def test_other_captions_are_refused_by_what_fails(caption: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse_sprites(caption)
