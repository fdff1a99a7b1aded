"""DiT and SiT: transformers on patches, conditioned through their norms (arXiv:2212.09748).

W. Peebles and S. Xie, "Scalable Diffusion Models with Transformers", ICCV 2023; official program
facebookresearch/DiT, CC-BY-NC 4.0. N. Ma et al., "SiT: Exploring Flow and Diffusion-based
Generative Models with Scalable Interpolant Transformers", ECCV 2024, arXiv:2401.08740; official
program willisma/SiT, MIT. Both networks are one: they differ in what they are trained on. They
are matched number for number (``scripts/parity/dit.py``, ``sit.py``), their checkpoints load
through ``genscale/io/converters/dit.py``.

Patches become tokens with fixed sine and cosine positions. Time and class are summed to one
vector c, from which every block reads a shift, a scale and a gate for its attention and for its
feed-forward layer (adaLN-Zero). All gates and the head start at zero, so that a fresh network is
the identity in its middle and predicts zero.

Text, which the published networks do not read, may come in twice: as one vector added to c, and
as tokens that patches attend to between a block's two parts (as in arXiv:2310.00426). What these
add to the patches starts at zero, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from genscale.backbones.base import Backbone, BackboneOutput, register_to_config
from genscale.backbones.shapes import (
    check_choice,
    check_heads,
    check_inputs,
    check_positive,
    check_text,
    class_rows,
    mlp_width,
    trained_grid,
)
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.layers.attention import SelfAttention
from genscale.layers.cross_attention import CrossAttention
from genscale.layers.embed import (
    PositionResize,
    TimeEmbedding,
    grid_places,
    sincos_positions,
)
from genscale.layers.linear_attention import NormAwareLinearAttention, axial_rotation
from genscale.layers.mlp import MLP
from genscale.layers.norm import per_sample, upcast

Text = tuple[Tensor, Tensor | None]
"""Tokens ``(B, N, text_size)``, and bool ``(B, N)``, which of them count; None counts all."""

_ZERO = ("modulation.", ".cross_attention.out.")  # start at zero, as the head does


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Return (1 + scale) LN(x) + shift, in float32 inside.

    Args:
        x: ``(B, N, D)``.
        shift: ``(B, D)``, or ``(1, D)`` when all samples share it.
        scale: shaped as ``shift``.
        eps: added to the variance.
    """
    y = F.layer_norm(upcast(x), x.shape[-1:], eps=eps)
    # parity: as written, not as a fused multiply-add, whose one rounding less is enough to move
    # gradients of peaked attention by 3e-5 of their size
    y = (y * (1 + per_sample(upcast(scale), y))).add_(per_sample(upcast(shift), y))
    return y.to(x.dtype)


def _gated_sum(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """Return x + gate y, ``x`` and ``y`` ``(B, N, D)``, ``gate`` ``(B, D)`` or ``(1, D)``."""
    change = per_sample(gate, x) * y
    # into the product, which nobody needs: the same bits, one allocation less; under autocast
    # it has less precision than the stream of tokens
    return change.add_(x) if change.dtype == x.dtype else x + change


class DiTBlock(nn.Module):
    """adaLN-Zero block: x += g_1 attention(N_1(x)); x += g_2 mlp(N_2(x)), all given by c.

    With text, x += cross_attention(LN(x), text) stands between the two.

    Args:
        hidden_size: width D.
        num_heads: attention heads.
        mlp_size: width inside the feed-forward layer.
        attention: ``"softmax"`` or ``"nala"``.
        text_size: width of the text tokens; 0 without text.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_size: int, attention: str, text_size: int = 0
    ) -> None:
        super().__init__()
        self.attention: SelfAttention | NormAwareLinearAttention
        if attention == "nala":
            self.attention = NormAwareLinearAttention(hidden_size, num_heads)
        else:
            self.attention = SelfAttention(hidden_size, num_heads, qkv_bias=True)
        self.mlp = MLP(hidden_size, mlp_size, gelu="tanh")
        self.modulation = nn.Linear(hidden_size, 6 * hidden_size)
        self.cross_attention: CrossAttention | None = None
        if text_size:
            self.cross_attention = CrossAttention(hidden_size, num_heads, text_size)

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        grid: tuple[int, int],
        rotation: tuple[Tensor, Tensor] | None = None,
        text: Text | None = None,
    ) -> Tensor:
        """Advance tokens.

        Args:
            x: ``(B, N, D)``.
            c: SiLU of the condition, ``(B, D)`` or ``(1, D)``.
            grid: height and width of the grid of tokens.
            rotation: of linear attention; see :func:`axial_rotation`.
            text: tokens and mask, where the block reads text.
        """
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(c).chunk(6, dim=-1)
        y = modulated_norm(x, shift_1, scale_1)
        y = self.attention(y) if rotation is None else self.attention(y, grid, rotation)
        x = _gated_sum(x, gate_1, y)
        if self.cross_attention is not None and text is not None:
            y = F.layer_norm(upcast(x), x.shape[-1:], eps=1e-6).to(x.dtype)
            kv = self.cross_attention.project(text[0])
            x = x + self.cross_attention(y, kv, text[1])
        return _gated_sum(x, gate_2, self.mlp(modulated_norm(x, shift_2, scale_2)))


class PooledText(nn.Module):
    """Text as a whole: linear, SiLU, linear.

    Args:
        pooled_text_size: width P.
        hidden_size: width D of the result.
    """

    def __init__(self, pooled_text_size: int, hidden_size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(pooled_text_size, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, pooled: Tensor | None, x: Tensor) -> Tensor:
        """Return ``(B, D)`` for ``(B, P)``, or for zeros in place of None.

        Args:
            pooled: the text.
            x: ``(B, ...)``, whose batch and device count.

        Raises:
            ValueError: ``pooled`` has another shape.
        """
        shape = (len(x), self.linear_1.in_features)
        if pooled is None:
            pooled = torch.zeros(shape, device=x.device)
        elif pooled.shape != shape:
            raise ValueError(
                f"cond.pooled_text must have shape {shape}, but has {tuple(pooled.shape)}. Give "
                "one vector a sample, of width model.pooled_text_size."
            )
        y: Tensor = self.linear_2(F.silu(self.linear_1(pooled.to(self.linear_1.weight.dtype))))
        return y


class DiT(Backbone):
    """Diffusion transformer; also SiT, when trained with a flow objective.

    The network's time is any number that a sinusoid of periods up to 2 pi 10^4 tells apart: the
    released DiT weights want the noise step 0 .. 999, SiT's the time 0 (noise) .. 1 (data) as it
    is (``time_input: one_minus``).

    Inputs of another size than ``input_size``, oblong ones included, are accepted when patches
    divide them; positions are computed for their grid (see ``position_resize``).

    Args:
        input_size: side of the trained input, or its height and width.
        in_channels: channels C of input and prediction.
        num_classes: K classes; the table has one more row, the last, for the null class, which
            labels of -1 and missing labels mean. 0 builds an unconditional model.
        patch_size: side of the patches.
        hidden_size: width D, a multiple of 4 and of ``num_heads``.
        depth: blocks.
        num_heads: attention heads.
        mlp_ratio: width inside the feed-forward layers, in units of D.
        learn_sigma: predict C more channels, the logits of a learned variance, which go to
            ``aux["variance"]``. SiT's released weights have them, though its training does not
            use them.
        attention: ``"softmax"``, or ``"nala"``, linear attention that keeps the query's norm
            (arXiv:2506.21137), of linear cost in the number of tokens.
        text_size: width of the text tokens that patches attend to; 0 builds a model without them.
        num_text_tokens: their number, which counts where none are given: they are zeros then.
        pooled_text_size: width of the text vector added to c; 0 builds a model without it.
        position_resize: what positions do on other grids: ``"interpolate"`` keeps a cell's place
            in the picture, ``"extend"`` its number, as the official program's tables do.
        checkpoint_blocks: recompute the blocks in the backward pass instead of keeping them.

    Raises:
        ConfigError: settings that do not fit together.
    """

    block_classes = ("DiTBlock",)
    cached_modules = ("DiTBlock.attention", "DiTBlock.mlp")
    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        *,
        input_size: int | Sequence[int] = 32,
        in_channels: int = 4,
        num_classes: int = 1000,
        patch_size: int = 2,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        learn_sigma: bool = False,
        attention: Literal["softmax", "nala"] = "softmax",
        text_size: int = 0,
        num_text_tokens: int = 32,
        pooled_text_size: int = 0,
        position_resize: PositionResize = "interpolate",
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        check_positive(self.config, "in_channels", "patch_size", "hidden_size", "depth")
        check_choice("attention", attention, ("softmax", "nala"))
        check_choice("position_resize", position_resize, ("interpolate", "extend"))
        check_text(text_size, num_text_tokens, pooled_text_size)
        mlp_size = _check_widths(self.config)
        self.grid = trained_grid(self, input_size, patch_size)
        self.num_classes, self.patch_size = num_classes, patch_size
        self.num_heads, self.learn_sigma = num_heads, learn_sigma
        self.attention, self.position_resize = attention, position_resize
        self.text_shape = (num_text_tokens, text_size)
        self.gradient_checkpointing = checkpoint_blocks  # diffusers' name for the switch
        self.patch = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        self.time_embed = TimeEmbedding(hidden_size)
        self.class_table = nn.Embedding(num_classes + 1, hidden_size) if num_classes else None
        self.pooled_embed = PooledText(pooled_text_size, hidden_size) if pooled_text_size else None
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, num_heads, mlp_size, attention, text_size) for _ in range(depth)
        )
        self.head_modulation = nn.Linear(hidden_size, 2 * hidden_size)
        outputs = in_channels * (2 if learn_sigma else 1)
        self.head = nn.Linear(hidden_size, patch_size**2 * outputs)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew from torch's generator, as the official program starts them."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d | nn.LayerNorm):
                module.reset_parameters()
        nn.init.xavier_uniform_(self.patch.weight.flatten(1))
        if self.patch.bias is not None:
            nn.init.zeros_(self.patch.bias)
        for weight in (self.time_embed.linear_1.weight, self.time_embed.linear_2.weight):
            nn.init.normal_(weight, std=0.02)
        if self.class_table is not None:
            nn.init.normal_(self.class_table.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if name.startswith("head.") or any(word in name for word in _ZERO):
                nn.init.zeros_(parameter)

    def forward(
        self, x: Tensor, t: Tensor, cond: Conditioning, memory: Any = None
    ) -> BackboneOutput:
        """Predict the objective's target.

        Args:
            x: ``(B, C, H, W)``, H and W multiples of ``patch_size``.
            t: float32 ``(B,)``, or ``(1,)`` when all samples share one time; see the class.
            cond: ``labels`` ``(B,)`` or None are read; by models of text also ``text`` ``(B, N,
                text_size)`` with ``text_mask`` ``(B, N)``, and ``pooled_text`` ``(B,
                pooled_text_size)``. What is None is zero and masked out.
            memory: not used; the model has none.

        Returns:
            ``sample`` ``(B, C, H, W)``, and, with ``learn_sigma``, ``aux["variance"]`` alike.

        Raises:
            ValueError: shapes do not fit together.
        """
        check_inputs(self, x, t, cond.labels)
        x = self.patch(x)
        height, width = x.shape[2:]
        places = [
            grid_places(count, trained, self.position_resize, x.device)
            for count, trained in zip((height, width), self.grid, strict=True)
        ]
        # of the weights' type: under autocast, whose convolutions give half precision, the
        # stream of tokens is then float32
        table = sincos_positions(places[0], places[1], x.shape[1]).to(self.patch.weight.dtype)
        x = (x.permute(0, 2, 3, 1) + table).flatten(1, 2)
        c = self.time_embed(t)
        if self.class_table is not None:
            c = c + self.class_table(class_rows(cond.labels, self.num_classes, len(x), x.device))
        if self.pooled_embed is not None:
            c = c + self.pooled_embed(cond.pooled_text, x)
        c = F.silu(c)  # every layer of the modulation wants it so
        text = self._text(x, cond)
        rotation = None
        if self.attention == "nala":
            rotation = axial_rotation(places[0], places[1], x.shape[-1] // self.num_heads)
        for block in self.blocks:
            x = self._run(block, x, c, (height, width), rotation, text)
        shift, scale = self.head_modulation(c).chunk(2, dim=-1)
        y = self.head(modulated_norm(x, shift, scale))
        y = rearrange(
            y, "b (h w) (i j c) -> b c (h i) (w j)", h=height, i=self.patch_size, j=self.patch_size
        ).contiguous()
        if not self.learn_sigma:
            return BackboneOutput(sample=y)
        sample, variance = y.chunk(2, dim=1)
        return BackboneOutput(sample=sample, aux={"variance": variance})

    def _run(
        self,
        block: nn.Module,
        x: Tensor,
        c: Tensor,
        grid: tuple[int, int],
        rotation: tuple[Tensor, Tensor] | None,
        text: Text | None,
    ) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            y: Tensor = checkpoint(
                block, x, c, grid, rotation, text, use_reentrant=False, preserve_rng_state=False
            )
            return y
        return block(x, c, grid, rotation, text)

    def _text(self, x: Tensor, cond: Conditioning) -> Text | None:
        """Return what the blocks attend to, of the weights' type, or None without text."""
        count, size = self.text_shape
        if not size:
            return None
        if cond.text is None:
            zeros = x.new_zeros(len(x), count, size)
            return zeros, zeros.new_zeros(len(x), count, dtype=torch.bool)
        if cond.text.shape[::2] != (len(x), size):
            raise ValueError(
                f"cond.text must have shape ({len(x)}, N, {size}), but has "
                f"{tuple(cond.text.shape)}. Give tokens of width model.text_size."
            )
        return cond.text.to(self.patch.weight.dtype), cond.text_mask

    def example_condition(self, device: torch.device | str) -> Conditioning:
        """Return a condition of one sample; its text has as many tokens as the model expects."""
        cond = super().example_condition(device)
        if not self.text_shape[1]:
            return cond
        text = torch.zeros(1, *self.text_shape, device=device)
        return replace(cond, text=text, text_mask=text.new_ones(text.shape[:2], dtype=torch.bool))


def _check_widths(config: Any) -> int:
    """Check what must divide the width, and return the width inside the feed-forward layers."""
    hidden_size, num_heads = config["hidden_size"], config["num_heads"]
    check_heads(hidden_size, num_heads)
    if hidden_size % 4:
        raise ConfigError(
            f"model.hidden_size must be a multiple of 4, for sines and cosines of two axes, but is "
            f"{hidden_size}. Give {hidden_size // 4 * 4 + 4}."
        )
    if config["attention"] == "nala" and hidden_size // num_heads % 4:
        raise ConfigError(
            f"model.attention=nala needs heads of a multiple of 4 channels, but model.hidden_size="
            f"{hidden_size} and model.num_heads={num_heads} give {hidden_size // num_heads}. "
            "Change model.num_heads."
        )
    return mlp_width(hidden_size, config["mlp_ratio"])
