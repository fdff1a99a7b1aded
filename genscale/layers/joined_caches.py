"""Caches of videos made alike, so that particles from several of them can be held together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

Cache = dict[str, Any]


def alike(caches: Sequence[Cache]) -> list[Cache]:
    """Return caches (:mod:`genscale.layers.video_cache`) with buffers of equal shapes.

    Buffers grow where a call needs room, and a bank's chunks have room for the tokens of those
    that were made together. Shorter buffers are filled up; nothing reads what is added.

    Raises:
        ValueError: banks with other numbers of chunks.
    """
    slots = max(cache["ids"].shape[1] for cache in caches)
    longer = [_with_slots(cache, slots) for cache in caches]
    if "bank" not in caches[0]:
        return longer
    chunks = sorted({cache["bank"]["first"].shape[1] for cache in caches})
    if len(chunks) > 1:
        raise ValueError(
            f"Particles whose banks hold {chunks[0]} and {chunks[-1]} chunks cannot be held "
            "together. Advance videos with a semantic cache side by side, or in separate states."
        )
    layers = range(len(caches[0]["bank"]["cells"]))
    rooms = [max(cache["bank"]["cells"][i].shape[2] for cache in caches) for i in layers]
    return [{**cache, "bank": _with_rooms(cache["bank"], rooms)} for cache in longer]


def _with_slots(cache: Cache, slots: int) -> Cache:
    if cache["ids"].shape[1] == slots:
        return cache
    longer = {
        **cache,
        "keys": [_longer(buffer, 2, slots) for buffer in cache["keys"]],
        "values": [_longer(buffer, 2, slots) for buffer in cache["values"]],
        "ids": _longer(cache["ids"], 1, slots),
    }
    if "bank" in cache:
        longer["mass"] = [_longer(buffer, 1, slots) for buffer in cache["mass"]]
        longer["topics"] = _longer(cache["topics"], 1, slots)
    return longer


def _with_rooms(bank: Cache, rooms: Sequence[int]) -> Cache:
    return {
        **bank,
        "keys": [_longer(x, 3, room) for x, room in zip(bank["keys"], rooms, strict=True)],
        "values": [_longer(x, 3, room) for x, room in zip(bank["values"], rooms, strict=True)],
        # -1 says that there is no token
        "cells": [_longer(x, 2, room, -1) for x, room in zip(bank["cells"], rooms, strict=True)],
    }


def _longer(buffer: Tensor, axis: int, size: int, fill: int = 0) -> Tensor:
    missing = size - buffer.shape[axis]
    if missing == 0:
        return buffer
    pads = [0, 0] * (buffer.dim() - 1 - axis) + [0, missing]
    return F.pad(buffer, pads, value=fill)
