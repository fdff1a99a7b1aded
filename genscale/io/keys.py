"""What every state dict is held against: whole, of the right shapes, and of the same depth."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from genscale.errors import CheckpointError

if TYPE_CHECKING:
    from genscale.backbones.base import Backbone

Shapes = Mapping[str, tuple[int, ...]]
Advice = str | Callable[[], str]  # a sentence, or what finds it; asked for only in trouble

_NUMBERED = re.compile(r"(?:^|\.)(\d+)(?=\.)")


def check_keys(
    given: Iterable[str],
    wanted: Iterable[str],
    *,
    owner: str,
    advice: Advice,
    source: str = "",
    ignored: re.Pattern[str] | None = None,
) -> None:
    """Check that a state dict has all the keys wanted and no other ones.

    Args:
        given: keys of the file.
        wanted: keys of the model.
        owner: whose keys they are, for the sentence.
        advice: what to do.
        source: the file, for the sentence.
        ignored: keys that may be left over, matched whole.

    Raises:
        CheckpointError: names the counts and the first key.
    """
    there, known = set(given), dict.fromkeys(wanted)
    missing = [name for name in known if name not in there]
    unexpected = [name for name in given if name not in known]
    if ignored is not None:
        unexpected = [name for name in unexpected if not ignored.fullmatch(name)]
    if missing or unexpected:
        raise CheckpointError(
            f"{len(missing)} missing, {len(unexpected)} unexpected keys for {owner}"
            f"{_inside(source)} (first: {(missing + unexpected)[0]}). {_sentence(advice)}".rstrip()
        )


def check_shapes(
    given: Mapping[str, Tensor], wanted: Shapes, *, owner: str, advice: Advice, source: str = ""
) -> None:
    """Check that tensors have the shapes wanted; their keys have been checked already.

    Raises:
        CheckpointError: names the count and the first tensor with both shapes.
    """
    wrong = [name for name, shape in wanted.items() if tuple(given[name].shape) != tuple(shape)]
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{len(wrong)} tensors{_inside(source)} have another shape than {owner}'s (first: "
            f"{name} is {tuple(given[name].shape)}, expected {tuple(wanted[name])}). "
            f"{_sentence(advice)}".rstrip()
        )


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def count_children(keys: Iterable[str], prefix: str) -> int:
    """Count the children ``prefix.0``, ``prefix.1``, ... of a list of modules."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return len({match[1] for key in keys if (match := pattern.match(key))})


def depth_sentence(given: Iterable[str], wanted: Iterable[str]) -> str:
    """Say how many blocks a file and a model have where that differs; else an empty string.

    Lists called ``blocks`` are looked at first, then all other numbered lists of modules.
    """
    theirs, ours = _lists(given), _lists(wanted)
    names = sorted(ours | theirs, key=lambda name: not name.endswith("blocks"))
    for name in names:
        found, expected = len(theirs.get(name, ())), len(ours.get(name, ()))
        if found != expected:
            where = "" if name == "blocks" else f" of {name}"
            return f"The file looks like depth {found}{where}, the config says {expected}."
    return ""


def settings_sentence(
    read: Callable[[], Mapping[str, Any]], own: Mapping[str, Any], *, family: str
) -> str:
    """Say which setting of a file differs from the model's, and what to do.

    Args:
        read: reads the file's settings.
        own: the model's.
        family: what the file was taken for.
    """
    try:
        found = read()
    except (CheckpointError, KeyError, IndexError):
        return f"The file does not look like a {family}. Check its path."
    for name, value in found.items():
        # heads leave no trace in shapes; what was left to the constructor agrees with the rest
        if name == "num_heads" or own.get(name) is None:
            continue
        if value is not None and not _equal(value, own[name]):
            return (
                f"The file looks like {name} {value}, the config says {own[name]}. "
                f"Build the model with {name}={value}."
            )
    return "The file itself is incomplete or changed. Get it again."


def on_meta(backbone: type[Backbone], config: Mapping[str, Any]) -> Any:
    """Build a model without weights from its config, of which private entries are left out."""
    with torch.device("meta"):
        return backbone(**{name: value for name, value in config.items() if name[0] != "_"})


def _lists(keys: Iterable[str]) -> dict[str, set[str]]:
    """Return the numbers that occur below every numbered list of modules, in order of keys."""
    found: dict[str, set[str]] = {}
    for key in keys:
        for match in _NUMBERED.finditer(key):
            found.setdefault(key[: match.start()], set()).add(match[1])
    return found


def _equal(one: Any, other: Any) -> bool:
    """Compare settings; a number stands for a list of that number."""
    if isinstance(one, list) and not isinstance(other, list | tuple):
        return all(item == other for item in one)
    return list(one) == list(other) if isinstance(one, list) else bool(one == other)


def _inside(source: str) -> str:
    return f" in {source}" if source else ""


def _sentence(advice: Advice) -> str:
    return advice if isinstance(advice, str) else advice()


def refuse_scaled_skips(config: Mapping[str, Any], *, family: str) -> None:
    """Refuse a model whose long skips are scaled, where the official program scales none.

    Constant factors leave no trace in a state dict, which would load and give other numbers.

    Raises:
        CheckpointError: ``skip_scale`` is not ``none``.
    """
    kinds = config["skip_scale"]
    if {"none"} != ({kinds} if isinstance(kinds, str) else set(kinds)):
        raise CheckpointError(
            f"The model has skip_scale={kinds}, which the official {family} does not know. Build "
            "it with skip_scale=none, or save it with save_pretrained."
        )
