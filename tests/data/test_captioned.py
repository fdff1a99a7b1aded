"""Captions written on demand, and the kinds of captions a data set is asked for."""

from __future__ import annotations

import pytest

from genscale.data.captioned import WrittenCaptions, check_tasks
from genscale.errors import ConfigError

KNOWN = ("count", "colour")


def test_captions_are_written_when_asked_for() -> None:
    written: list[int] = []

    def write(row: int) -> str:
        written.append(row)
        return f"row {row}"

    captions = WrittenCaptions(10, write)
    assert len(captions) == 10
    assert written == []
    assert captions[3] == "row 3"
    assert captions[-1] == "row 9"
    assert captions[2:8:3] == ["row 2", "row 5"]
    assert written == [3, 9, 2, 5]


def test_kinds_keep_their_order() -> None:
    assert check_tasks(["colour", "count"], KNOWN) == ("colour", "count")


@pytest.mark.parametrize(
    ("tasks", "sentence"),
    [
        (["coulour"], r"names 'coulour', which is no kind of caption of clips \(count, colour\)"),
        ([], r"data.tasks=\[\] must name one kind"),
        (["count", "count"], "each once"),
    ],
)
def test_wrong_kinds_are_told_in_a_sentence(tasks: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check_tasks(tasks, KNOWN, " of clips")
