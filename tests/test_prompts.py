"""Prompts as a command line gives them, and what does not fit a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from genscale.conditioning.words import Words
from genscale.errors import ConfigError
from genscale.guidance.base import Guidance, Unguided
from genscale.guidance.cfg import ClassifierFree
from genscale.prompts import as_file_name, distinct, prompts_of_set, read_prompts


def test_one_prompt_several_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "wishes.txt"
    file.write_text("a red circle\n\n  two stars \n")
    assert read_prompts(None) is None
    assert read_prompts("three red circles") == ["three red circles"]
    assert read_prompts(["a", 3]) == ["a", "3"]
    assert read_prompts(str(file)) == ["a red circle", "two stars"]


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no file prompts=nowhere\.txt"):
        read_prompts("nowhere.txt")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ConfigError, match="holds no prompt"):
        read_prompts(str(tmp_path / "empty.txt"))
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match="is no UTF-8 text"):
        read_prompts(str(tmp_path / "bytes.txt"))


def asked(guidance: Guidance | None = None, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "given": True,
        "negative": None,
        "labels": None,
        "encoder": Words(num_tokens=4),
    }
    prompts = changes.pop("prompts", ["a ring"])
    return prompts_of_set(prompts, guidance=guidance or Unguided(), **{**settings, **changes})


def test_prompts_that_fit_are_handed_on() -> None:
    assert asked() == ["a ring"]
    assert asked(ClassifierFree(scale=2.0), negative="a star") == ["a ring"]
    assert asked(encoder=None, given=False) == ()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"encoder": None}, "prompts was given, but the model reads no text"),
        ({"encoder": None, "given": False, "negative": "x"}, "negative_prompt was given, but the"),
        ({"labels": [3]}, r"labels=\[3\] was given, but the model reads prompts"),
        ({"negative": "x"}, "without guidance nothing leads away from it"),
        ({"prompts": []}, r"one text or more, but \[\] was given"),
        ({"prompts": "a ring"}, "one text or more, but 'a ring' was given"),
        ({"prompts": ["a", " "]}, r"Prompt 2 of 2 \(' '\) is empty"),
    ],
)
def test_what_does_not_fit_is_told(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        asked(**changes)


def test_a_negative_prompt_is_checked_too() -> None:
    with pytest.raises(ConfigError, match=r"Negative prompt 1 of 1 .* has 5 tokens"):
        asked(ClassifierFree(scale=2.0), negative="a b c d")


def test_names_of_files_are_plain() -> None:
    assert as_file_name("Three red/blue circles!") == "three-red-blue-circles"
    assert len(as_file_name("word " * 50)) <= 40
    assert as_file_name("???") == "prompt"


def test_distinct_captions_keep_their_order() -> None:
    assert distinct(["b", "a", "b", "c", "d"], 3) == ["b", "a", "c"]
    assert distinct(["b"], 3) == ["b"]
