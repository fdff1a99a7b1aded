"""U-ViT: a transformer in which all inputs are tokens, with long skips (arXiv:2209.12152).

F. Bao et al., "All are Worth Words: A ViT Backbone for Diffusion Models", CVPR 2023; official
program baofff/U-ViT, MIT. It is matched number for number (``scripts/parity/uvit.py``), its
checkpoints load through ``genscale/io/converters/uvit.py``.

Class, time, text and patches are tokens of one sequence; there is no modulation. Blocks of the
first half hand their outputs to those of the second half, last in first out, which join them to
their own input by a linear layer. The skips may be scaled before (ScaleLong, arXiv:2310.13545).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from genscale.backbones.base import Backbone, BackboneOutput, register_to_config
from genscale.backbones.shapes import (
    check_choice,
    check_heads,
    check_inputs,
    check_positive,
    class_rows,
    mlp_width,
    trained_grid,
)
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.layers.attention import SelfAttention
from genscale.layers.embed import LearnedPositions, TimeEmbedding, sinusoid
from genscale.layers.mlp import MLP
from genscale.layers.skip_scale import SkipScale, SkipScaling


class UViTBlock(nn.Module):
    """[x = join([x, skip])]; x += attention(LN(x)); x += mlp(LN(x)), on tokens ``(B, N, D)``.

    Args:
        hidden_size: width D.
        num_heads: attention heads.
        mlp_size: width inside the feed-forward layer.
        qkv_bias: give queries, keys and values a bias.
        joined: take a skip.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_size: int, *, qkv_bias: bool, joined: bool
    ) -> None:
        super().__init__()
        self.join = nn.Linear(2 * hidden_size, hidden_size) if joined else None
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.attention = SelfAttention(hidden_size, num_heads, qkv_bias=qkv_bias)
        self.mlp_norm = nn.LayerNorm(hidden_size)
        self.mlp = MLP(hidden_size, mlp_size)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Advance tokens; ``skip`` is shaped as ``x`` where the block takes one."""
        if self.join is not None and skip is not None:
            x = self.join(torch.cat((x, skip), dim=-1))
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class UViT(Backbone):
    """All-token transformer with long skips.

    The network's time is any number that a sinusoid of periods up to 2 pi 10^4 tells apart: the
    noise step 1 .. 1000 (``time_input: index``) in the released models of latents at H size, 999
    times the continuous time in the others.

    The tokens are, in this order, the class (where there are classes), the time, the text (where
    there is text), the patches row by row. Inputs of another size than ``input_size``, oblong
    ones included, are accepted when patches divide them; the patches' position table is then
    stretched over the new grid (see ``position_resize``).

    Args:
        input_size: side of the trained input, or its height and width.
        in_channels: channels C of input and prediction.
        num_classes: K classes; the table has one more row, the last, for the null class, which
            labels of -1 and missing labels mean. 0 builds a model without classes.
        patch_size: side of the patches.
        hidden_size: width D.
        depth: blocks, odd: pairs joined by skips around a middle one.
        num_heads: attention heads.
        mlp_ratio: width inside the feed-forward layers, in units of D.
        qkv_bias: give queries, keys and values a bias.
        time_mlp: pass the time's sinusoid through two layers.
        head_conv: smooth the prediction by a 3 x 3 convolution.
        long_skips: join the two halves.
        text_size: width of the text tokens; 0 builds a model without text.
        num_text_tokens: their number.
        skip_scale: factors on the skips; see :class:`~genscale.layers.skip_scale.SkipScale`.
        skip_kappa: base of ``skip_scale: geometric``.
        position_resize: ``"interpolate"`` tables to other grids, or ``"crop"`` them.
        checkpoint_blocks: recompute the blocks in the backward pass instead of keeping them.

    Raises:
        ConfigError: settings that do not fit together.
    """

    block_classes = ("UViTBlock",)
    cached_modules = ("UViTBlock.attention", "UViTBlock.mlp")
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
        depth: int = 29,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        time_mlp: bool = False,
        head_conv: bool = True,
        long_skips: bool = True,
        text_size: int = 0,
        num_text_tokens: int = 77,
        skip_scale: SkipScaling = "none",
        skip_kappa: float = 0.5,
        position_resize: Literal["interpolate", "crop"] = "interpolate",
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        check_positive(self.config, "in_channels", "patch_size", "hidden_size", "depth")
        check_choice("position_resize", position_resize, ("interpolate", "crop"))
        check_heads(hidden_size, num_heads)
        mlp_size = mlp_width(hidden_size, mlp_ratio)
        _check_depth_and_text(depth, text_size, num_text_tokens)
        height, width = trained_grid(self, input_size, patch_size)
        self.num_classes, self.patch_size = num_classes, patch_size
        self.text_size, self.num_text_tokens = text_size, num_text_tokens if text_size else 0
        self.gradient_checkpointing = checkpoint_blocks  # diffusers' name for the switch
        num_skips = depth // 2 if long_skips else 0
        num_extras = 1 + (1 if num_classes else 0) + self.num_text_tokens
        self.patch = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        self.class_table = nn.Embedding(num_classes + 1, hidden_size) if num_classes else None
        self.time_embed: TimeEmbedding | None = None
        if time_mlp:
            self.time_embed = TimeEmbedding(
                hidden_size, frequency_size=hidden_size, inner_size=4 * hidden_size
            )
        self.text_embed = nn.Linear(text_size, hidden_size) if text_size else None
        self.extra_positions = nn.Parameter(torch.empty(num_extras, hidden_size))
        self.position = LearnedPositions(height, width, hidden_size, position_resize)
        self.blocks = nn.ModuleList(
            UViTBlock(
                hidden_size, num_heads, mlp_size, qkv_bias=qkv_bias, joined=i >= depth - num_skips
            )
            for i in range(depth)
        )
        self.skip_factors = SkipScale(
            skip_scale,
            num_skips,
            hidden_size=hidden_size,
            num_tokens=num_extras + height * width,
            kappa=skip_kappa,
        )
        self.head_norm = nn.LayerNorm(hidden_size)
        self.head = nn.Linear(hidden_size, patch_size**2 * in_channels)
        self.smooth = nn.Conv2d(in_channels, in_channels, 3, padding=1) if head_conv else None
        self.num_skips = num_skips
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew from torch's generator, as the official program starts them."""
        for module in reversed(list(self.modules())[1:]):  # parts before the whole
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        nn.init.trunc_normal_(self.extra_positions, std=0.02)

    def forward(
        self, x: Tensor, t: Tensor, cond: Conditioning, memory: Any = None
    ) -> BackboneOutput:
        """Predict the objective's target.

        Args:
            x: ``(B, C, H, W)``, H and W multiples of ``patch_size``.
            t: float32 ``(B,)``, or ``(1,)`` when all samples share one time; see the class.
            cond: ``labels`` ``(B,)`` or None, and ``text`` ``(B, num_text_tokens, text_size)`` or
                None (zeros) are read. All text tokens take part, whatever their mask says.
            memory: not used; the model has none.

        Returns:
            ``sample`` ``(B, C, H, W)``.

        Raises:
            ValueError: shapes do not fit together.
        """
        check_inputs(self, x, t, cond.labels)
        x = self.patch(x)
        height, width = x.shape[2:]
        x = x.permute(0, 2, 3, 1) + self.position(height, width)
        extras = self._extra_tokens(x, t, cond)
        x = torch.cat((extras.to(x.dtype), x.flatten(1, 2)), dim=1)

        stack: list[Tensor] = []
        joined_from = len(self.blocks) - self.num_skips
        for i, block in enumerate(self.blocks):
            skip = None
            if i >= joined_from:
                skip = self.skip_factors(stack.pop(), i - joined_from)
            x = self._run(block, x, skip)
            if i < self.num_skips:
                stack.append(x)

        y = self.head(self.head_norm(x[:, -height * width :]))
        y = rearrange(
            y, "b (h w) (i j c) -> b c (h i) (w j)", h=height, i=self.patch_size, j=self.patch_size
        ).contiguous()
        return BackboneOutput(sample=y if self.smooth is None else self.smooth(y))

    def _extra_tokens(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Return the positioned tokens before the patches, ``(B, E, D)``; x is ``(B, ..., D)``."""
        batch, size = len(x), x.shape[-1]
        tokens: list[Tensor] = []
        if self.class_table is not None:
            rows = class_rows(cond.labels, self.num_classes, batch, x.device)
            tokens.append(self.class_table(rows)[:, None])
        wave = sinusoid(t, size) if self.time_embed is None else self.time_embed(t)
        tokens.append(wave.to(x.dtype)[:, None].expand(batch, 1, size))
        if self.text_embed is not None:
            shape = (batch, self.num_text_tokens, self.text_size)
            text = cond.text
            if text is None:
                text = torch.zeros(shape, device=x.device)
            elif text.shape != shape:
                raise ValueError(
                    f"cond.text must have shape {shape}, but has {tuple(text.shape)}. Give as many "
                    "tokens as model.num_text_tokens, of width model.text_size."
                )
            tokens.append(self.text_embed(text.to(self.text_embed.weight.dtype)))
        return torch.cat(tokens, dim=1) + self.extra_positions

    def _run(self, block: nn.Module, x: Tensor, skip: Tensor | None) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            y: Tensor = checkpoint(block, x, skip, use_reentrant=False, preserve_rng_state=False)
            return y
        return block(x, skip)


def _check_depth_and_text(depth: int, text_size: int, num_text_tokens: int) -> None:
    if depth % 2 == 0:
        raise ConfigError(
            f"model.depth must be odd, but is {depth}: pairs of blocks lie around a middle one. "
            f"Give {depth + 1}, which is what the official program builds of {depth}."
        )
    if text_size < 0 or (text_size and num_text_tokens < 1):
        raise ConfigError(
            f"model.text_size={text_size} and model.num_text_tokens={num_text_tokens} must be "
            "positive. Give model.text_size=0 for a model without text."
        )
