"""What a video remembers of chunks long past: the tokens that attention dwells on, by topic.

The semantic cache of arXiv:2511.22973, as far as the paper tells it. When a chunk leaves the frames
that are held densely, every layer keeps of it the smallest set of tokens that together receive a
share tau of the attention of the chunk's own last pass, one frame's worth at least. A chunk that
is being made looks up the chunks whose topic, the pooled prompt, is nearest to its own, and
attends to what is kept of them as well. Our reading where the paper stops: attention is averaged
over heads and measured by every eighth query of a chunk over the chunk's own keys; equally near
chunks are taken from the most recent on.

A bank is a dict of tensors that lead with the particle; it grows by one entry a chunk::

    keys, values  one a layer, (B, h, C, M, d), keys not rotated; M fits the largest chunk kept
    cells         one a layer, (B, C, M) int64: number of a token in its chunk, ascending; -1: none
    topics        (B, C, E) float32
    first         (B, C) int64: number in the video of the chunk's first frame
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from genscale.layers.video_cache import Cache, CachePolicy

Bank = dict[str, Any]

PROBE_STRIDE = 8


def empty_bank(keys: list[Tensor], topic_size: int) -> Bank:
    """Return a bank without chunks, for buffers ``(B, h, slots, N, d)`` of every layer."""

    def nothing(like: Tensor) -> Tensor:
        batch, heads, _, _, size = like.shape
        return like.new_zeros(batch, heads, 0, 0, size)

    def number(like: Tensor, *shape: int) -> Tensor:
        return torch.zeros(len(like), *shape, dtype=torch.int64, device=like.device)

    return {
        "keys": [nothing(buffer) for buffer in keys],
        "values": [nothing(buffer) for buffer in keys],
        "cells": [number(buffer, 0, 0) for buffer in keys],
        "topics": torch.zeros(len(keys[0]), 0, topic_size, device=keys[0].device),
        "first": number(keys[0], 0),
    }


def attention_mass(q: Tensor, k: Tensor, chunks: Sequence[tuple[int, int]]) -> Tensor:
    """Return the share of attention that every token of a chunk receives from that chunk.

    Args:
        q: ``(B, h, n, d)`` queries, as attention reads them.
        k: their keys, likewise.
        chunks: first token of each chunk, and the one after its last; together all n.

    Returns:
        ``(B, n)`` float32, which sums to 1 over each chunk.
    """
    masses = []
    for start, stop in chunks:
        probes = q[:, :, start:stop:PROBE_STRIDE].float()
        logits = probes @ k[:, :, start:stop].float().transpose(-1, -2) / q.shape[-1] ** 0.5
        masses.append(logits.softmax(dim=-1).mean(dim=(1, 2)))
    return torch.cat(masses, dim=1)


def salient(mass: Tensor, tau: float, least: int) -> Tensor:
    """Return the smallest set of tokens that receives a share ``tau`` of all attention.

    Args:
        mass: ``(B, n)`` attention that each token receives, not negative.
        tau: in (0, 1].
        least: tokens that are kept at least.

    Returns:
        bool ``(B, n)``.
    """
    share, order = (mass / mass.sum(dim=1, keepdim=True)).sort(dim=1, descending=True)
    # a token counts as long as those before it do not suffice
    needed = share.cumsum(dim=1) - share < tau
    needed[:, :least] = True
    return torch.zeros_like(needed).scatter(1, order, needed)


def bank_frames(cache: Cache, policy: CachePolicy, slots: slice) -> Cache:
    """Return a cache whose bank has what is worth keeping of the frames in some slots.

    Args:
        cache: with ``mass``, one a layer, ``(B, slots, N)``, and ``topics`` ``(B, slots, E)``.
        policy: tells the share to keep and the size of chunks.
        slots: of whole chunks.
    """
    start = slots.start
    while start < slots.stop:
        number = int(cache["ids"][0, start])
        single = policy.independent_first_frame and number == 0
        stop = start + (1 if single else policy.block_size)
        cache = {**cache, "bank": _with_chunk(cache, policy.tau, start, stop, number)}
        start = stop
    return cache


def _with_chunk(cache: Cache, tau: float, start: int, stop: int, number: int) -> Bank:
    bank: Bank = cache["bank"]
    tokens = cache["keys"][0].shape[3]
    kept = [salient(mass[:, start:stop].flatten(1), tau, tokens) for mass in cache["mass"]]
    # one wait for the device a chunk: what is not kept must not take room
    sizes = torch.stack([chosen.sum(dim=1).amax() for chosen in kept]).tolist()
    parts: dict[str, list[Tensor]] = {"keys": [], "values": [], "cells": []}
    for layer, (chosen, size) in enumerate(zip(kept, sizes, strict=True)):
        # those kept come first, in order
        cells = (~chosen).int().argsort(dim=1, stable=True)[:, :size]
        for name in ("keys", "values"):
            frames = cache[name][layer][:, :, start:stop].flatten(2, 3)
            index = cells[:, None, :, None].expand(-1, frames.shape[1], -1, frames.shape[3])
            parts[name].append(_append(bank[name][layer], frames.gather(2, index)[:, :, None], 0))
        cells = cells.masked_fill(~chosen.gather(1, cells), -1)
        parts["cells"].append(_append(bank["cells"][layer][..., None], cells[:, None, :, None], -1))
    first = torch.full_like(cache["mass"][0][:, :1, 0], number, dtype=torch.int64)
    return {
        "keys": parts["keys"],
        "values": parts["values"],
        "cells": [cells[..., 0] for cells in parts["cells"]],
        "topics": torch.cat((bank["topics"], cache["topics"][:, start : start + 1]), dim=1),
        "first": torch.cat((bank["first"], first), dim=1),
    }


def _append(chunks: Tensor, new: Tensor, fill: int) -> Tensor:
    """Join ``(B, ..., C, M, d)`` and ``(B, ..., 1, m, d)`` along C, the shorter ones filled up."""
    size = max(chunks.shape[-2], new.shape[-2])
    filled = [F.pad(x, (0, 0, 0, size - x.shape[-2]), value=fill) for x in (chunks, new)]
    return torch.cat(filled, dim=-3)


def look_up(bank: Bank, topic: Tensor, top: int) -> Tensor:
    """Return the numbers ``(B, l)`` of the ``top`` chunks nearest to a topic ``(B, E)``, ascending.

    There are fewer where the bank has fewer.
    """
    near = F.cosine_similarity(topic[:, None].float(), bank["topics"], dim=-1)
    recent_first = near.flip(1).argsort(dim=1, descending=True, stable=True)[:, :top]
    return (near.shape[1] - 1 - recent_first).sort(dim=1).values


def read_chunks(bank: Bank, layer: int, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what one layer keeps of some chunks.

    Args:
        bank: the bank.
        layer: which attention.
        chosen: ``(B, l)`` numbers of chunks.

    Returns:
        keys and values ``(B, h, l M, d)``, and cells ``(B, l, M)``.
    """
    result = []
    for name in ("keys", "values"):
        chunks = bank[name][layer]
        index = chosen[:, None, :, None, None].expand(-1, chunks.shape[1], -1, *chunks.shape[3:])
        result.append(chunks.gather(2, index).flatten(2, 3))
    cells = bank["cells"][layer]
    index = chosen[:, :, None].expand(-1, -1, cells.shape[2])
    return result[0], result[1], cells.gather(1, index)
