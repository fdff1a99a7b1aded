"""Layers of networks in which a few latents read from many tokens and write back (FIT, RIN).

All are pre-norm: a layer normalises its own input and returns what is to be added to it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.layers.attention import attend
from genscale.layers.norm import upcast


def gain_norm(size: int, eps: float = 1e-5) -> nn.LayerNorm:
    """Return a LayerNorm with a learned gain and no bias.

    Args:
        size: width D.
        eps: added to the variance.
    """
    return nn.LayerNorm(size, eps=eps, bias=False)


def modulated(y: Tensor, modulation: nn.Linear | None, c: Tensor | None) -> Tensor:
    """Return (1 + W_1 silu(c)) y + W_2 silu(c), or ``y`` itself without a condition.

    Args:
        y: ``(B, N, D)``.
        modulation: from the condition to 2 D numbers, W_1 above W_2, or None.
        c: ``(B, condition_size)`` or ``(1, condition_size)``.
    """
    if modulation is None or c is None:
        return y
    scale, shift = modulation(F.silu(c))[:, None].chunk(2, dim=-1)
    return y * (scale + 1) + shift


class HeadNorm(nn.Module):
    """Queries or keys of length sqrt(k) times a learned gain a head and channel.

    Args:
        num_heads: heads h.
        head_size: channels k of a head.
    """

    def __init__(self, num_heads: int, head_size: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.empty(num_heads, 1, head_size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(B, h, N, k)``."""
        wide = F.normalize(upcast(x), dim=-1) * x.shape[-1] ** 0.5
        return (wide * upcast(self.gain)).to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention without biases; queries and context have widths and norms of their own.

    Heads need not fill either width: h heads of k channels are h k channels inside.

    Args:
        size: width D of the queries.
        context_size: width of what is attended to; None for attention of tokens among themselves,
            which have one norm.
        num_heads: heads h.
        head_size: channels k of a head; logits are divided by sqrt(k).
        eps: of the norms.
        condition_size: width of a vector c that scales and shifts the normalised queries (not the
            context): (1 + W_1 silu(c)) LN(x) + W_2 silu(c), which starts as LN(x); 0 without one.
        qk_norm: give queries and keys a :class:`HeadNorm`.
    """

    def __init__(
        self,
        size: int,
        context_size: int | None,
        num_heads: int,
        head_size: int,
        *,
        eps: float = 1e-5,
        condition_size: int = 0,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        inner = num_heads * head_size
        self.norm = gain_norm(size, eps)
        self.context_norm = None if context_size is None else gain_norm(context_size, eps)
        self.modulation = nn.Linear(condition_size, 2 * size) if condition_size else None
        self.q = nn.Linear(size, inner, bias=False)
        self.kv = nn.Linear(size if context_size is None else context_size, 2 * inner, bias=False)
        self.out = nn.Linear(inner, size, bias=False)
        self.q_norm = HeadNorm(num_heads, head_size) if qk_norm else None
        self.k_norm = HeadNorm(num_heads, head_size) if qk_norm else None

    def forward(self, x: Tensor, context: Tensor | None = None, c: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: ``(B, N, D)``.
            context: ``(B, M, context_size)``, where the layer has one.
            c: ``(B, condition_size)``, or ``(1, condition_size)`` when all samples share it.

        Returns:
            ``(B, N, D)``, to be added to ``x``.
        """
        y = self.norm(x)
        seen = y if self.context_norm is None else self.context_norm(context)
        y = modulated(y, self.modulation, c)
        k, v = self.kv(seen).chunk(2, dim=-1)
        q, k, v = (self._heads(part) for part in (self.q(y), k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        out: Tensor = self.out(attend(q, k, v).transpose(1, 2).flatten(2))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, h, N, k)


class FeedForward(nn.Module):
    """W_2 dropout(gelu(W_1 LN(x))), four times as wide inside.

    Args:
        size: width D.
        dropout: probability inside.
        eps: of the norm.
    """

    def __init__(self, size: int, *, dropout: float = 0.0, eps: float = 1e-5) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm = gain_norm(size, eps)
        self.up = nn.Linear(size, 4 * size)
        self.down = nn.Linear(4 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        """Return what is to be added to ``x`` ``(..., D)``."""
        y = F.gelu(self.up(self.norm(x)))
        if self.dropout > 0:
            y = F.dropout(y, self.dropout, self.training)
        out: Tensor = self.down(y)
        return out


class ComputeLayer(nn.Module):
    """x += attention(x); x += mlp(x), among all latents of a sample.

    Args:
        size: width D.
        num_heads: attention heads.
        head_size: channels of a head.
        dropout: inside the feed-forward layer.
        eps: of the norms.
        condition_size: see :class:`Attention`.
        qk_norm: see there.
    """

    def __init__(
        self,
        size: int,
        num_heads: int,
        head_size: int,
        *,
        dropout: float = 0.0,
        eps: float = 1e-5,
        condition_size: int = 0,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.attention = Attention(
            size,
            None,
            num_heads,
            head_size,
            eps=eps,
            condition_size=condition_size,
            qk_norm=qk_norm,
        )
        self.mlp = FeedForward(size, dropout=dropout, eps=eps)

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        """Advance ``(B, N, D)``; ``c`` as in :class:`Attention`."""
        x = x + self.attention(x, None, c)
        return x + self.mlp(x)


class LocalLayer(ComputeLayer):
    """The same among the patch tokens of one group, which stand in the place of a sample."""


class LocalConvolution(nn.Module):
    """x += conv(gelu(modulated(conv(LN(x))))) over the patch tokens of one group, frame by frame.

    Ours, not of the papers. All patches share the filters, so that few pictures teach what lies
    beside what. It starts as the identity.

    Args:
        size: width D.
        grid: patches of a group along time, height and width.
        condition_size: width of a vector c that scales and shifts what lies between the two 3 x 3
            convolutions: (1 + W_1 silu(c)) y + W_2 silu(c), which starts as y.
        eps: of the norm.
    """

    def __init__(
        self, size: int, grid: tuple[int, int, int], condition_size: int, *, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.grid = grid
        self.norm = gain_norm(size, eps)
        self.first = nn.Conv2d(size, size, 3, padding=1)
        self.modulation = nn.Linear(condition_size, 2 * size)
        self.second = nn.Conv2d(size, size, 3, padding=1)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Advance ``(B, p, D)``.

        Args:
            x: patches of a group in order of time, height and width.
            c: ``(B, condition_size)``.
        """
        y = modulated(self._convolved(self.first, self.norm(x)), self.modulation, c)
        return x + self._convolved(self.second, F.gelu(y))

    def _convolved(self, layer: nn.Conv2d, tokens: Tensor) -> Tensor:
        pictures = tokens.unflatten(1, self.grid).flatten(0, 1).permute(0, 3, 1, 2)
        return layer(pictures).permute(0, 2, 3, 1).reshape(tokens.shape)


class NumberEmbedding(nn.Module):
    """Numbers -> vector: linear, GELU, linear.

    With ``frequencies``, a single number t becomes [t, sin(2 pi w t), cos(2 pi w t)] first, w
    learned.

    Args:
        numbers: how many numbers a sample has.
        inner_size: width between the layers.
        size: width of the result.
        frequencies: how many w; 0 takes the numbers as they are.
    """

    def __init__(self, numbers: int, inner_size: int, size: int, *, frequencies: int = 0) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(torch.empty(frequencies)) if frequencies else None
        self.linear_1 = nn.Linear(2 * frequencies + 1 if frequencies else numbers, inner_size)
        self.linear_2 = nn.Linear(inner_size, size)

    def forward(self, numbers: Tensor) -> Tensor:
        """Embed ``(B,)`` or ``(B, numbers)`` as ``(B, size)``."""
        # waves and layers in float32 up to here: a time rounded to bfloat16 is another time
        wide = numbers.float() if numbers.dim() == 2 else numbers.float()[:, None]
        if self.frequencies is not None:
            angles = 2 * math.pi * wide * upcast(self.frequencies)
            wide = torch.cat((wide, angles.sin(), angles.cos()), dim=-1)
        y: Tensor = self.linear_2(F.gelu(self.linear_1(wide.to(self.linear_1.weight.dtype))))
        return y


class SelfConditioning(nn.Module):
    """Latents that begin where those of an earlier call ended: z += LN(mlp(LN(z_before))).

    The outer gain starts at zero, so that a fresh network ignores its past (arXiv:2212.11972).

    Args:
        size: width D of the latents.
        eps: of the norms.
    """

    def __init__(self, size: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.mlp = FeedForward(size, eps=eps)
        self.norm = gain_norm(size, eps)

    def forward(self, latents: Tensor, before: Tensor, known: Tensor) -> Tensor:
        """Add the past.

        Args:
            latents: ``(B, L, D)``.
            before: latents of the earlier call, shaped alike.
            known: bool ``(B,)``; samples where it is false have no past.
        """
        change = self.norm(self.mlp(before.to(latents.dtype)))
        # chosen, not multiplied: what stands in place of no past may be anything
        return latents + torch.where(known[:, None, None], change, torch.zeros_like(change))


def start_numbers(network: nn.Module, linear_scale: float) -> None:
    """Start linear layers by torch's law times ``linear_scale``, gains at 1, the past's at 0.

    Embeddings of numbers keep torch's law; what conditions a norm starts at zero.

    Args:
        network: made of the layers above; its own parameters are left as they are.
        linear_scale: factor of weights and biases.
    """
    embeddings = [part for part in network.modules() if isinstance(part, NumberEmbedding)]
    unscaled = {id(layer) for part in embeddings for layer in part.children()}
    for part in network.modules():
        if isinstance(part, nn.Linear | nn.LayerNorm | nn.Conv2d | nn.Conv3d | nn.Embedding):
            part.reset_parameters()
        if isinstance(part, nn.Linear) and id(part) not in unscaled:
            part.weight.mul_(linear_scale)
            if part.bias is not None:
                part.bias.mul_(linear_scale)
        elif isinstance(part, HeadNorm):
            nn.init.ones_(part.gain)
    for part in embeddings:
        if part.frequencies is not None:
            nn.init.normal_(part.frequencies)
    for part in network.modules():
        if isinstance(part, SelfConditioning):
            nn.init.zeros_(part.norm.weight)
        if isinstance(part, LocalConvolution):
            nn.init.zeros_(part.second.weight)
            if part.second.bias is not None:
                nn.init.zeros_(part.second.bias)
        modulation = getattr(part, "modulation", None)
        if isinstance(modulation, nn.Linear):
            nn.init.zeros_(modulation.weight)
            nn.init.zeros_(modulation.bias)
