"""How many of what a sentence asks for: "three dogs and a cat on a sofa"."""

from __future__ import annotations

import re

from genscale.errors import ConfigError

_WORDS = (
    *("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"),
    *("twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    *("nineteen", "twenty"),
)
NUMBER_WORDS = {"a": 1, "an": 1} | {word: i + 1 for i, word in enumerate(_WORDS)}
_PICTURE = re.compile(
    r"^(?:an?|the)?\s*(?:\w+\s)?(?:photo|photograph|picture|image|drawing|painting) (?:of|with) "
)
_SETTING = re.compile(r"\s(?:in|on|at|near|under|over|by|beside|behind|against|inside|next to)\s.*")
_IRREGULAR = {"person": "people", "mouse": "mice", "child": "children", "tooth": "teeth"}
_UNCHANGED = ("sheep", "skis", "scissors", "fish", "aircraft")


def read_counts(caption: str) -> dict[str, int]:
    """Return the number asked for of each noun phrase, as it stands in the caption.

    The groups of a caption are joined by commas and "and"; each begins with a number. What says
    where they are is left out, as is "a photo of" at the start.

    Raises:
        ConfigError: a group begins with no number; the sentence quotes the caption.
    """
    text = _PICTURE.sub("", " ".join(caption.lower().strip().rstrip(".").split()))
    text = _SETTING.sub("", text)
    counts: dict[str, int] = {}
    for group in re.split(r",\s*(?:and\s+)?|\s+and\s+", text):
        number, _, phrase = group.strip().partition(" ")
        count = int(number) if number.isascii() and number.isdigit() else NUMBER_WORDS.get(number)
        if count is None or not phrase:
            raise ConfigError(
                f"'{caption}' asks for no number of things: '{group.strip()}' does not begin with "
                "a number. Write for example 'three dogs and a cat'."
            )
        counts[phrase] = counts.get(phrase, 0) + count
    return counts


def forms(name: str) -> tuple[str, ...]:
    """Return how a class may be called: its name, and its plurals."""
    *before, last = name.split(" ")
    if last in _UNCHANGED:
        return (name,)
    plurals = [last + "s"]
    if re.search(r"(?:s|x|z|ch|sh)$", last):
        plurals = [last + "es"]
    elif re.search(r"[^aeiou]y$", last):
        plurals = [last[:-1] + "ies"]
    elif last.endswith("fe"):
        plurals = [last[:-2] + "ves"]
    if last in _IRREGULAR:
        plurals.append(_IRREGULAR[last])
    return (name, *(" ".join((*before, plural)) for plural in plurals))


def class_in(phrase: str, names: tuple[str, ...]) -> str | None:
    """Return the class that a noun phrase speaks of: the longest name that it ends with."""
    found = [
        name
        for name in names
        for form in forms(name.lower())
        if phrase == form or phrase.endswith(f" {form}")
    ]
    return max(found, key=len, default=None)
