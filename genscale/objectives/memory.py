"""What a denoiser hands back for its next call: nested tensors with a leading particle axis.

A memory is None, a tensor, or a dict, list or tuple of memories. It must follow its particle when
particles are selected, joined, or advanced apart from the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


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
    return map_tensors(memory, lambda rows: rows[index.to(rows.device, non_blocking=True)])


def cat_tensors(memories: Sequence[Any]) -> Any:
    """Concatenate memories of the same structure along the particles."""
    first = memories[0]
    if isinstance(first, Tensor):
        return torch.cat(list(memories))
    if isinstance(first, dict):
        return {name: cat_tensors([memory[name] for memory in memories]) for name in first}
    if isinstance(first, list | tuple):
        return type(first)(cat_tensors(items) for items in zip(*memories, strict=True))
    return first


def put_rows(memory: Any, index: Tensor, rows: Any) -> Any:
    """Return ``memory`` with particles ``index`` replaced by ``rows``, in order.

    Raises:
        ValueError: the other particles have no memory yet, so that nothing can stand beside
            ``rows``.
    """
    if isinstance(memory, Tensor):
        return memory.index_copy(0, index.to(memory.device, non_blocking=True), rows)
    if isinstance(memory, dict):
        return {name: put_rows(item, index, rows[name]) for name, item in memory.items()}
    if isinstance(memory, list | tuple):
        pairs = zip(memory, rows, strict=True)
        return type(memory)(put_rows(item, index, row) for item, row in pairs)
    if rows is not None:
        raise ValueError(
            "Some particles were evaluated before others, and the network now hands back memory "
            "that the others do not have. Advance them in separate states until all have begun."
        )
    return memory
