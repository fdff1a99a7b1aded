"""Settings that are one of a few words."""

from __future__ import annotations

from collections.abc import Sequence

from genscale.errors import ConfigError, did_you_mean


def check_name(
    setting: str, value: str | None, known: Sequence[str], *, optional: bool = False
) -> None:
    """Refuse a word that a setting does not know.

    Args:
        setting: its name on the command line.
        value: what was given.
        known: what there is.
        optional: whether None is allowed too.

    Raises:
        ConfigError: an unknown word.
    """
    if value in known or (optional and value is None):
        return
    words = f"{'null or ' if optional else ''}one of {', '.join(known)}"
    raise ConfigError(
        f"{setting} must be {words}, but is {value!r}.{did_you_mean(str(value), list(known))}"
    )
