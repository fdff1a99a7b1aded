"""VAR: a transformer that predicts a picture's tokens scale by scale (arXiv:2404.02905).

K. Tian, Y. Jiang, Z. Yuan, B. Peng and L. Wang, "Visual Autoregressive Modeling: Scalable Image
Generation via Next-Scale Prediction", NeurIPS 2024; official program FoundationVision/VAR, MIT. It
is matched number for number (``scripts/parity/var.py``), its checkpoints load through
``genscale/io/converters/var.py``.

All tokens of a scale are predicted at once. They read the running latent of the scales before,
resized to their own scale, and attend to all tokens of those scales and of their own. The class
scales, shifts and gates every block (AdaLN) and is the first token's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.backbones.base import register_to_config
from genscale.backbones.dit import modulated_norm
from genscale.backbones.scale_wise import (
    ClassTable,
    ScaleAttention,
    ScaleEmbedding,
    ScaleHead,
    ScaleTransformer,
    Spans,
    check_drop_path,
    gated_sum,
    plain_scales,
    spared_by_decay,
    start_weights,
)
from genscale.backbones.shapes import check_heads, check_positive, mlp_width
from genscale.conditioning.base import Conditioning
from genscale.layers.mlp import MLP
from genscale.layers.scale_cache import cache_dtype, claim, empty_cache


class VARBlock(nn.Module):
    """x += g_1 attention(N_1(x)); x += g_2 mlp(N_2(x)), with gates and norms from a condition.

    Args:
        hidden_size: width D.
        num_heads: attention heads.
        mlp_size: width inside the feed-forward layer.
        l2_norm: see :class:`~genscale.backbones.scale_wise.ScaleAttention`.
        shared_adaln: add a learned offset to vectors that all blocks share, instead of reading
            them off the condition through a layer of its own.
        drop_path: probability with which a sample skips a residual in training.
        eps: added to the variance in norms.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_size: int,
        *,
        l2_norm: bool,
        shared_adaln: bool,
        drop_path: float,
        eps: float,
    ) -> None:
        super().__init__()
        self.drop_path, self.eps = drop_path, eps
        self.attention = ScaleAttention(hidden_size, num_heads, l2_norm=l2_norm, prefix=True)
        self.mlp = MLP(hidden_size, mlp_size, gelu="tanh")
        self.modulation = None if shared_adaln else nn.Linear(hidden_size, 6 * hidden_size)
        self.offsets = nn.Parameter(torch.empty(6, hidden_size)) if shared_adaln else None

    def modulate(self, c: Tensor) -> Tensor:
        """Return two gates, two scales and two shifts ``(B, 6, D)``.

        Args:
            c: SiLU of the condition ``(B, D)``, or the shared vectors ``(B, 6, D)``.
        """
        if self.offsets is not None:
            return c + self.offsets
        assert self.modulation is not None
        vectors: Tensor = self.modulation(c).unflatten(-1, (6, -1))
        return vectors

    def forward(
        self, x: Tensor, c: Tensor | None, spans: Spans, slot: dict[str, Any] | None = None
    ) -> Tensor:
        """Advance tokens.

        Args:
            x: ``(B, N, D)``.
            c: what :meth:`modulate` reads; not read with a slot.
            spans: scales of the tokens.
            slot: ``modulation`` ``(B, 6, D)``, and ``keys`` and ``values`` of this layer's cache.
        """
        vectors = self.modulate(c) if c is not None else slot["modulation"]  # type: ignore[index]
        gate_1, gate_2, scale_1, scale_2, shift_1, shift_2 = vectors.unbind(1)
        drop_path = self.drop_path if self.training else 0.0
        y = self.attention(modulated_norm(x, shift_1, scale_1, self.eps), spans, slot)
        x = gated_sum(x, gate_1, y, drop_path=drop_path)
        y = self.mlp(modulated_norm(x, shift_2, scale_2, self.eps))
        return gated_sum(x, gate_2, y, drop_path=drop_path)


class VAR(ScaleTransformer):
    """Visual autoregressive transformer; depth n has width 64 n and n heads in the paper.

    Args:
        scales: sides of the token maps, coarse first, or ``[height, width]`` of each.
        latent_channels: channels Cv of the running latent.
        vocab_size: codes V.
        num_classes: K classes; the table has one more row, the last, for the null class, which
            labels of -1 and missing labels mean. 0 builds an unconditional model.
        hidden_size: width D.
        depth: blocks.
        num_heads: attention heads.
        mlp_ratio: width inside the feed-forward layers, in units of D.
        l2_norm: attention by cosine, with a learned factor a head; all released weights have it.
        shared_adaln: one layer for the gates, scales and shifts of all blocks, as d36 has it.
        init_gate: factor of the gates' initial weights; published: 1e-3 (d16, d20), 1e-4 (d24),
            1e-5 (d30), 5e-6 (d36).
        drop_path: probability with which a sample skips a residual of the last block in training;
            it grows linearly from 0 at the first. Published: 0.1 depth / 24.
        eps: added to the variance in norms.
        checkpoint_blocks: recompute the blocks in the backward pass instead of keeping them.

    Raises:
        ConfigError: settings that do not fit together.
    """

    block_classes = ("VARBlock",)
    needs_prefix = True

    @register_to_config
    def __init__(
        self,
        *,
        scales: Sequence[int | Sequence[int]] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        latent_channels: int = 32,
        vocab_size: int = 4096,
        num_classes: int = 1000,
        hidden_size: int = 1024,
        depth: int = 16,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        l2_norm: bool = True,
        shared_adaln: bool = False,
        init_gate: float = 1e-5,
        drop_path: float = 0.0,
        eps: float = 1e-6,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        self.register_to_config(scales=plain_scales(scales))
        check_positive(self.config, "latent_channels", "vocab_size", "hidden_size", "depth")
        check_heads(hidden_size, num_heads)
        check_drop_path(drop_path)
        mlp_size = mlp_width(hidden_size, mlp_ratio)
        self.hidden_size, self.num_heads, self.init_gate = hidden_size, num_heads, init_gate
        self.drop_path = drop_path
        self.gradient_checkpointing = checkpoint_blocks  # diffusers' name for the switch
        self.embed = ScaleEmbedding(self.scales, latent_channels, hidden_size)
        self.class_table = ClassTable(num_classes, hidden_size)
        self.shared_modulation = nn.Linear(hidden_size, 6 * hidden_size) if shared_adaln else None
        self.blocks = nn.ModuleList(
            VARBlock(
                hidden_size,
                num_heads,
                mlp_size,
                l2_norm=l2_norm,
                shared_adaln=shared_adaln,
                drop_path=drop_path * i / max(depth - 1, 1),
                eps=eps,
            )
            for i in range(depth)
        )
        self.head = ScaleHead(hidden_size, vocab_size, eps=eps)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew from torch's generator, as the official program starts them."""
        start_weights(self, self.hidden_size)
        for block in self.blocks:
            assert isinstance(block, VARBlock)
            for layer in (block.attention.out, block.mlp.down):
                layer.weight.div_((2 * len(self.blocks)) ** 0.5)
            if block.offsets is not None:
                vectors = block.offsets.normal_(std=self.hidden_size**-0.5)
            else:
                assert block.modulation is not None
                vectors = block.modulation.weight.unflatten(0, (6, -1))
            vectors[:2].mul_(self.init_gate)
            vectors[2:].mul_(0.5)

    def no_weight_decay(self) -> set[str]:
        """Name biases, vectors, positions, levels and offsets; the class table is decayed."""
        return spared_by_decay(self)

    def begin(self, cond: Conditioning, batch: int, device: torch.device) -> dict[str, Any]:
        """Return what is computed once a sample, and empty buffers of keys and values."""
        start = self.start_vectors(cond, batch, device)
        c = self._shared(start)
        blocks = [block for block in self.blocks if isinstance(block, VARBlock)]
        return {
            "start": start,
            "head": self.head.modulate(start),
            "modulation": [block.modulate(c) for block in blocks],
            "cache": empty_cache(
                len(self.blocks),
                batch,
                self.num_heads,
                self.embed.spans[-1][1],
                self.hidden_size // self.num_heads,
                device=device,
                dtype=cache_dtype(device, self.embed.word.weight),
            ),
        }

    def start_vectors(self, cond: Conditioning, batch: int, device: torch.device) -> Tensor:
        """Return the class vectors ``(B, D)``."""
        return self.class_table.look_up(cond.labels, batch, device)

    def teach(self, x: Tensor, start: Tensor, cond: Conditioning, scales: range) -> Tensor:
        """Run the blocks on all scales up to one, each seeing those before it."""
        c, spans = self._shared(start), [self.embed.spans[k] for k in scales]
        for block in self.blocks:
            x = self.run_block(block, x, c, spans, random=self.training and self.drop_path > 0)
        return x

    def advance(self, x: Tensor, scale: int, memory: Any) -> tuple[Tensor, Any]:
        """Run the blocks on one scale; its keys and values go into the cache."""
        span = self.embed.spans[scale]
        cache = claim(memory["cache"], *span)
        keys, values = cache["keys"], cache["values"]
        for i, block in enumerate(self.blocks):
            # a layer's part, so that a compiled block does not see which layer it is
            slot = {"modulation": memory["modulation"][i], "keys": [keys[i]], "values": [values[i]]}
            x = block(x, None, [span], slot)
            keys[i], values[i] = slot["keys"][0], slot["values"][0]
        return x, {**memory, "cache": cache}

    def _shared(self, start: Tensor) -> Tensor:
        """Return what every block reads: SiLU of the class vectors, or the shared vectors."""
        c = F.silu(start.to(self.embed.word.weight.dtype))
        if self.shared_modulation is None:
            return c
        vectors: Tensor = self.shared_modulation(c).unflatten(-1, (6, -1))
        return vectors
