"""Parts of the block-causal video transformer: modulation by frame, its attentions, its block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.layers.attention import attend
from genscale.layers.block_mask import BlockCausalMask, join_runs, masked_attention
from genscale.layers.mlp import MLP
from genscale.layers.norm import WeightedRMSNorm, upcast
from genscale.layers.rope import rotate
from genscale.layers.rope3d import Rotation, VideoRoPE
from genscale.layers.semantic_bank import attention_mass, read_chunks
from genscale.layers.video_cache import Cache, write, write_salience

KeysValues = tuple[Tensor, Tensor]


class Attend(Protocol):
    """How the tokens of a call attend to each other and to what came before."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Map queries, keys and values ``(B, h, n, d)``, not rotated, to ``(B, h, n, d)``."""


@dataclass(frozen=True, slots=True)
class Whole:
    """All frames at once, as in training.

    Attributes:
        mask: which frame attends to which.
        rotation: of every token.
        flex: one compiled FlexAttention in place of one plain attention a block.
    """

    mask: BlockCausalMask
    rotation: Rotation
    flex: bool = False

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend as the mask says."""
        q, k = rotate(q, *self.rotation), rotate(k, *self.rotation)
        return masked_attention(q, k, v, self.mask, flex=self.flex)


@dataclass(frozen=True, slots=True)
class Continued:
    """Some frames that follow those of a cache.

    Attributes:
        mask: which new frame attends to which, those of the cache included.
        cache: claimed for the new frames.
        rope: turns what is read from the bank.
        sides: places of the rows ``(h,)`` and columns ``(w,)`` of the tokens of a frame.
        rotation: of every token held and new.
        chosen: ``(B, l)`` chunks that are read from the bank; None without a bank.
        chunk_places: ``(B or 1, l)`` place in time of each of them.
        topic: ``(B, E)`` of the new frames.
    """

    mask: BlockCausalMask
    cache: Cache
    rope: VideoRoPE
    sides: tuple[Tensor, Tensor]
    rotation: Rotation
    chosen: Tensor | None = None
    chunk_places: Tensor | None = None
    topic: Tensor | None = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write keys and values, then attend to all there are that the mask allows."""
        new = q.shape[2]
        k, v = write(self.cache, layer, k, v)
        cosine, sine = self.rotation
        # the buffers' type rules: a cache may be narrower than the network
        q, k = rotate(q.to(k.dtype), cosine[-new:], sine[-new:]), rotate(k, cosine, sine)
        if self.topic is not None:
            size = self.mask.tokens_per_frame
            spans = [(start * size, stop * size) for start, stop in self.mask.blocks]
            mass = attention_mass(q.detach(), k[:, :, -new:].detach(), spans)
            write_salience(self.cache, layer, mass, self.topic)
        if self.chosen is None:
            return masked_attention(q, k, v, self.mask)
        return self._with_chunks(layer, q, k, v, self.chosen)

    def _with_chunks(self, layer: int, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor) -> Tensor:
        old_k, old_v, cells = read_chunks(self.cache["bank"], layer, chosen)
        there, cells = cells.flatten(1) >= 0, cells.clamp(min=0)
        rows, columns = self.sides
        assert self.chunk_places is not None
        cosine, sine = self.rope.rotation(
            self.chunk_places[:, :, None] + cells // (len(rows) * len(columns)),
            rows[cells // len(columns) % len(rows)],
            columns[cells % len(columns)],
        )
        old_k = rotate(old_k, cosine.flatten(1, 2)[:, None], sine.flatten(1, 2)[:, None])
        parts = []
        for (start, stop), keys in self.mask.runs():
            own_k, own_v = join_runs(k, keys), join_runs(v, keys)
            seen = F.pad(there, (0, own_k.shape[2]), value=True)[:, None, None]
            parts.append(
                attend(
                    q[:, :, start:stop],
                    torch.cat((old_k, own_k), dim=2),
                    torch.cat((old_v, own_v), dim=2),
                    mask=seen,
                )
            )
        return torch.cat(parts, dim=2)


class VideoAttention(nn.Module):
    """Self-attention whose queries and keys are normalised over the whole width, then rotated.

    Args:
        hidden_size: width D.
        num_heads: heads h.
        qk_norm: normalise, all heads together.
    """

    def __init__(self, hidden_size: int, num_heads: int, *, qk_norm: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = WeightedRMSNorm(hidden_size) if qk_norm else nn.Identity()
        self.k_norm = WeightedRMSNorm(hidden_size) if qk_norm else nn.Identity()
        self.out = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, layer: int, attend: Attend) -> Tensor:
        """Map tokens ``(B, n, D)``; ``layer`` is this attention's number."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k = self.q_norm(q), self.k_norm(k)
        y = attend.attend(layer, *(heads(part, self.num_heads) for part in (q, k, v.to(q.dtype))))
        result: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return result


class TextAttention(nn.Module):
    """Attention to text, its queries and keys normalised over the whole width.

    Args:
        hidden_size: width D, of the embedded text as well.
        num_heads: heads h.
        qk_norm: normalise, all heads together.
    """

    def __init__(self, hidden_size: int, num_heads: int, *, qk_norm: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(hidden_size, hidden_size)
        self.kv = nn.Linear(hidden_size, 2 * hidden_size)
        self.q_norm = WeightedRMSNorm(hidden_size) if qk_norm else nn.Identity()
        self.k_norm = WeightedRMSNorm(hidden_size) if qk_norm else nn.Identity()
        self.out = nn.Linear(hidden_size, hidden_size)

    def project(self, text: Tensor) -> KeysValues:
        """Return keys and values ``(B, h, M, d)`` of embedded text ``(B, M, D)``."""
        k, v = self.kv(text).chunk(2, dim=-1)
        return heads(self.k_norm(k), self.num_heads), heads(v, self.num_heads)

    def forward(self, x: Tensor, kv: KeysValues, mask: Tensor | None) -> Tensor:
        """Map tokens ``(B, n, D)``; ``mask`` ``(B, M)`` tells the text that counts, None all.

        Where none counts, zero goes into the last layer.
        """
        q = heads(self.q_norm(self.q(x)), self.num_heads)
        k, v = (part.to(q.dtype) for part in kv)
        if mask is None:
            y = attend(q, k, v)
        else:
            seen = mask.any(dim=-1)[:, None, None, None]
            # a softmax over nothing is not a number: such rows see all, and are not taken
            y = attend(q, k, v, mask=mask[:, None, None] | ~seen)
            y = y.masked_fill(~seen, 0.0)
        result: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return result


class CausalVideoBlock(nn.Module):
    """x += g_1 attention(N_1(x)); x += text_attention(LN(x)); x += g_2 mlp(N_2(x)).

    N_i(x) = (1 + scale_i) LN(x) + shift_i; shifts, scales and gates are a learned vector plus
    what the time of the frame gives.

    Args:
        hidden_size: width D.
        num_heads: attention heads.
        mlp_size: width inside the feed-forward layer.
        text: whether there is text to attend to.
        qk_norm: of both attentions.
        text_norm: normalise what goes into the attention to text.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_size: int,
        *,
        text: bool,
        qk_norm: bool = True,
        text_norm: bool = True,
    ) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.empty(6, hidden_size))
        self.attention = VideoAttention(hidden_size, num_heads, qk_norm=qk_norm)
        self.text_norm: nn.Module | None = None
        self.text_attention: TextAttention | None = None
        if text:
            self.text_norm = nn.LayerNorm(hidden_size, eps=1e-6) if text_norm else nn.Identity()
            self.text_attention = TextAttention(hidden_size, num_heads, qk_norm=qk_norm)
        self.mlp = MLP(hidden_size, mlp_size, gelu="tanh")

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        layer: int,
        attend: Attend,
        text: KeysValues | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """Advance tokens.

        Args:
            x: ``(B, F, N, D)``.
            time: ``(B or 1, F or 1, 6, D)``.
            layer: this block's number.
            attend: how tokens attend.
            text: keys and values of the text; None without.
            text_mask: ``(B, M)``, the text that counts.
        """
        vectors = upcast(self.modulation) + upcast(time)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = vectors.unsqueeze(3).unbind(dim=2)
        frames = x.shape[1]
        y = modulated(x, shift_1, scale_1).flatten(1, 2)
        y = self.attention(y, layer, attend).unflatten(1, (frames, -1))
        x = x + (y * gate_1).to(x.dtype)
        if self.text_attention is not None and self.text_norm is not None and text is not None:
            y = self.text_norm(x).to(x.dtype).flatten(1, 2)
            x = x + self.text_attention(y, text, text_mask).unflatten(1, (frames, -1))
        y = self.mlp(modulated(x, shift_2, scale_2))
        return x + (y * gate_2).to(x.dtype)


def project_text(block: nn.Module, text: Tensor) -> KeysValues:
    """Return a block's keys and values of embedded text ``(B, M, D)``."""
    attention = block.get_submodule("text_attention")
    assert isinstance(attention, TextAttention)
    return attention.project(text)


class CausalVideoHead(nn.Module):
    """(1 + scale) LN(x) + shift, then linear, to the pixels of a patch.

    Args:
        hidden_size: width D.
        outputs: numbers of a patch.
    """

    def __init__(self, hidden_size: int, outputs: int) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.empty(2, hidden_size))
        self.linear = nn.Linear(hidden_size, outputs)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Map ``(B, F, N, D)`` with ``time`` ``(B or 1, F or 1, D)`` to ``(B, F, N, outputs)``."""
        vectors = upcast(self.modulation) + upcast(time)[:, :, None]
        shift, scale = vectors.unsqueeze(3).unbind(dim=2)
        y: Tensor = self.linear(modulated(x, shift, scale))
        return y


class FrameTime(nn.Module):
    """Time of every frame -> a vector, and the shifts, scales and gates of all blocks.

    Args:
        hidden_size: width D.
        frequency_size: width of the sinusoid.
    """

    def __init__(self, hidden_size: int, frequency_size: int) -> None:
        super().__init__()
        self.frequency_size = frequency_size
        self.linear_1 = nn.Linear(frequency_size, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)
        self.modulation = nn.Linear(hidden_size, 6 * hidden_size)

    def embed(self, t: Tensor) -> Tensor:
        """Return ``(..., D)`` for times ``(...)``."""
        # a thousand levels need float32 at least, and angles of a thousand more than that
        wide = torch.float32 if t.device.type == "mps" else torch.float64
        half = self.frequency_size // 2
        exponents = torch.arange(half, dtype=wide, device=t.device) / half
        angles = t.to(wide)[..., None] * 10000.0**-exponents
        wave = torch.cat((angles.cos(), angles.sin()), dim=-1).to(self.linear_1.weight.dtype)
        y: Tensor = self.linear_2(F.silu(self.linear_1(wave)))
        return y

    def modulate(self, embedded: Tensor) -> Tensor:
        """Return ``(..., 6, D)`` for ``(..., D)``."""
        y: Tensor = self.modulation(F.silu(embedded))
        return y.unflatten(-1, (6, -1))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return (1 + scale) LN(x) + shift, in float32 inside; ``x`` ``(..., D)``."""
    y = F.layer_norm(upcast(x), x.shape[-1:], eps=1e-6)
    return (y * (1 + scale) + shift).to(x.dtype)


def heads(x: Tensor, count: int) -> Tensor:
    """Return ``(B, h, n, d)`` for ``(B, n, D)``."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def doubled(rotation: Rotation) -> Rotation:
    """Return the rotation of two videos, one after the other, at the same places."""
    cosine, sine = rotation
    return torch.cat((cosine, cosine)), torch.cat((sine, sine))
