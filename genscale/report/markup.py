"""HTML that is escaped unless it was made here, and numbers as people read them."""

from __future__ import annotations

import html
import math
from typing import Any


class Markup(str):
    """Text that is HTML already. Plain strings are escaped wherever they are put into a page."""

    __slots__ = ()


def element(name: str, /, *children: str, **attributes: Any) -> Markup:
    """Return ``<name ...>children</name>``.

    Args:
        name: tag.
        children: contents; everything but :class:`Markup` is escaped.
        attributes: values are escaped; a trailing underscore is dropped (``class_``), other
            underscores become hyphens, and None leaves an attribute out.
    """
    return Markup(f"<{name}{_attributes(attributes)}>{join(*children)}</{name}>")


def void(name: str, /, **attributes: Any) -> Markup:
    """Return an element without contents or end tag, such as ``<img>``."""
    return Markup(f"<{name}{_attributes(attributes)}>")


def join(*parts: str) -> Markup:
    """Put parts one after the other; everything but :class:`Markup` is escaped."""
    return Markup("".join(p if isinstance(p, Markup) else html.escape(str(p)) for p in parts))


def _attributes(attributes: dict[str, Any]) -> str:
    words = []
    for name, value in attributes.items():
        if value is not None:
            key = name.rstrip("_").replace("_", "-")
            words.append(f' {key}="{html.escape(str(value))}"')
    return "".join(words)


def number(value: Any) -> str:
    """Write a result: integers with separators, floats to four places or digits, else as text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "none" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        places = max(4 - len(str(int(abs(value)))), 0) if abs(value) >= 1 else 4
        return f"{value:,.{places}f}"
    return f"{value:.3g}"


def setting(value: Any) -> str:
    """Write what somebody chose: as short as it can be written, 2 rather than 2.000."""
    if isinstance(value, list):
        pairs = all(isinstance(item, list) and len(item) == 2 for item in value)
        words = [f"{i[0]}={setting(i[1])}" if pairs else setting(i) for i in value]
        return ", ".join(words)
    is_float = isinstance(value, float) and math.isfinite(value)
    return f"{value:g}" if is_float and abs(value) < 1e6 else number(value)


def count(value: Any) -> str:
    """Write a large count with a unit: 1.23 M."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return number(value)
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return number(value)


def duration(seconds: Any) -> str:
    """Write seconds as hours, minutes and seconds, two units at most."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        return number(seconds)
    if not math.isfinite(seconds) or seconds < 0:
        return number(float(seconds))
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s"
