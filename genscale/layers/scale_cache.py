"""Keys and values of earlier tokens: buffers of fixed size that branches of a trajectory share.

A cache is a dict of tensors whose first axis is the particle, so that whoever owns a memory can
select, join and replace its rows without knowing what it holds::

    {"filled": (B,) int64 on the CPU, "keys": [(B, h, L, d), ...], "values": [...]}   one a layer

New tokens are written in place. States of one trajectory therefore share one buffer, and so do two
branches that were never copied; ``filled`` tells them apart. It says how many tokens have been
written into the buffer by anyone, and it is shared or copied exactly where the buffers are.
A branch that has n tokens and finds more than n written must not write over what another branch
may still read: it takes a copy first (:func:`claim`). A trajectory that simply goes on never
copies anything.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Cache = dict[str, Any]


def empty_cache(
    num_layers: int,
    batch: int,
    num_heads: int,
    length: int,
    head_size: int,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
) -> Cache:
    """Return buffers for ``length`` tokens in ``num_layers`` attentions, nothing written yet."""

    def buffers() -> list[Tensor]:
        shape = (batch, num_heads, length, head_size)
        return [torch.zeros(shape, device=device, dtype=dtype) for _ in range(num_layers)]

    filled = torch.zeros(batch, dtype=torch.int64, device="cpu")
    return {"filled": filled, "keys": buffers(), "values": buffers()}


def claim(cache: Cache, start: int, end: int) -> Cache:
    """Return a cache into which this branch may write tokens ``start .. end - 1``.

    Args:
        cache: buffers that hold this branch's first ``start`` tokens.
        start: tokens this branch has.
        end: tokens it will have.

    Raises:
        ValueError: fewer than ``start`` tokens have been written.
    """
    filled: Tensor = cache["filled"]
    if bool((filled < start).any()):
        raise ValueError(
            f"The cache holds {int(filled.min())} tokens, but {start} should come before the new "
            "ones. Go through the scales in order, with the memory of the one before."
        )
    if bool((filled > start).any()):  # another branch has written on
        cache = {name: _copy(part) for name, part in cache.items()}
    cache["filled"].fill_(end)
    return cache


def write(
    cache: Cache, layer: int, start: int, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Write new tokens of one layer and return its keys and values so far.

    Where gradients flow through the new tokens, buffers are joined instead: what autograd keeps
    for the backward pass must not be written over.

    Args:
        cache: from :func:`claim`.
        layer: which attention.
        start: tokens before the new ones.
        keys: ``(B, h, n, d)``; stored in the buffers' dtype.
        values: likewise.

    Returns:
        keys and values ``(B, h, start + n, d)``: views of the buffers.
    """
    end = start + keys.shape[2]
    result = []
    for name, new in (("keys", keys), ("values", values)):
        buffer: Tensor = cache[name][layer]
        new = new.to(buffer.dtype)
        if torch.is_grad_enabled() and (new.requires_grad or buffer.requires_grad):
            rest = buffer[:, :, end:]
            buffer = cache[name][layer] = torch.cat((buffer[:, :, :start], new, rest), dim=2)
        else:
            buffer[:, :, start:end] = new
        result.append(buffer[:, :, :end])
    return result[0], result[1]


def take(cache: Cache, index: Tensor) -> Cache:
    """Take particles ``index`` (int64 on the CPU; repeats make copies).

    Only tokens that have been written are copied, and consecutive particles not at all: what is
    returned is then a part of the same buffers, and ``filled`` a part of the same counts, so that
    :func:`claim` tells branches apart as ever. Guidance may keep its branches on a second axis.
    """
    filled: Tensor = cache["filled"]
    start, count = int(index[0]) if len(index) else 0, len(index)
    if bool((index == torch.arange(start, start + count)).all()):
        return {name: _rows(part, slice(start, start + count)) for name, part in cache.items()}
    chosen = filled[index]
    most = int(chosen.max()) if count else 0

    def copy(buffer: Tensor) -> Tensor:
        rows = buffer.new_zeros((count, *buffer.shape[1:]))
        rows[..., :most, :] = buffer[..., :most, :][index.to(buffer.device, non_blocking=True)]
        return rows

    return {
        name: chosen if name == "filled" else [copy(buffer) for buffer in part]
        for name, part in cache.items()
    }


def is_cache(memory: Any) -> bool:
    """Whether a part of a memory is such a cache."""
    return isinstance(memory, dict) and memory.keys() == {"filled", "keys", "values"}


def cache_dtype(device: torch.device, parameter: Tensor) -> torch.dtype:
    """Return the dtype in which attention runs: autocast's where it is on, else the weights'."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return parameter.dtype


def _rows(part: Any, rows: slice) -> Any:
    return [tensor[rows] for tensor in part] if isinstance(part, list) else part[rows]


def _copy(part: Any) -> Any:
    return [tensor.clone() for tensor in part] if isinstance(part, list) else part.clone()
