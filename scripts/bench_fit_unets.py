"""U-Nets of clips, small ones too, and the search of one that is as large, or as dear, as FIT.

Of ``scripts/bench_fit.py``, which says what they are compared in.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from genscale.backbones.base import parameter_count

CLOSE = 0.05
KINDS = ("UNet3D", "UNetSpatioTemporal")
FAMILIES = [  # width of a level over that of the first, blocks a level; the paper's come first
    (multipliers, layers)
    for layers in (2, 1, 3)
    for multipliers in ((1, 2, 3, 4), (1, 2, 2, 4), (1, 2, 4, 4), (1, 3, 4, 6), (1, 1, 2, 3))
]
STEP = 32  # widths are multiples of the number of channels of a norm's groups
LARGEST = 512  # width of the first level


@dataclass(frozen=True)
class Size:
    """A clip, the FIT for it, and how finely widths of U-Nets may be chosen.

    Args:
        clip: frames, height, width.
        fit: settings of FIT beside the clip's and the text's.
        text: number and width of the text tokens.
        head: size of the U-Nets' heads; UNet3D begins with eight of them on all pixels, which small
            ones make thin.
    """

    clip: tuple[int, int, int]
    fit: Mapping[str, Any]
    text: tuple[int, int]
    head: int


NARROW = {"patch_width": 192, "context_width": 192, "latent_width": 256}  # 1/4 of the published
SIZES = {
    "tiny": Size(
        (2, 16, 16),
        {**NARROW, "group_size": (2, 2, 2), "num_latents": 64, "depth": 1, "global_depth": 1},
        (4, 32),
        8,
    ),
    "small": Size(
        (8, 32, 32), {**NARROW, "group_size": (8, 4, 4), "num_latents": 128}, (32, 192), 8
    ),
    "500m": Size((16, 40, 64), {}, (125, 1024), 32),
}


def unet(kind: str, widths: tuple[int, ...], layers: int, size: Size) -> nn.Module:
    """Build a U-Net with attention on all levels but the first."""
    from diffusers.models import unets

    spatio_temporal = kind == "UNetSpatioTemporal"
    suffix, deep = ("SpatioTemporal" if spatio_temporal else "3D"), len(widths) - 1
    shared = {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": widths,
        "layers_per_block": layers,
        "cross_attention_dim": size.text[1],
        "down_block_types": (f"DownBlock{suffix}", *[f"CrossAttnDownBlock{suffix}"] * deep),
        "up_block_types": (*[f"CrossAttnUpBlock{suffix}"] * deep, f"UpBlock{suffix}"),
    }
    classes: Any = unets  # whose constructors have no types
    network: nn.Module
    if spatio_temporal:
        network = classes.UNetSpatioTemporalConditionModel(
            **shared,
            num_attention_heads=tuple(width // size.head for width in widths),
            addition_time_embed_dim=64,
            projection_class_embeddings_input_dim=64,
            num_frames=size.clip[0],
        )
    else:  # what it calls the head's size is that indeed in its blocks
        network = classes.UNet3DConditionModel(**shared, attention_head_dim=size.head)
    return network


@dataclass(frozen=True)
class Inputs:
    """A clip ``(B, C, T, H, W)``, its time ``(B,)`` and its condition, the same for everybody."""

    x: Tensor
    t: Tensor
    text: Tensor
    frame_rate: Tensor

    @classmethod
    def of(cls, size: Size, batch: int, device: torch.device | str) -> Inputs:
        """Draw them."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(batch, 3, *size.clip, generator=generator).to(device)
        text = torch.randn(batch, *size.text, generator=generator).to(device)
        return cls(x, torch.zeros(batch, device=device), text, torch.ones(batch, device=device))


def call_unet(network: nn.Module, kind: str, inputs: Inputs) -> Tensor:
    """Predict ``(B, C, T, H, W)``."""
    sample: Tensor
    if kind == "UNet3D":
        sample = network(inputs.x, inputs.t, inputs.text).sample
        return sample
    clip, rate = inputs.x.transpose(1, 2), inputs.frame_rate[:, None]
    sample = network(clip, inputs.t, inputs.text, rate).sample
    return sample.transpose(1, 2)


@functools.cache
def _sites(kind: str, layers: int, levels: int, size_name: str) -> dict[str, tuple[int, int]]:
    """Return, of one clip, how often each layer is applied, and how many rows a sequence has.

    Neither depends on widths, so that one pass on the meta device serves all of a family. Widths
    grow at every level here, so that all layers are there that a narrower one may lack.
    """
    size = SIZES[size_name]
    found: dict[str, tuple[int, int]] = {}

    def note(name: str, module: nn.Module, arguments: Any, output: Tensor) -> None:
        found[name] = (
            output.numel() // weights[name].shape[0],
            output.shape[1] if output.dim() == 3 else 1,
        )

    network = _sketch(kind, tuple(STEP * (i + 1) for i in range(levels)), layers, size).eval()
    weights = _weights(network)
    for name in weights:
        network.get_submodule(name).register_forward_hook(partial(note, name))
    with torch.no_grad():
        call_unet(network, kind, Inputs.of(size, 1, "meta"))
    return found


def _sketch(kind: str, widths: tuple[int, ...], layers: int, size: Size) -> nn.Module:
    """Return a U-Net without numbers; the mixing weights of one kind ignore the device's mode."""
    with torch.device("meta"):
        return unet(kind, widths, layers, size).to("meta")


def _weights(network: nn.Module) -> dict[str, Tensor]:
    """Return the weights that are multiplied, by name of their layer."""
    return {
        name: module.weight
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d)
    }


@functools.cache
def cost(kind: str, widths: tuple[int, ...], layers: int, size_name: str, quantity: str) -> int:
    """Return ``parameters`` or a clip's forward ``flops`` of a U-Net that is never run.

    A layer makes 2 FLOPs for each of its weights wherever it is applied; attention makes 4 for each
    channel, query and key. torch's counter says the same of a pass on the meta device, slower;
    it does not see the attention kernel of CPUs.
    """
    network = _sketch(kind, widths, layers, SIZES[size_name])
    if quantity == "parameters":
        return parameter_count(network)
    sites, flops = _sites(kind, layers, len(widths), size_name), 0
    for name, weight in _weights(network).items():
        flops += 2 * weight.numel() * sites[name][0]
        if name.endswith(".to_q"):
            keys = sites[name.removesuffix("to_q") + "to_k"][1]
            flops += 4 * sites[name][0] * keys * weight.shape[0]
    return flops


@dataclass(frozen=True)
class Choice:
    """A U-Net: its kind, widths of the levels, blocks a level."""

    kind: str
    widths: tuple[int, ...]
    layers: int


def ladder(multipliers: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return all widths in these proportions, rounded to multiples of STEP, ascending."""
    rungs = (
        tuple(max(STEP, STEP * round(first * times / STEP)) for times in multipliers)
        for first in range(2, LARGEST, 2)
    )
    return list(dict.fromkeys(rungs))


def _squares(widths: tuple[int, ...]) -> float:
    return float(sum(width**2 for width in widths))


def search(kind: str, size_name: str, quantity: str, aim: float) -> Choice:
    """Return the first U-Net of FAMILIES whose ``quantity`` is within CLOSE of ``aim``.

    Raises:
        SystemExit: there is none.
    """
    best, best_miss = None, float("inf")
    for multipliers, layers in FAMILIES:
        rungs = ladder(multipliers)
        tried: dict[tuple[int, ...], float] = {}
        widths = rungs[len(rungs) // 8]
        while widths not in tried:  # cost is nearly proportional to the sum of squares
            tried[widths] = cost(kind, widths, layers, size_name, quantity) / aim
            wanted = _squares(widths) / tried[widths]
            widths = min(rungs, key=lambda rung: abs(_squares(rung) / wanted - 1))
        closest = min(tried, key=lambda rung: abs(tried[rung] - 1))
        if abs(tried[closest] - 1) < best_miss:
            best, best_miss = Choice(kind, closest, layers), abs(tried[closest] - 1)
        if best is not None and best_miss <= CLOSE:
            return best
    raise SystemExit(
        f"No {kind} has {quantity} within {CLOSE:.0%} of {aim:.3g}; the closest is {best}, "
        f"{best_miss:.0%} away. Take another --size."
    )
