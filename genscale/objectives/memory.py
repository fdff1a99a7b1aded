"""What a denoiser hands back for its next call: nested tensors with a leading particle axis.

A memory is None, a tensor, or a dict, list or tuple of memories. It must follow its particle when
particles are selected, joined, or advanced apart from the others.

Networks that condition themselves on what they computed last remember ``{"latents", "known"}``.

An entry named :data:`STEP_CACHE` may be forgotten: rows of zeros remember nothing, and its
``evaluations`` ``(B,)`` say how many network evaluations a particle can look back on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from genscale.layers import scale_cache
from genscale.layers.joined_caches import alike
from genscale.layers.video_cache import VIDEO_CACHE

STEP_CACHE = "step_cache"


def map_tensors(memory: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply ``function`` to every tensor."""
    if isinstance(memory, Tensor):
        return function(memory)
    if isinstance(memory, dict):
        return {name: map_tensors(item, function) for name, item in memory.items()}
    if isinstance(memory, list | tuple):
        return type(memory)(map_tensors(item, function) for item in memory)
    return memory


def take_rows(memory: Any, index: Tensor) -> Any:
    """Take particles ``index`` (int64 on the CPU; repeats make copies)."""
    if isinstance(memory, Tensor):
        return memory[index.to(memory.device, non_blocking=True)]
    if scale_cache.is_cache(memory):
        return scale_cache.take(memory, index)
    if isinstance(memory, dict):
        return {name: take_rows(item, index) for name, item in memory.items()}
    if isinstance(memory, list | tuple):
        return type(memory)(take_rows(item, index) for item in memory)
    return memory


def cat_tensors(memories: Sequence[Any], counts: Sequence[int] | None = None) -> Any:
    """Concatenate memories of the same structure along the particles.

    Args:
        memories: one of each part.
        counts: particles of each part; with them, parts without the memory of the others join as
            ones that have forgotten it.

    Raises:
        ValueError: a part lacks a memory that cannot be forgotten.
    """
    known = [memory for memory in memories if memory is not None]
    if counts is not None and 0 < len(known) < len(memories):
        memories = [
            _forgotten(known[0], count) if memory is None else memory
            for memory, count in zip(memories, counts, strict=True)
        ]
    first = memories[0]
    if isinstance(first, Tensor):
        return torch.cat(list(memories))
    if isinstance(first, dict):
        items = {name: [memory[name] for memory in memories] for name in first}
        if VIDEO_CACHE in first:
            items[VIDEO_CACHE] = alike(items[VIDEO_CACHE])
        return {name: cat_tensors(parts, counts) for name, parts in items.items()}
    if isinstance(first, list | tuple):
        return type(first)(cat_tensors(items, counts) for items in zip(*memories, strict=True))
    return first


def put_rows(memory: Any, index: Tensor, rows: Any, count: int | None = None) -> Any:
    """Return ``memory`` with particles ``index`` replaced by ``rows``, in order.

    Args:
        memory: of all particles.
        index: int64 on the CPU.
        rows: memory of those particles.
        count: number of all particles; with it, those without the memory of ``rows`` stand beside
            them as ones that have forgotten it.

    Raises:
        ValueError: the other particles have no memory yet, and it cannot be forgotten, so that
            nothing can stand beside ``rows``.
    """
    if memory is None and rows is not None and count is not None:
        memory = _forgotten(rows, count)
    if isinstance(memory, Tensor):
        return memory.index_copy(0, index.to(memory.device, non_blocking=True), rows)
    if isinstance(memory, dict):
        if VIDEO_CACHE in memory:
            caches = alike([memory[VIDEO_CACHE], rows[VIDEO_CACHE]])
            memory, rows = {**memory, VIDEO_CACHE: caches[0]}, {**rows, VIDEO_CACHE: caches[1]}
        return {name: put_rows(item, index, rows[name], count) for name, item in memory.items()}
    if isinstance(memory, list | tuple):
        pairs = zip(memory, rows, strict=True)
        return type(memory)(put_rows(item, index, row, count) for item, row in pairs)
    if memory is None and rows is not None:
        raise _nothing_beside()
    return memory


def forget_rows(memory: Any, index: Tensor) -> Any:
    """Return ``memory`` in which particles ``index`` have forgotten what can be forgotten."""
    if isinstance(memory, dict):
        kept = {name: forget_rows(item, index) for name, item in memory.items()}
        if STEP_CACHE in memory:
            cache = memory[STEP_CACHE]
            counts = cache["evaluations"].index_fill(0, index, 0)
            kept[STEP_CACHE] = {**cache, "evaluations": counts}
        return kept
    if isinstance(memory, list | tuple):
        return type(memory)(forget_rows(item, index) for item in memory)
    return memory


def with_latest(memory: Any, later: Any, index: Tensor) -> Any:
    """Return ``memory`` with the latents of a later evaluation, where a network remembers latents.

    A step that evaluates twice commits the memory of the first evaluation: what counts steps, or
    lives by them, must not see the second. Latents are what the network computed last.

    Args:
        memory: of all particles, after the first evaluation.
        later: of the particles ``index``, after the second.
        index: int64 on the CPU.
    """
    if not isinstance(memory, dict) or not isinstance(later, dict):
        return memory
    if memory.keys() == later.keys() == {"latents", "known"}:
        return put_rows(memory, index, later)
    return {name: with_latest(item, later.get(name), index) for name, item in memory.items()}


def _forgotten(memory: Any, count: int) -> Any:
    """Return a memory of ``count`` particles, of the structure of ``memory``, all forgotten."""
    if isinstance(memory, dict):
        return {
            name: map_tensors(item, lambda rows: rows.new_zeros((count, *rows.shape[1:])))
            if name == STEP_CACHE
            else _forgotten(item, count)
            for name, item in memory.items()
        }
    if memory is not None:
        raise _nothing_beside()
    return None


def _nothing_beside() -> ValueError:
    return ValueError(
        "Some particles were evaluated before others, and the network now hands back memory "
        "that the others do not have. Advance them in separate states until all have begun."
    )
