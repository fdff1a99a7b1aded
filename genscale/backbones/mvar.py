"""M-VAR: attention inside a scale, Mamba-2 across scales (arXiv:2411.10433).

S. Ren, Y. Yu, N. Ruiz, F. Wang, A. Yuille and C. Xie, "M-VAR: Decoupled Scale-wise Autoregressive
Modeling for High-Quality Image Generation", 2024; official program OliverRensu/MVAR, no licence
given. It is matched number for number (``scripts/parity/mvar.py``), its checkpoints load through
``genscale/io/converters/mvar.py``.

As VAR, but every block mixes tokens twice: attention sees the tokens of one scale, all of them; a
causal scan then runs over all scales, coarse first, row by row. What a scale knows of those before
it is the scan's state: memory does not grow with the scales, where VAR keeps keys and values of all
tokens. The official program runs the scan again over all earlier tokens at every scale; carrying
its state gives the same numbers.
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
from genscale.errors import ConfigError
from genscale.layers.mamba2 import Mamba2, Mamba2State
from genscale.layers.mlp import MLP
from genscale.layers.norm import upcast
from genscale.layers.scale_cache import cache_dtype


class MVARBlock(nn.Module):
    """x += g_1 attention(N_1(x)); x += g_2 scan(N_2(x)); x += g_3 mlp(N_3(x)).

    Args:
        hidden_size: width D.
        num_heads: attention heads.
        mlp_size: width inside the feed-forward layer.
        state_size: numbers of state a channel of the scan.
        scan_head_size: channels of a head of the scan.
        l2_norm: see :class:`~genscale.backbones.scale_wise.ScaleAttention`.
        drop_path: probability with which a sample skips a residual in training.
        eps: added to the variance in norms.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_size: int,
        *,
        state_size: int,
        scan_head_size: int,
        l2_norm: bool,
        drop_path: float,
        eps: float,
    ) -> None:
        super().__init__()
        self.drop_path, self.eps = drop_path, eps
        self.attention = ScaleAttention(hidden_size, num_heads, l2_norm=l2_norm, prefix=False)
        self.scan = Mamba2(hidden_size, state_size=state_size, head_size=scan_head_size)
        self.mlp = MLP(hidden_size, mlp_size, gelu="tanh")
        self.modulation = nn.Linear(hidden_size, 9 * hidden_size)

    def modulate(self, c: Tensor) -> Tensor:
        """Return three gates, three scales and three shifts ``(B, 9, D)`` of SiLU(condition)."""
        vectors: Tensor = self.modulation(c).unflatten(-1, (9, -1))
        return vectors

    def forward(
        self, x: Tensor, c: Tensor | None, spans: Spans, slot: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Advance tokens.

        Args:
            x: ``(B, N, D)``.
            c: what :meth:`modulate` reads; not read with a slot.
            spans: scales of the tokens.
            slot: ``modulation`` ``(B, 9, D)``, and ``tail`` and ``scan``, the scan's state after
                the scale before, which the state after this one replaces.
        """
        vectors = self.modulate(c) if c is not None else slot["modulation"]  # type: ignore[index]
        gates, scales, shifts = (part.unbind(1) for part in vectors.chunk(3, dim=1))
        drop_path = self.drop_path if self.training else 0.0
        y = self.attention(modulated_norm(x, shifts[0], scales[0], self.eps), spans)
        x = gated_sum(x, gates[0], y, drop_path=drop_path)
        state = None if slot is None else Mamba2State(slot["tail"], slot["scan"])
        y, state = self.scan(modulated_norm(x, shifts[1], scales[1], self.eps), state)
        if slot is not None:
            # a copy: the tail is a view of all inputs of the convolution, which may go
            slot["tail"], slot["scan"] = state.tail.clone(), state.scan
        x = gated_sum(x, gates[1], y, drop_path=drop_path)
        y = self.mlp(modulated_norm(x, shifts[2], scales[2], self.eps))
        return gated_sum(x, gates[2], y, drop_path=drop_path)


class MVAR(ScaleTransformer):
    """VAR with attention inside a scale and a scan across scales.

    Depth n has width 64 n, n attention heads and 2 n heads of the scan in the paper.

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
        state_size: numbers of state a channel of the scan.
        scan_head_size: channels of a head of the scan; 2 D must be a multiple of it.
        l2_norm: attention by cosine, with a learned factor a head. The released d16 and d20 are
            without it.
        init_gate: factor of the gates' initial weights; published: 1e-3 (d12 to d20), 1e-4 (d24),
            1e-5 (d30).
        fix_gate_init: let ``init_gate`` scale all three gates. The official program leaves out the
            one of the feed-forward layer, which starts at 0.5 times its draw.
        drop_path: probability with which a sample skips a residual of the last block in training;
            it grows linearly from 0 at the first. Published: 0.1 depth / 24.
        eps: added to the variance in norms.
        checkpoint_blocks: recompute the blocks in the backward pass instead of keeping them.

    Raises:
        ConfigError: settings that do not fit together.
    """

    block_classes = ("MVARBlock",)
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
        state_size: int = 64,
        scan_head_size: int = 64,
        l2_norm: bool = True,
        init_gate: float = 1e-5,
        fix_gate_init: bool = True,
        drop_path: float = 0.0,
        eps: float = 1e-6,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        self.register_to_config(scales=plain_scales(scales))
        check_positive(
            self.config,
            *("latent_channels", "vocab_size", "hidden_size", "depth"),
            *("state_size", "scan_head_size"),
        )
        check_heads(hidden_size, num_heads)
        check_drop_path(drop_path)
        if 2 * hidden_size % scan_head_size:
            raise ConfigError(
                f"model.scan_head_size={scan_head_size} must divide twice model.hidden_size, the "
                f"{2 * hidden_size} channels of the scan. Change one of them."
            )
        mlp_size = mlp_width(hidden_size, mlp_ratio)
        self.hidden_size, self.drop_path = hidden_size, drop_path
        self.init_gate, self.fix_gate_init = init_gate, fix_gate_init
        self.gradient_checkpointing = checkpoint_blocks  # diffusers' name for the switch
        self.embed = ScaleEmbedding(self.scales, latent_channels, hidden_size)
        self.class_table = ClassTable(num_classes, hidden_size)
        self.blocks = nn.ModuleList(
            MVARBlock(
                hidden_size,
                num_heads,
                mlp_size,
                state_size=state_size,
                scan_head_size=scan_head_size,
                l2_norm=l2_norm,
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
        for block in self._mvar_blocks():
            nn.init.trunc_normal_(block.scan.conv.weight, std=0.02, a=-2, b=2)
            if block.scan.conv.bias is not None:
                nn.init.zeros_(block.scan.conv.bias)
            block.scan.reset_parameters()  # the scan's own; its layers have been drawn
            for layer in (block.attention.out, block.mlp.down):
                layer.weight.div_((2 * len(self.blocks)) ** 0.5)
            vectors = block.modulation.weight.unflatten(0, (9, -1))
            # parity: the official program scales the first two gates of three
            gates = 3 if self.fix_gate_init else 2
            vectors[:gates].mul_(self.init_gate)
            vectors[gates:].mul_(0.5)

    def no_weight_decay(self) -> set[str]:
        """Name biases, vectors, positions and levels; the class table is decayed."""
        return spared_by_decay(self)

    def begin(self, cond: Conditioning, batch: int, device: torch.device) -> dict[str, Any]:
        """Return what is computed once a sample, and states of scans that have seen nothing."""
        start = self.start_vectors(cond, batch, device)
        c = F.silu(start.to(self.embed.word.weight.dtype))
        blocks = self._mvar_blocks()
        state_type = upcast(self.embed.word.weight).dtype
        tail_type = cache_dtype(device, self.embed.word.weight)
        tails, scans = [], []
        for scan in (block.scan for block in blocks):
            heads, size = scan.num_heads, scan.inner_size // scan.num_heads
            tail = (batch, scan.kernel_size - 1, scan.mixed_size)
            tails.append(torch.zeros(tail, device=device, dtype=tail_type))
            state = (batch, heads, size, scan.state_size)
            scans.append(torch.zeros(state, device=device, dtype=state_type))
        return {
            "start": start,
            "head": self.head.modulate(start),
            "modulation": [block.modulate(c) for block in blocks],
            "tails": tails,
            "scans": scans,
            "scales_done": torch.zeros(batch, dtype=torch.int64, device="cpu"),
        }

    def start_vectors(self, cond: Conditioning, batch: int, device: torch.device) -> Tensor:
        """Return the class vectors ``(B, D)``."""
        return self.class_table.look_up(cond.labels, batch, device)

    def teach(self, x: Tensor, start: Tensor, cond: Conditioning, scales: range) -> Tensor:
        """Run the blocks on all scales up to one; scans run over all of them at once."""
        c = F.silu(start.to(self.embed.word.weight.dtype))
        spans = [self.embed.spans[k] for k in scales]
        for block in self.blocks:
            x = self.run_block(block, x, c, spans, random=self.training and self.drop_path > 0)
        return x

    def advance(self, x: Tensor, scale: int, memory: Any) -> tuple[Tensor, Any]:
        """Run the blocks on one scale; new memory holds the states after it.

        Raises:
            ValueError: the states are not those after the scale before.
        """
        done: Tensor = memory["scales_done"]
        if bool((done != scale).any()):
            raise ValueError(
                f"Scale {scale} needs the state after {scale} scales, but the memory has seen "
                f"{done.unique().tolist()}. Go through the scales in order, with the memory of the "
                "one before."
            )
        tails, scans = [], []
        for i, block in enumerate(self.blocks):
            slot = {
                "modulation": memory["modulation"][i],
                "tail": memory["tails"][i],
                "scan": memory["scans"][i],
            }
            x = block(x, None, [self.embed.spans[scale]], slot)
            tails.append(slot["tail"])
            scans.append(slot["scan"])
        return x, {**memory, "tails": tails, "scans": scans, "scales_done": done + 1}

    def _mvar_blocks(self) -> list[MVARBlock]:
        return [block for block in self.blocks if isinstance(block, MVARBlock)]
