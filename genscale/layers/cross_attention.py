"""Attention from tokens to a context of another width: words, mostly."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from genscale.layers.attention import attend
from genscale.layers.norm import upcast


class CrossAttention(nn.Module):
    """Multi-head attention whose keys and values come from a context.

    Keys and values do not depend on the tokens: where a context stays the same over many calls,
    as a prompt does over the steps of a sampler, :meth:`project` is called once.

    Args:
        hidden_size: width D of the tokens.
        num_heads: heads h; D must be a multiple of it.
        context_size: width of the context.
        bias: give queries, keys and values a bias.
        qk_norm: normalise queries and keys over the whole width D, all heads together, by a
            LayerNorm without weights (arXiv:2412.01819).
        eps: added to the variance of that norm.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        context_size: int,
        *,
        bias: bool = True,
        qk_norm: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qk_norm, self.eps = qk_norm, eps
        self.q = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.kv = nn.Linear(context_size, 2 * hidden_size, bias=bias)
        self.out = nn.Linear(hidden_size, hidden_size)

    def project(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values ``(B, h, M, d)`` of a context ``(B, M, context_size)``."""
        k, v = self.kv(context).chunk(2, dim=-1)
        return self._heads(self._norm(k)), self._heads(v)

    def forward(self, x: Tensor, kv: tuple[Tensor, Tensor], mask: Tensor | None = None) -> Tensor:
        """Attend to the context.

        Args:
            x: ``(B, N, D)``.
            kv: what :meth:`project` returned.
            mask: bool ``(B, M)``, true for places of the context that count; None counts all.

        Returns:
            ``(B, N, D)``; a sample none of whose places counts attends to nothing, and zero is
            what goes into the last layer.
        """
        q = self._heads(self._norm(self.q(x)))
        if mask is None:
            y = attend(q, *kv)
        else:
            # the softmax over no place at all is not a number, in the gradient too: such samples
            # attend to all places, and the result is not taken
            seen = mask.any(dim=-1, keepdim=True)
            y = attend(q, *kv, mask=(mask | ~seen)[:, None, None])
            y = y.masked_fill(~seen[:, :, None, None], 0.0)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, h, N, d)

    def _norm(self, x: Tensor) -> Tensor:
        if not self.qk_norm:
            return x
        return F.layer_norm(upcast(x), x.shape[-1:], eps=self.eps).to(x.dtype)
