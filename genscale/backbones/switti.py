"""Switti: scale-wise transformers from text to pictures (arXiv:2412.01819).

A. Voronov et al., "Switti: Designing Scale-Wise Transformers for Text-to-Image Synthesis", CVPR
2025; official program yandex-research/switti, Apache-2.0. Outputs and gradients are matched number
for number (``scripts/parity/switti.py``), checkpoints load through
``genscale/io/converters/switti.py``.

Tokens of all scales are predicted from the running latent before them, as in VAR
(arXiv:2404.02905). A pooled text vector is the first token and, with the crop of the training
picture, the condition c of every block's norms; the text's tokens are attended to. Residual
branches have a norm before and after (sandwich), and places turn queries and keys such that all
scales span the same range.

Without ``use_ar`` a scale attends to itself alone: what came before reaches it through the running
latent, and sampling keeps no keys and values of earlier scales.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.backbones.base import register_to_config
from genscale.backbones.scale_wise import (
    ScaleEmbedding,
    ScaleHead,
    ScaleTransformer,
    plain_scales,
    spared_by_decay,
    start_weights,
)
from genscale.backbones.shapes import check_choice, check_heads, check_positive, mlp_width
from genscale.backbones.switti_block import Condition, Rotation, SwittiBlock
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.layers.mlp import MLP
from genscale.layers.norm import WeightedRMSNorm, no_autocast, upcast
from genscale.layers.scale_cache import cache_dtype, claim, empty_cache
from genscale.layers.scale_rope import ScaleRoPE

CROP_BASE = 512  # the short side to which pictures were resized before they were cropped


class Switti(ScaleTransformer):
    """Scale-wise transformer from text to pictures.

    Args:
        scales: sides of the scales, or ``[height, width]`` pairs, coarse first.
        latent_channels: channels Cv of the running latent.
        vocab_size: codes V.
        text_size: width of the text's tokens; 2048 = 768 + 1280 are those of the published text
            encoders, joined.
        num_text_tokens: number of the text's tokens, where no text is given.
        pooled_text_size: width of the pooled text.
        hidden_size: width D.
        depth: blocks.
        num_heads: attention heads.
        use_ar: scales attend to all before them; no shape of the weights tells.
        rope: turn queries and keys by their places; otherwise places are learned vectors.
        rope_theta: base of the frequencies.
        rope_extent: where the last cell of every scale lies along each axis.
        mlp: feed-forward layers: ``"swiglu"`` of width 8 D / 3, or ``"gelu"``.
        mlp_ratio: width of those with GELU, in units of D.
        crop_condition: condition on ``cond.size``, the original size of the picture of which the
            central square of 512 pixels was seen; missing sizes mean that nothing was cut off.
        float32_crop: compute that size, resized, in float32, as the official program does: the
            short side of one picture in seven is then 511 in place of 512.
        init_gate: factor of the initial weights that make gates.
        checkpoint_blocks: recompute the blocks in the backward pass instead of keeping them.

    Raises:
        ConfigError: settings that do not fit together.
    """

    block_classes = ("SwittiBlock",)

    @register_to_config
    def __init__(
        self,
        *,
        scales: Sequence[int | Sequence[int]] = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
        latent_channels: int = 32,
        vocab_size: int = 4096,
        text_size: int = 2048,
        num_text_tokens: int = 77,
        pooled_text_size: int = 1280,
        hidden_size: int = 1920,
        depth: int = 30,
        num_heads: int = 30,
        use_ar: bool = False,
        rope: bool = True,
        rope_theta: float = 10000.0,
        rope_extent: float = 128.0,
        mlp: Literal["swiglu", "gelu"] = "swiglu",
        mlp_ratio: float = 4.0,
        crop_condition: bool = True,
        float32_crop: bool = False,
        init_gate: float = 1e-5,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        self.register_to_config(scales=plain_scales(scales))
        check_choice("mlp", mlp, ("swiglu", "gelu"))
        _check_widths(self.config)
        self.hidden_size, self.num_heads, self.use_ar = hidden_size, num_heads, use_ar
        self.gradient_checkpointing = checkpoint_blocks  # diffusers' name for the switch
        self.pooled = nn.Linear(pooled_text_size, hidden_size)
        self.embed = ScaleEmbedding(self.scales, latent_channels, hidden_size, positions=not rope)
        self.rotary = (
            ScaleRoPE(hidden_size // num_heads, theta=rope_theta, extent=rope_extent)
            if rope
            else None
        )
        self.crop_frequencies: Tensor | None
        frequencies = torch.empty(hidden_size // 8) if crop_condition else None
        self.register_buffer("crop_frequencies", frequencies)
        self.crop = nn.Linear(hidden_size, hidden_size) if crop_condition else None
        mlp_size = hidden_size * 8 // 3 if mlp == "swiglu" else mlp_width(hidden_size, mlp_ratio)
        self.blocks = nn.ModuleList(
            SwittiBlock(
                hidden_size,
                num_heads,
                text_size,
                mlp_size,
                mlp=mlp,
                prefix=use_ar,
                crop_condition=crop_condition,
            )
            for _ in range(depth)
        )
        self.head = ScaleHead(hidden_size, vocab_size)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew from torch's generator, as the official program starts them."""
        start_weights(self, self.hidden_size)
        for module in self.modules():
            if isinstance(module, WeightedRMSNorm):
                module.reset_parameters()
        if self.crop_frequencies is not None:
            nn.init.normal_(self.crop_frequencies)
        for block in self._blocks():
            vectors = block.modulation.weight.unflatten(0, (6, -1))
            vectors[:2].mul_(self.config["init_gate"])
            vectors[2:].mul_(0.5)
            last = [block.attention.out, block.cross_attention.out]
            if isinstance(block.mlp, MLP):  # SwiGLU's are left as they are
                last.append(block.mlp.down)
            for layer in last:
                layer.weight.div_((2 * len(self.blocks)) ** 0.5)
            if block.crop_scale is not None:
                nn.init.zeros_(block.crop_scale)

    @property
    def needs_prefix(self) -> bool:  # type: ignore[override]  # a setting of this family
        """Whether a scale reads what earlier ones left in memory."""
        return self.use_ar

    def no_weight_decay(self) -> set[str]:
        """Name biases, vectors, levels and positions."""
        return spared_by_decay(self)

    def begin(self, cond: Conditioning, batch: int, device: torch.device) -> dict[str, Any]:
        """Return what is computed once a sample, and with ``use_ar`` buffers of keys and values.

        Args:
            cond: ``text`` ``(B, M, text_size)`` with ``text_mask``, and ``pooled_text``, or no
                text at all; ``size`` ``(B, 2)`` with crop conditioning.
            batch: number of samples B.
            device: where they live.

        Raises:
            ValueError: texts of other shapes than the settings say.
        """
        start = self.start_vectors(cond, batch, device)
        condition = self._condition(start, cond)
        memory = {
            "start": start,
            "head": self.head.modulate(start),
            "blocks": [block.prepare(condition) for block in self._blocks()],
        }
        if self.use_ar:
            memory["cache"] = empty_cache(
                len(self.blocks),
                batch,
                self.num_heads,
                self.embed.spans[-1][1],
                self.hidden_size // self.num_heads,
                device=device,
                dtype=cache_dtype(device, self.embed.word.weight),
            )
        return memory

    def start_vectors(self, cond: Conditioning, batch: int, device: torch.device) -> Tensor:
        """Return ``(B, D)`` of the pooled text."""
        pooled = cond.pooled_text
        if pooled is None and cond.text is None:
            pooled = torch.zeros(batch, self.config["pooled_text_size"], device=device)
        pooled = self._checked("pooled_text", pooled, (batch, self.config["pooled_text_size"]))
        with no_autocast(device):
            weight, bias = upcast(self.pooled.weight), upcast(self.pooled.bias)
            return F.linear(pooled.to(weight), weight, bias)

    def teach(self, x: Tensor, start: Tensor, cond: Conditioning, scales: range) -> Tensor:
        """Run the blocks on all scales up to one."""
        condition = self._condition(start, cond)
        spans, rotation = [self.embed.spans[k] for k in scales], self._rotation(scales, x.device)
        for block in self.blocks:
            x = self.run_block(block, x, condition, spans, rotation)
        return x

    def advance(self, x: Tensor, scale: int, memory: Any) -> tuple[Tensor, Any]:
        """Run the blocks on one scale; with ``use_ar`` its keys and values go into the cache."""
        span = self.embed.spans[scale]
        rotation = self._rotation(range(scale, scale + 1), x.device)
        cache = claim(memory["cache"], *span) if self.use_ar else None
        for i, block in enumerate(self.blocks):
            # a layer's part, so that a compiled block does not see which layer it is
            slot = dict(memory["blocks"][i])
            if cache is not None:
                slot |= {name: [cache[name][i]] for name in ("keys", "values")}
            x = block(x, None, [span], rotation, slot)
            if cache is not None:
                for name in ("keys", "values"):
                    cache[name][i] = slot[name][0]
        return x, memory if cache is None else {**memory, "cache": cache}

    def _blocks(self) -> list[SwittiBlock]:
        return [block for block in self.blocks if isinstance(block, SwittiBlock)]

    def _condition(self, start: Tensor, cond: Conditioning) -> Condition:
        dtype, batch, width = self.embed.word.weight.dtype, len(start), self.config["text_size"]
        text, mask = cond.text, cond.text_mask
        if text is None and cond.pooled_text is None:  # no text: nothing to attend to
            text = start.new_zeros(batch, self.config["num_text_tokens"], width)
            mask = text.new_zeros(text.shape[:2], dtype=torch.bool)
        text = self._checked("text", text, (batch, None, width)).to(start.device, dtype)
        crop = None
        if self.crop is not None:
            with no_autocast(start.device):
                weight, bias = upcast(self.crop.weight), upcast(self.crop.bias)
                crop = F.linear(self._crop_waves(cond.size, batch, start.device), weight, bias)
                crop = crop.to(dtype)
        return Condition(start.to(dtype), crop, text, mask)

    @staticmethod
    def _checked(name: str, value: Tensor | None, shape: tuple[int | None, ...]) -> Tensor:
        fits = value is not None and value.dim() == len(shape)
        if (
            value is None
            or not fits
            or any(n is not None and n != m for n, m in zip(shape, value.shape, strict=True))
        ):
            wanted = ", ".join("M" if n is None else str(n) for n in shape)
            given = "is missing" if value is None else f"has shape {tuple(value.shape)}"
            raise ValueError(
                f"Switti takes cond.{name} of shape ({wanted}), but it {given}. Use the text "
                "encoder the model was trained with, whose widths are model.text_size and "
                "model.pooled_text_size."
            )
        return value

    def _crop_waves(self, size: Tensor | None, batch: int, device: torch.device) -> Tensor:
        """Return sines and cosines ``(B, D)`` of resized height, width, and what is cut off."""
        assert self.crop_frequencies is not None
        if size is None:
            size = torch.full((batch, 2), CROP_BASE, device=device)
        numbers = crop_numbers(size.to(device), single=self.config["float32_crop"])
        waves = numbers[..., None].float() * upcast(self.crop_frequencies) * 2 * math.pi
        return torch.cat((waves.sin(), waves.cos()), dim=-1).flatten(1)

    def _rotation(self, scales: range, device: torch.device) -> Rotation | None:
        if self.rotary is None:
            return None
        return self.rotary.rotation(
            self.scales[scales.start : scales.stop], device, first=scales.start
        )

    def example_condition(self, device: torch.device | str) -> Conditioning:
        """Return a text of one sample."""
        shape = (1, self.config["num_text_tokens"])
        return Conditioning(
            text=torch.zeros(*shape, self.config["text_size"], device=device),
            text_mask=torch.ones(shape, dtype=torch.bool, device=device),
            pooled_text=torch.zeros(1, self.config["pooled_text_size"], device=device),
        )


def crop_numbers(size: Tensor, *, single: bool = False) -> Tensor:
    """Return what is known of a central crop: (height, width, top, left) ``(B, 4)`` int64.

    A picture is resized until its short side has 512 pixels, the other one being rounded down;
    top and left are the pixels cut off before the central 512.

    Args:
        size: ``(B, 2)`` height and width of the picture.
        single: compute in float32, whose rounding leaves some short sides at 511 (parity).
    """
    short = size.amin(dim=1, keepdim=True)
    if single:
        resized = (size * (CROP_BASE / short.float())).to(torch.int64)
    else:
        resized = size.to(torch.int64) * CROP_BASE // short.to(torch.int64)
    return torch.cat((resized, (resized - CROP_BASE).clamp(min=0) // 2), dim=1)


def _check_widths(config: Any) -> None:
    """Check the sizes against each other."""
    positive = (
        "latent_channels",
        "vocab_size",
        "text_size",
        "num_text_tokens",
        "pooled_text_size",
        "hidden_size",
        "depth",
    )
    check_positive({**config, "num_classes": 0}, *positive)
    hidden_size, num_heads = config["hidden_size"], config["num_heads"]
    check_heads(hidden_size, num_heads)
    if config["rope"] and hidden_size // num_heads % 4:
        raise ConfigError(
            "model.rope=true needs heads of a multiple of 4 channels, but model.hidden_size="
            f"{hidden_size} and model.num_heads={num_heads} give {hidden_size // num_heads}. "
            "Change model.num_heads."
        )
    if config["crop_condition"] and hidden_size % 8:
        raise ConfigError(
            "model.crop_condition=true needs model.hidden_size to be a multiple of 8, for sines "
            f"and cosines of four numbers, but it is {hidden_size}. Change it."
        )
