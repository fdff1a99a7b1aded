"""Whole numbers of a config, checked before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from genscale.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig


def number_problems(cfg: DictConfig, least: Mapping[str, int | None]) -> list[str]:
    """Return a sentence for every value that is no whole number, or a number too small.

    Args:
        cfg: the composed config.
        least: config paths and the least number allowed there; None allows any.
    """
    from omegaconf import OmegaConf

    problems = []
    for path, bound in least.items():
        value = OmegaConf.select(cfg, path)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or (bound is not None and value < bound):
            wanted = "a whole number" if bound is None else f"a whole number of at least {bound}"
            problems.append(
                f"{path} must be {wanted}, but {value!r} was given. "
                f"Give e.g. {path}={max(bound or 0, 1)}."
            )
    return problems


def check_numbers(cfg: DictConfig, least: Mapping[str, int | None]) -> None:
    """Raise one error that lists every problem of :func:`number_problems`.

    Raises:
        ConfigError: a value is no whole number, or too small.
    """
    problems = number_problems(cfg, least)
    if problems:
        raise ConfigError("\n".join(problems))
