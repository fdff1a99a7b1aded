"""A block of Switti: self-attention by scale, attention to the text, feed-forward layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.backbones.scale_wise import LogitFactors, Spans, attend_by_scale, gated_sum
from genscale.layers.cross_attention import CrossAttention
from genscale.layers.mlp import MLP, SwiGLU
from genscale.layers.norm import WeightedRMSNorm, per_sample, upcast
from genscale.layers.rope import rotate
from genscale.layers.scale_cache import write

Rotation = tuple[Tensor, Tensor]


class Condition(NamedTuple):
    """What the blocks read of a sample.

    Shapes:
        vector: ``(B, D)``.
        crop: ``(B, D)``, or None without crop conditioning.
        text: ``(B, M, text_size)``.
        mask: ``(B, M)`` bool, true for tokens that count; None counts all.
    """

    vector: Tensor
    crop: Tensor | None
    text: Tensor
    mask: Tensor | None


class NormedScaleAttention(nn.Module):
    """Self-attention by scale, queries and keys normalised, then turned by their places.

    The norm is a LayerNorm without weights over the whole width, all heads together.

    Args:
        hidden_size: width D.
        num_heads: heads h; D must be a multiple of it.
        prefix: a scale sees all scales up to itself; else itself alone.
        eps: added to the variance.
    """

    logit_factors: LogitFactors | None = None  # set for a while by resolution scaling

    def __init__(
        self, hidden_size: int, num_heads: int, *, prefix: bool, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.num_heads, self.prefix, self.eps = num_heads, prefix, eps
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)

    def forward(
        self,
        x: Tensor,
        spans: Spans,
        rotation: Rotation | None = None,
        slot: dict[str, Any] | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: ``(B, N, D)`` tokens of ``spans``.
            spans: of consecutive scales; with ``prefix``, from the first one on or with a slot.
            rotation: cosines and sines ``(N, pairs)`` of the places; None turns nothing.
            slot: this layer's part of a cache (``keys`` and ``values``, lists of one), into which
                new keys and values are written.
        """
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        v = self._heads(v)
        # turned in float32, then back to the type of v
        q, k = (self._turned(part, rotation).to(v.dtype) for part in (q, k))
        if slot is not None:
            k, v = write(slot, 0, spans[0][0], k, v)
        y = attend_by_scale(q, k, v, spans, prefix=self.prefix, factors=self.logit_factors)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out

    def _turned(self, x: Tensor, rotation: Rotation | None) -> Tensor:
        x = self._heads(F.layer_norm(upcast(x), x.shape[-1:], eps=self.eps))
        return x if rotation is None else rotate(x, *rotation)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, h, N, d)


class SwittiBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward layer, each between two norms.

    x += g_1 N(attention((1 + s_1) N(x) + b_1)); x += N(cross(N(x), N(text)));
    x += g_2 N(mlp((1 + s_2) N(x) + b_2)), with gates g, scales s and shifts b linear in SiLU of
    the block's condition: the sample's, plus its crop's times a vector that the block learns.

    Args:
        hidden_size: width D.
        num_heads: attention heads.
        text_size: width of the text.
        mlp_size: width inside the feed-forward layer.
        mlp: ``"swiglu"`` or ``"gelu"``.
        prefix: a scale sees all scales up to itself; else itself alone.
        crop_condition: whether a crop is part of the condition.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        text_size: int,
        mlp_size: int,
        *,
        mlp: str,
        prefix: bool,
        crop_condition: bool,
    ) -> None:
        super().__init__()
        self.attention_norm_in = WeightedRMSNorm(hidden_size)
        self.attention = NormedScaleAttention(hidden_size, num_heads, prefix=prefix)
        self.attention_norm_out = WeightedRMSNorm(hidden_size)
        self.cross_norm_in = WeightedRMSNorm(hidden_size)
        self.text_norm = WeightedRMSNorm(text_size)
        self.cross_attention = CrossAttention(hidden_size, num_heads, text_size, qk_norm=True)
        self.cross_norm_out = WeightedRMSNorm(hidden_size)
        self.mlp_norm_in = WeightedRMSNorm(hidden_size)
        self.mlp: SwiGLU | MLP
        if mlp == "swiglu":
            self.mlp = SwiGLU(hidden_size, mlp_size)
        else:
            self.mlp = MLP(hidden_size, mlp_size, gelu="tanh")
        self.mlp_norm_out = WeightedRMSNorm(hidden_size)
        self.modulation = nn.Linear(hidden_size, 6 * hidden_size)
        self.crop_scale = nn.Parameter(torch.empty(hidden_size)) if crop_condition else None

    def prepare(self, condition: Condition) -> dict[str, Any]:
        """Return all that depends on the sample alone, not on its tokens.

        Returns:
            ``modulation`` ``(B, 6, D)``: two gates, two scales, two shifts; ``text``: keys and
            values ``(B, h, M, d)``; ``mask`` ``(B, M)``, or None where all of the text counts.
        """
        c = condition.vector
        if self.crop_scale is not None and condition.crop is not None:
            c = c + self.crop_scale * condition.crop
        modulation = self.modulation(F.silu(c)).unflatten(-1, (6, -1))
        text = self.cross_attention.project(self.text_norm(condition.text))
        return {"modulation": modulation, "text": text, "mask": condition.mask}

    def forward(
        self,
        x: Tensor,
        condition: Condition | None,
        spans: Spans,
        rotation: Rotation | None,
        slot: dict[str, Any] | None = None,
    ) -> Tensor:
        """Advance tokens ``(B, N, D)``.

        Args:
            x: tokens of ``spans``.
            condition: what :meth:`prepare` reads; None with a slot.
            spans: of consecutive scales.
            rotation: see :class:`NormedScaleAttention`.
            slot: what :meth:`prepare` returned, and ``keys`` and ``values`` of this layer's cache
                where scales see those before.
        """
        if condition is not None:
            prepared, cache = self.prepare(condition), None
        else:
            assert slot is not None
            prepared, cache = slot, slot if "keys" in slot else None
        gate_1, gate_2, scale_1, scale_2, shift_1, shift_2 = prepared["modulation"].unbind(1)
        y = _modulated(self.attention_norm_in(x), scale_1, shift_1)
        y = self.attention_norm_out(self.attention(y, spans, rotation, cache))
        x = gated_sum(x, gate_1, y)
        y = self.cross_attention(self.cross_norm_in(x), prepared["text"], prepared["mask"])
        x = x + self.cross_norm_out(y).to(x.dtype)
        y = _modulated(self.mlp_norm_in(x), scale_2, shift_2)
        return gated_sum(x, gate_2, self.mlp_norm_out(self.mlp(y)))


def _modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return x * (1 + per_sample(scale, x)) + per_sample(shift, x)
