"""The prompts of a set of samples: read, held against the model, and as parts of file names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genscale.conditioning.text import TextEncoder
from genscale.errors import ConfigError
from genscale.guidance.base import Guidance

_LONGEST = 40  # characters of a prompt in a file name


def read_prompts(value: Any) -> list[str] | None:
    """Return the prompts that a command line gives.

    Args:
        value: one prompt; a list of them; or the path of a text file, which ends in ``.txt`` and
            holds a prompt a line (empty lines are passed over). None gives None.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: the file holds no prompts, or is no UTF-8 text.
    """
    if value is None:
        return None
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [str(item) for item in value]
    text = str(value)
    if not text.endswith(".txt"):
        return [text]
    path = Path(text).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file prompts={text}, and a text file with a prompt a line was expected. "
            "Give its path, or a prompt that does not end in .txt."
        )
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"prompts={text} is no UTF-8 text ({error}). Save it as UTF-8."
        ) from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise ConfigError(f"prompts={text} holds no prompt. Write one a line.")
    return found


def prompts_of_set(
    prompts: Sequence[str],
    *,
    given: bool,
    negative: str | None,
    labels: Any,
    encoder: TextEncoder | None,
    guidance: Guidance,
) -> Sequence[str]:
    """Return the prompts that the samples of a set cycle through; none for a model without text.

    Args:
        prompts: those asked for, or examples in their place.
        given: whether they were asked for.
        negative: the negative prompt, or None.
        labels: classes asked for by number of a model that knows none, else None.
        encoder: of the model; None for one that reads no text.
        guidance: what would lead away from the negative prompt.

    Raises:
        ConfigError: what was asked for does not fit the model.
    """
    if encoder is None:
        if given or negative:
            raise ConfigError(
                f"{'prompts' if given else 'negative_prompt'} was given, but the model reads no "
                "text. Leave it out and give labels=... where the model knows classes, or choose "
                "the run of a model that reads text."
            )
        return ()
    if labels is not None:
        raise ConfigError(
            f"labels={list(labels)} was given, but the model reads prompts, not classes. Give "
            "prompts=... instead."
        )
    if negative and getattr(guidance, "scale", 1.0) == 1.0:
        raise ConfigError(
            "negative_prompt was given, but without guidance nothing leads away from it. Give "
            "guidance.scale=2, say."
        )
    if isinstance(prompts, str) or not prompts:
        raise ConfigError(
            f"prompts must be one text or more, but {prompts!r} was given. "
            'Give e.g. prompts="three red circles".'
        )
    problem = encoder.prompt_problem(prompts)
    if problem is None and negative:
        problem = encoder.prompt_problem([negative], what="Negative prompt")
    if problem is not None:
        raise ConfigError(problem)
    return prompts


def as_file_name(prompt: str) -> str:
    """Return a prompt as part of a file name: lower case, digits and dashes, not too long."""
    words = re.findall(r"[a-z0-9]+", prompt.lower())
    return "-".join(words)[:_LONGEST].rstrip("-") or "prompt"


def distinct(captions: Sequence[str], count: int) -> list[str]:
    """Return the first ``count`` captions that differ from each other, in their order."""
    found: dict[str, None] = {}
    for i in range(len(captions)):
        found.setdefault(captions[i])
        if len(found) == count:
            break
    return list(found)
