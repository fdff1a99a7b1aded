"""Which presets of resolution scaling fit which networks, read off the networks themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from genscale.backbones.base import Backbone, ScaleBackbone
from genscale.backbones.causal_video_block import VideoAttention
from genscale.backbones.rin import RINBlock
from genscale.backbones.scale_wise import ScaleAttention
from genscale.backbones.switti_block import NormedScaleAttention
from genscale.layers.attention import SelfAttention
from genscale.layers.cross_attention import CrossAttention
from genscale.layers.rope import AxialRoPE
from genscale.layers.rope3d import VideoRoPE
from genscale.layers.scale_rope import ScaleRoPE
from genscale.resolution.base import Sides

if TYPE_CHECKING:
    from genscale.resolution.presets import Preset


@dataclass(frozen=True, slots=True)
class Traits:
    """What a network has that operators work on.

    Attributes:
        entropy: softmax attention whose number of keys grows with the picture.
        rotary: rotary positions that can be scaled.
        unet: convolutional stages as diffusers' UNets have them.
        tokens: self-attention over tokens of a grid, whose windows can be attended alone.
        words: attention of the picture's tokens to words.
        scales: samples that are tokens of growing scales, coarse ones before fine ones.
        continuous: samples that are noised and denoised, so that several can be mixed.
        pictures: samples of two axes, not clips.
    """

    entropy: bool
    rotary: bool
    unet: bool
    tokens: bool
    words: bool
    scales: bool
    continuous: bool
    pictures: bool


NEEDS: Mapping[str, str] = {
    "entropy": "softmax attention whose keys grow with the picture",
    "rotary": "rotary positions",
    "unet": "the convolutional stages of a UNet of diffusers",
    "tokens": "self-attention over a grid of tokens without rotary positions",
    "words": "attention to words",
    "scales": "tokens of growing scales",
    "continuous": "noisy samples that can be mixed, not tokens of scales",
    "pictures": "samples that are pictures",
}


def traits(model: nn.Module) -> Traits:
    """Return what a network has; parameters may be on the meta device."""
    modules = list(model.modules())
    own = isinstance(model, Backbone)
    unet = all(hasattr(model, name) for name in ("down_blocks", "mid_block", "up_blocks"))
    plain = [m for m in modules if isinstance(m, SelfAttention)]
    foreign = [m for m in modules if not own and hasattr(m, "to_q")]
    scale_wise = isinstance(model, ScaleBackbone)
    by_scale = any(isinstance(m, ScaleAttention | NormedScaleAttention) for m in modules)
    # groups of a FIT are as large in any picture, and so is what its latents read
    reads = any(isinstance(m, RINBlock | VideoAttention) for m in modules)
    shape = model.sample_shape if isinstance(model, Backbone) else (0, 0, 0)
    return Traits(
        entropy=bool(plain) or bool(foreign) or by_scale or reads,
        rotary=any(
            isinstance(m, AxialRoPE | VideoRoPE | ScaleRoPE)
            or (hasattr(m, "axes_dim") and hasattr(m, "theta"))
            for m in modules
        ),
        unet=unet,
        tokens=any(m.rope is None for m in plain)
        or any(getattr(m, "is_cross_attention", None) is False for m in foreign),
        words=any(isinstance(m, CrossAttention) for m in modules),
        scales=scale_wise,
        continuous=not scale_wise,
        pictures=len(shape) == 3,
    )


def refusal(
    model: nn.Module, preset: Preset, native: Sides | None = None, target: Sides | None = None
) -> str | None:
    """Return why a preset cannot be used, in a sentence that says what to do; None where it can.

    Args:
        model: the network.
        preset: what is asked for.
        native: trained height and width, where sizes are known.
        target: wanted height and width.
    """
    has = traits(model)
    for need in preset.needs:
        if not getattr(has, need):
            other = "entropy" if has.entropy and preset.name != "entropy" else "none"
            if has.scales and preset.cascade:
                other = "pyramid"  # the cascade of scales
            return (
                f"resolution={preset.name} needs {NEEDS[need]}, which {type(model).__name__} has "
                f"not. Use resolution={other}."
            )
    if not preset.cascade or native is None or target is None:
        return None
    if target[0] < native[0] or target[1] < native[1]:
        return (
            f"resolution={preset.name} enlarges pictures of the trained size, "
            f"{native[0]} x {native[1]} here, but {target[0]} x {target[1]} was asked for. "
            "Ask for larger sides, or use resolution=entropy."
        )
    return None


def rendered_table(models: Mapping[str, nn.Module], presets: Iterable[Preset]) -> str:
    """Return a Markdown table of presets (rows) and networks (columns).

    ``yes``; ``part``: without the operators the network has nothing for; ``-``: refused.
    """
    names = list(models)
    lines = [
        f"| resolution | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
    ]
    for preset in presets:
        cells = []
        for model in models.values():
            if refusal(model, preset) is not None:
                cells.append("-")
            else:
                has = traits(model)
                whole = all(getattr(has, need) for need in preset.uses)
                cells.append("yes" if whole else "part")
        lines.append(f"| `{preset.name}` | {' | '.join(cells)} |")
    return "\n".join(lines)
