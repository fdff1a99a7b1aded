"""Softmax attention, and self-attention made of it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.layers.norm import upcast
from genscale.layers.rope import AxialRoPE, rotate

SHORT = 256  # tokens up to which float32 is the faster one there, see attend


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Return softmax(scale q k^T) v.

    torch's backward pass in bfloat16 on CPUs is several times as slow as in float32 where there
    are few tokens (``scripts/bench_attention.py``). There, float32 is used and the result rounded.

    Args:
        q: ``(B, h, N, d)``.
        k: ``(B, h, M, d)``.
        v: likewise.
        mask: broadcasts to ``(B, h, N, M)``: bool, true for what is seen, or numbers that are
            added to the logits.
        scale: of the logits; None is 1 / sqrt(d).
    """
    short = max(q.shape[2], k.shape[2]) <= SHORT
    if short and q.device.type == "cpu" and torch.is_grad_enabled() and _in_bfloat16(q):
        if mask is not None and mask.is_floating_point():
            mask = mask.float()
        with torch.autocast("cpu", enabled=False):
            y = F.scaled_dot_product_attention(
                q.float(), k.float(), v.float(), attn_mask=mask, scale=scale
            )
        return y.bfloat16()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _in_bfloat16(q: Tensor) -> bool:
    """Return whether torch would attend in bfloat16."""
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") == torch.bfloat16
    return q.dtype == torch.bfloat16


class CosineNorm(nn.Module):
    """Query and key norm that makes the logits exp(scale) times a cosine, a scale per head.

    The scale starts at log 10 and counts as log 100 at most.

    Args:
        num_heads: heads h.
        eps: added under the root.
    """

    MAX_SCALE = math.log(100.0)

    def __init__(self, num_heads: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start every head at logits of 10 times the cosine."""
        self.scale.fill_(math.log(10.0))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise queries or keys ``(B, h, N, d)``."""
        scale = upcast(self.scale)
        # the bound passes the gradient on, or a head that reached it could never come back
        scale = scale + (scale.clamp(max=self.MAX_SCALE) - scale).detach()
        # both factors together give exp(scale) / sqrt(d), which undoes |q||k| = d and leaves
        # the 1 / sqrt(d) of the attention
        factor = torch.exp(0.5 * scale - 0.25 * math.log(x.shape[-1]))[:, None, None]
        wide = upcast(x)
        inverse_root = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * (inverse_root * factor)).to(x.dtype)


class SelfAttention(nn.Module):
    """Multi-head self-attention, optionally with axial rotary positions and cosine logits.

    Args:
        hidden_size: width D.
        num_heads: heads h; D must be a multiple of it.
        axial_rope: rotate queries and keys by their place on the grid, after a
            :class:`CosineNorm`.
        qkv_bias: give queries, keys and values a bias.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        axial_rope: bool = False,
        qkv_bias: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=qkv_bias)
        self.out = nn.Linear(hidden_size, hidden_size)
        self.rope = AxialRoPE(hidden_size // num_heads, num_heads) if axial_rope else None
        self.qk_norm = CosineNorm(num_heads) if axial_rope else None

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Attend over all tokens.

        Args:
            x: ``(B, N, D)``.
            positions: ``(N', 2)`` places of the last N' tokens; those before them (a class
                token) are not rotated. Needed with ``axial_rope`` only.
        """
        batch, tokens, _ = x.shape
        # split by channels first: the gradient is then joined in one copy
        q, k, v = (
            part.view(batch, tokens, self.num_heads, -1).transpose(1, 2)  # (B, h, N, d)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        if self.rope is not None and self.qk_norm is not None and positions is not None:
            cosine, sine = self.rope.rotation(positions, tokens - len(positions))
            q = rotate(self.qk_norm(q), cosine, sine)
            k = rotate(self.qk_norm(k), cosine, sine)
        y = attend(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))
