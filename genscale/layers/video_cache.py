"""Keys and values of the frames that a video begins with, and what is kept of them.

A cache is a dict whose tensors lead with the particle, so that whoever owns a memory can select,
join and replace its rows without knowing what it holds. Frames lie in temporal order::

    keys, values  one a layer, (B, h, slots, N, d); keys are not rotated yet
    ids           (B, slots) int64 on the CPU: number of each frame in the video
    counts        (B, 4) int64 on the CPU: frames held, provisional frames after them, frames
                  committed since the video began, and the stamp of the last write
    shared        (B, 2) int64 on the CPU: slots committed, and the last stamp, of whoever writes
                  into the same buffers
    policy        :class:`CachePolicy`

The semantic policy has ``bank`` too, and of each frame what it will be judged by: ``mass``, one a
layer, ``(B, slots, N)``, and ``topics`` ``(B, slots, E)``.

New frames are provisional: they are written behind those held, and the next call writes over them.
:func:`commit_frames` makes them history. As keys are rotated where they are read, no table of
positions bounds the length of a video, and the frames held may be numbered anew.

States of one trajectory share buffers, and so do two branches that were never copied. ``shared`` is
shared or copied exactly where the buffers are: a branch that finds more committed than it holds
takes a copy before it writes, and one that finds its provisional frames written over cannot commit
them. Committing moves nothing while there is room; an eviction makes new buffers, so that whoever
still holds the old ones keeps its history.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from genscale.layers.semantic_bank import bank_frames, empty_bank

Cache = dict[str, Any]

VIDEO_CACHE = "video_cache"
"""Name of a cache in a memory."""

CacheKind = Literal["full", "rolling", "semantic"]

_HELD, _PROVISIONAL, _TOTAL, _STAMP = range(4)
_COMMITTED, _LAST = range(2)


@dataclass(frozen=True, slots=True)
class CachePolicy:
    """What is kept of the frames behind.

    Args:
        kind: ``"full"`` keeps all; ``"rolling"`` the first ``sink`` and the last ones, so that
            with a block to come there are ``window`` frames; ``"semantic"`` the first ``sink`` and
            the ``local`` last chunks, and of the others the tokens that attention dwells on
            (:mod:`genscale.layers.semantic_bank`).
        block_size: frames a block, which is also a chunk.
        window: see above.
        sink: first frames that are never dropped.
        tau: share of attention that a chunk's kept tokens receive together.
        top: chunks that are read again.
        local: see above.
        independent_first_frame: the first chunk is one frame.
    """

    kind: CacheKind = "full"
    block_size: int = 1
    window: int = 0
    sink: int = 0
    tau: float = 0.97
    top: int = 2
    local: int = 1
    independent_first_frame: bool = False

    @property
    def recent(self) -> int | None:
        """Frames held at most besides the sink; None for no bound."""
        if self.kind == "rolling":
            return self.window - self.block_size - self.sink
        return self.local * self.block_size if self.kind == "semantic" else None


def empty_cache(
    policy: CachePolicy,
    *,
    num_layers: int,
    batch: int,
    num_heads: int,
    tokens_per_frame: int,
    head_size: int,
    frames: int,
    device: torch.device | str,
    dtype: torch.dtype,
    topic_size: int = 0,
) -> Cache:
    """Return a cache that holds nothing.

    Args:
        policy: what it will keep.
        num_layers: attentions.
        batch: particles B.
        num_heads: heads h.
        tokens_per_frame: tokens N of a frame.
        head_size: channels d of a head.
        frames: slots to begin with; more are made where a call needs them.
        device: where keys and values live.
        dtype: theirs.
        topic_size: width of what chunks are looked up by; read by the semantic policy alone.
    """

    def buffers() -> list[Tensor]:
        shape = (batch, num_heads, frames, tokens_per_frame, head_size)
        return [torch.zeros(shape, device=device, dtype=dtype) for _ in range(num_layers)]

    cache: Cache = {
        "keys": buffers(),
        "values": buffers(),
        "ids": torch.zeros(batch, frames, dtype=torch.int64, device="cpu"),
        "counts": torch.zeros(batch, 4, dtype=torch.int64, device="cpu"),
        "shared": torch.zeros(batch, 2, dtype=torch.int64, device="cpu"),
        "policy": policy,
    }
    if policy.kind == "semantic":
        cache["bank"] = empty_bank(cache["keys"], topic_size)
        shape = (batch, frames, tokens_per_frame)
        cache["mass"] = [torch.zeros(shape, device=device) for _ in range(num_layers)]
        cache["topics"] = torch.zeros(batch, frames, topic_size, device=device)
    return cache


def frames_held(cache: Cache) -> int:
    """Return how many frames of history the buffers hold."""
    return _count(cache, _HELD)


def frames_committed(cache: Cache) -> int:
    """Return how many frames have been committed since the video began, kept or not."""
    return _count(cache, _TOTAL)


def frames_provisional(cache: Cache) -> int:
    """Return how many frames were written and not committed."""
    return _count(cache, _PROVISIONAL)


def frame_numbers(cache: Cache) -> list[int]:
    """Return the numbers in the video of the frames held and of the provisional ones."""
    numbers: list[int] = cache["ids"][0, : frames_held(cache) + frames_provisional(cache)].tolist()
    return numbers


def claim(cache: Cache, frames: int) -> Cache:
    """Return a cache into which this branch may write ``frames`` provisional frames.

    Raises:
        ValueError: the particles do not stand at the same frame.
    """
    held, total = frames_held(cache), frames_committed(cache)
    cache = {**cache, "keys": list(cache["keys"]), "values": list(cache["values"])}
    slots = cache["ids"].shape[1]
    if held + frames > slots or bool((cache["shared"][:, _COMMITTED] > held).any()):
        # a full cache grows by as much as it has, so that a long video copies little
        more = max(held + frames, 2 * slots) if cache["policy"].kind == "full" else held + frames
        slots = slots if held + frames <= slots else more
        cache = _moved(cache, list(range(held)), slots)
    shared, ids = cache["shared"], cache["ids"]
    shared[:, _LAST] += 1
    # in place: the slots behind those held are nobody's history
    ids[:, held : held + frames] = torch.arange(total, total + frames, device="cpu")
    cache["counts"] = _counts(cache, held, frames, total)
    return cache


def write(cache: Cache, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Write the provisional keys and values of one layer and return all there are.

    Where gradients flow through the new frames, buffers are joined instead: what autograd keeps
    for the backward pass must not be written over.

    Args:
        cache: from :func:`claim`.
        layer: which attention.
        keys: ``(B, h, f N, d)``, not rotated; stored in the buffers' dtype.
        values: likewise.

    Returns:
        keys and values ``(B, h, (held + f) N, d)``.
    """
    held = frames_held(cache)
    end = held + frames_provisional(cache)
    result = []
    for name, new in (("keys", keys), ("values", values)):
        buffer: Tensor = cache[name][layer]
        new = new.to(buffer.dtype).unflatten(2, (-1, buffer.shape[3]))
        if torch.is_grad_enabled() and (new.requires_grad or buffer.requires_grad):
            parts = (buffer[:, :, :held], new, buffer[:, :, end:])
            buffer = cache[name][layer] = torch.cat(parts, dim=2)
        else:
            if buffer.requires_grad:  # a backward pass still needs what it holds
                buffer = cache[name][layer] = buffer.detach().clone()
            buffer[:, :, held:end] = new
        result.append(buffer[:, :, :end].flatten(2, 3))
    return result[0], result[1]


def write_salience(cache: Cache, layer: int, mass: Tensor, topic: Tensor) -> None:
    """Write what the provisional frames will be judged by.

    Args:
        cache: from :func:`claim`, of the semantic policy.
        layer: which attention.
        mass: ``(B, f N)`` attention that their tokens receive.
        topic: ``(B, E)`` of their chunk.
    """
    held = frames_held(cache)
    end = held + frames_provisional(cache)
    buffer: Tensor = cache["mass"][layer]
    buffer[:, held:end] = mass.detach().unflatten(1, (-1, buffer.shape[2]))
    cache["topics"][:, held:end] = topic.detach()[:, None]


def commit_frames(memory: Any, frames: int) -> Any:
    """Make the first provisional frames of every video cache in a memory its history.

    What the policy does not keep is dropped; the other provisional frames are forgotten. Guidance
    and samplers may have nested the caches in any way.

    Args:
        memory: nested dicts, lists and tuples.
        frames: how many.

    Raises:
        ValueError: fewer were written, or they have been written over since.
    """
    if isinstance(memory, dict):
        return {
            name: _commit(item, frames) if name == VIDEO_CACHE else commit_frames(item, frames)
            for name, item in memory.items()
        }
    if isinstance(memory, list | tuple):
        return type(memory)(commit_frames(item, frames) for item in memory)
    return memory


def _commit(cache: Cache, frames: int) -> Cache:
    held, provisional = frames_held(cache), frames_provisional(cache)
    if not 0 <= frames <= provisional:
        raise ValueError(
            f"{frames} frames were to be committed, but {provisional} have been written since the "
            "last commit. Commit what the network has read."
        )
    counts, shared, policy = cache["counts"], cache["shared"], cache["policy"]
    if bool((counts[:, _STAMP] != shared[:, _LAST]).any()):
        raise ValueError(
            "The provisional frames have been written over by another call with the same memory. "
            "Let the network read the frames again right before they are committed."
        )
    held, total = held + frames, frames_committed(cache) + frames
    torch.maximum(
        shared[:, _COMMITTED], torch.full_like(shared[:, 0], held), out=shared[:, _COMMITTED]
    )
    cache = {**cache, "counts": _counts(cache, held, 0, total)}
    recent = policy.recent
    if recent is None or held <= policy.sink + recent:
        return cache
    last = held - recent
    if policy.kind == "semantic":
        cache = bank_frames(cache, policy, slice(policy.sink, last))
    kept = [*range(policy.sink), *range(last, held)]
    cache = _moved(cache, kept, cache["ids"].shape[1])
    return {**cache, "counts": _counts(cache, len(kept), 0, total)}


def _moved(cache: Cache, kept: Sequence[int], slots: int) -> Cache:
    """Return a cache of buffers of its own, which hold some of the slots, in that order."""

    def move(buffer: Tensor, axis: int) -> Tensor:
        shape = list(buffer.shape)
        shape[axis] = slots
        moved = buffer.new_zeros(shape)
        index = torch.tensor(list(kept), dtype=torch.int64, device=buffer.device)
        moved.narrow(axis, 0, len(kept)).copy_(buffer.index_select(axis, index))
        return moved

    shared = cache["shared"].clone()
    shared[:, _COMMITTED] = len(kept)
    moved = {
        **cache,
        "keys": [move(buffer, 2) for buffer in cache["keys"]],
        "values": [move(buffer, 2) for buffer in cache["values"]],
        "ids": move(cache["ids"], 1),
        "shared": shared,
    }
    if "bank" in cache:
        moved["mass"] = [move(buffer, 1) for buffer in cache["mass"]]
        moved["topics"] = move(cache["topics"], 1)
    return moved


def _counts(cache: Cache, held: int, provisional: int, total: int) -> Tensor:
    counts = torch.empty_like(cache["counts"])
    counts[:, :_STAMP] = torch.tensor([held, provisional, total], device="cpu")
    counts[:, _STAMP] = cache["shared"][:, _LAST]
    return counts


def _count(cache: Cache, column: int) -> int:
    numbers: Tensor = cache["counts"][:, column]
    first = int(numbers[0])
    if bool((numbers != first).any()):
        raise ValueError(
            f"Particles that hold {sorted(set(numbers.tolist()))} frames cannot be read together. "
            "Call the network once for each group that stands at the same frame."
        )
    return first
