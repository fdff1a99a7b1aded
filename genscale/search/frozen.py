"""Weights that are not to learn while a search differentiates through them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import nn

_OURS = "genscale."


@contextmanager
def frozen(*parts: Any) -> Iterator[None]:
    """Keep gradients from the weights that ``parts`` hold, for as long as this lasts.

    A layer whose weights may learn keeps its input for their gradient; frozen, it keeps only what
    the way back to its input needs.

    Args:
        parts: views, guided or not; decoders; rewards; networks: whatever networks are reached
            from.
    """
    weights = [
        weight for network in networks(*parts) for weight in network.parameters()
        if weight.requires_grad
    ]  # fmt: skip
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


def networks(*parts: Any) -> list[nn.Module]:
    """Return the networks within objects of the project, methods and functions, each once."""
    found: list[nn.Module] = []
    seen: dict[int, Any] = {}  # the objects too, so that no id is used again
    waiting = list(parts)
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen[id(part)] = part
        if isinstance(part, nn.Module):
            found.append(part)
        else:
            waiting += _within(part)
    return found


def _within(part: Any) -> list[Any]:
    if isinstance(part, Mapping):
        return list(part.values())
    if isinstance(part, list | tuple):
        return list(part)
    if isinstance(part, MethodType):
        return [part.__self__]
    if isinstance(part, partial):
        return [part.func, *part.args, *part.keywords.values()]
    if isinstance(part, FunctionType):
        cells = part.__closure__ or ()
        return [cell.cell_contents for cell in cells if cell != type(cell)()]
    kinds = [] if isinstance(part, type) else type(part).__mro__
    if not any(kind.__module__.startswith(_OURS) for kind in kinds):
        return []
    names = [name for kind in kinds for name in getattr(kind, "__slots__", ())]
    return [*getattr(part, "__dict__", {}).values(), *(getattr(part, n, None) for n in names)]
