"""Which frames attend to which: block-causal video, and its forms for different attentions.

Every rule is one of whole frames, so that a table over frames says it all. From that table follow
a dense mask over tokens, a ``BlockMask`` of FlexAttention, and runs of keys for each run of queries
with which plain attention needs no mask at all. One object therefore stands behind training, loss
and cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.errors import ConfigError
from genscale.layers.attention import attend

Run = tuple[int, int]
"""First token, and the one after the last."""

MaskMode = Literal["causal", "teacher"]


def block_spans(frames: int, block_size: int, *, short_first: bool = False) -> tuple[Run, ...]:
    """Return the frames of every block: first frame, and the one after the last.

    Args:
        frames: number of frames.
        block_size: frames a block.
        short_first: the first block has one frame alone.

    Raises:
        ValueError: the frames are no whole number of blocks.
    """
    first = 1 if short_first else 0
    if frames < 1 or frames < first or (frames - first) % block_size:
        kind = f"1 + a multiple of {block_size}" if short_first else f"a multiple of {block_size}"
        least = frames - (frames - first) % block_size
        raise ValueError(
            f"Frames must be {kind}, blocks of {block_size}, but {frames} were given. "
            f"Give {f'{least} or ' if least > 0 else ''}{least + block_size}."
        )
    edges = [*([0] if first else []), *range(first, frames + 1, block_size)]
    return tuple(pairwise(edges))


@dataclass(frozen=True, slots=True)
class BlockCausalMask:
    """What the frames of a block-causal video attend to.

    ``"causal"``: a block attends to itself and to all earlier ones. ``"teacher"``: the sequence is
    the clean video followed by the noisy one; clean blocks attend to clean ones causally, a noisy
    block to itself and to the clean blocks before it.

    Args:
        frames: frames F of the video; of both halves together there are 2 F in teacher mode.
        block_size: frames a block.
        tokens_per_frame: tokens N of a frame.
        mode: see above.
        window: with w > 0, frames a block attends to, its own included: the ``sink`` first of the
            video and the w - ``sink`` last up to the block's end.
        sink: see ``window``.
        independent_first_frame: the first block is one frame alone.
        context: numbers of frames before the first one whose keys precede the others' (a cache).
        first: number of the first frame in the video.
    """

    frames: int
    block_size: int
    tokens_per_frame: int = 1
    mode: MaskMode = "causal"
    window: int = 0
    sink: int = 0
    independent_first_frame: bool = False
    context: tuple[int, ...] = ()
    first: int = 0

    def __post_init__(self) -> None:
        if self.window and self.window < self.sink + self.block_size:
            raise ConfigError(
                f"A window of {self.window} frames has no room for {self.sink} sink frames and a "
                f"block of {self.block_size}. Give a window of at least "
                f"{self.sink + self.block_size}."
            )

    @property
    def blocks(self) -> tuple[Run, ...]:
        """Frames of every block, counted from the first one given."""
        short = self.independent_first_frame and self.first == 0
        return block_spans(self.frames, self.block_size, short_first=short)

    def table(self) -> Tensor:
        """Return bool ``(F', G)`` on the CPU: whether a frame attends to a frame.

        F' is F, or 2 F in teacher mode; G counts the context as well.
        """
        return _table(self)

    def runs(self) -> tuple[tuple[Run, tuple[Run, ...]], ...]:
        """Return, for every run of queries of one block, the runs of keys it attends to."""
        return _runs(self)

    def dense(self, device: torch.device | str = "cpu") -> Tensor:
        """Return bool ``(F' N, G N)``: whether a token attends to a token."""
        size = self.tokens_per_frame
        table = self.table().to(device)
        return table.repeat_interleave(size, 0).repeat_interleave(size, 1)

    def flex(self, device: torch.device) -> Any:
        """Return the mask for FlexAttention; it needs no padding to multiples of 128."""
        return _flex(self, device)


@lru_cache(maxsize=64)
def _table(mask: BlockCausalMask) -> Tensor:
    own = torch.arange(mask.first, mask.first + mask.frames, device="cpu")
    keys = torch.cat((torch.tensor(mask.context, dtype=torch.int64, device="cpu"), own))
    begin, end = torch.empty_like(own), torch.empty_like(own)
    for start, stop in mask.blocks:
        begin[start:stop], end[start:stop] = mask.first + start, mask.first + stop
    seen = keys < end[:, None]
    if mask.window:
        seen &= (keys >= end[:, None] - (mask.window - mask.sink)) | (keys < mask.sink)
    if mask.mode == "causal":
        return seen
    before = seen & (keys < begin[:, None])
    itself = (keys >= begin[:, None]) & (keys < end[:, None])
    clean = torch.cat((seen, torch.zeros_like(itself)), dim=1)
    return torch.cat((clean, torch.cat((before, itself), dim=1)))


@lru_cache(maxsize=64)
def _runs(mask: BlockCausalMask) -> tuple[tuple[Run, tuple[Run, ...]], ...]:
    size, blocks = mask.tokens_per_frame, list(mask.blocks)
    if mask.mode == "teacher":
        blocks += [(start + mask.frames, stop + mask.frames) for start, stop in blocks]
    result = []
    for start, stop in blocks:
        row = F.pad(mask.table()[start].int(), (1, 1))
        edges = (row.diff().nonzero()[:, 0] * size).tolist()
        keys = tuple(zip(edges[::2], edges[1::2], strict=True))
        result.append(((start * size, stop * size), keys))
    return tuple(result)


@lru_cache(maxsize=16)
def _flex(mask: BlockCausalMask, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    table, size = mask.table().to(device), mask.tokens_per_frame

    def attends(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return table[query // size, key // size]

    rows, columns = table.shape
    return create_block_mask(attends, None, None, rows * size, columns * size, device=str(device))


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockCausalMask, *, flex: bool = False
) -> Tensor:
    """Attend as a mask says, softmax of q k / sqrt(d).

    Args:
        q: ``(B, h, F' N, d)``.
        k: ``(B, h, G N, d)``.
        v: likewise.
        mask: who attends to whom.
        flex: one compiled FlexAttention instead of one plain attention a block; CUDA only.
    """
    if flex:
        y: Tensor = _compiled_flex()(q, k, v, block_mask=mask.flex(q.device))
        return y
    parts = []
    for (start, stop), keys in mask.runs():
        own_k, own_v = (join_runs(x, keys) for x in (k, v))
        parts.append(attend(q[:, :, start:stop], own_k, own_v))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def join_runs(x: Tensor, runs: tuple[Run, ...]) -> Tensor:
    """Return the tokens ``(B, h, n, d)`` of some runs of ``x``; one run is a view."""
    pieces = [x[:, :, start:stop] for start, stop in runs]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)
