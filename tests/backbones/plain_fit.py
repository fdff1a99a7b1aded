"""FIT and RIN once more, as formulas on official state dicts: what the networks are compared with.

Nothing of the package is used. Loops stand where the networks fold groups into the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]


def norm(state: State, name: str, x: Tensor) -> Tensor:
    """LayerNorm with a gain alone."""
    y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return y * state[f"{name}.gamma"]


def linear(state: State, name: str, x: Tensor) -> Tensor:
    y = x @ state[f"{name}.weight"].t()
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def feed(state: State, name: str, x: Tensor, last: int = 2) -> Tensor:
    y = F.gelu(linear(state, f"{name}.net.0", norm(state, f"{name}.norm", x)))
    return linear(state, f"{name}.net.{last}", y)


def attend(
    state: State, name: str, heads: int, x: Tensor, context: Tensor | None, c: Tensor | None = None
) -> Tensor:
    """Attention of one sample, ``(N, D)``, a head after the other."""
    y = norm(state, f"{name}.norm", x)
    seen = y if context is None else norm(state, f"{name}.norm_context", context)
    if c is not None:
        scale, shift = linear(state, f"{name}.time_cond.1", F.silu(c)).chunk(2)
        y = y * (1 + scale) + shift
    q = linear(state, f"{name}.to_q", y)
    k, v = linear(state, f"{name}.to_kv", seen).chunk(2, dim=-1)
    size = q.shape[-1] // heads
    parts = []
    for h in range(heads):
        own = slice(h * size, (h + 1) * size)
        weights = (q[:, own] @ k[:, own].t() / math.sqrt(size)).softmax(-1)
        parts.append(weights @ v[:, own])
    return linear(state, f"{name}.to_out", torch.cat(parts, -1))


def waves(state: State, name: str, t: Tensor) -> Tensor:
    angles = 2 * math.pi * t * state[f"{name}.0.weights"]
    y = linear(state, f"{name}.1", torch.cat((t[None], angles.sin(), angles.cos())))
    return linear(state, f"{name}.3", F.gelu(y))


def grouped_places(config: Mapping[str, Any]) -> list[list[tuple[int, int, int]]]:
    """The patches of every group, as (frame, row, column) of the grid of patches."""
    sides = [s // p for s, p in zip(config["input_size"], config["patch_size"], strict=True)]
    gt, gh, gw = config["group_size"]
    return [
        [
            (t, h, w)
            for t in range(tg, tg + gt)
            for h in range(hg, hg + gh)
            for w in range(wg, wg + gw)
        ]
        for tg in range(0, sides[0], gt)
        for hg in range(0, sides[1], gh)
        for wg in range(0, sides[2], gw)
    ]


def fit(
    state: State,
    config: Mapping[str, Any],
    clip: Tensor,
    t: Tensor,
    text: Tensor | None,
    resolution: Tensor,
    before: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One clip ``(C, T, H, W)`` -> prediction, latents ``(L, D)``; config is the official one."""
    pt, ph, pw = config["patch_size"]
    groups = grouped_places(config)
    block_config = config["fit_block_config"]
    heads = {
        name: block_config[f"{name}_attention_config"]["heads"]
        for name in ("read", "write", "read_context", "global", "local")
    }
    last = 3 if block_config["drop_units"] > 0 else 2
    crossed = block_config["use_cross_attention_feedforward"]

    def box(place: tuple[int, int, int]) -> tuple[slice, ...]:
        i, j, k = place
        return (
            slice(None),
            slice(i * pt, i * pt + pt),
            slice(j * ph, j * ph + ph),
            slice(k * pw, k * pw + pw),
        )

    pixels = torch.stack([clip[box(place)].flatten() for group in groups for place in group])
    tokens = linear(state, "to_patches.0", pixels)
    tokens = F.layer_norm(
        tokens, tokens.shape[-1:], state["to_patches.1.weight"], state["to_patches.1.bias"]
    )
    patches = list((tokens + state["patches_pe"]).chunk(len(groups)))
    latents = state["latents"]
    if before is not None:
        past = "self_conditioning_latents_projection"
        latents = latents + norm(state, f"{past}.1", feed(state, f"{past}.0", before))
    words = state["context_projection_summary_text_embeddings.weight"]
    if text is None:
        shown = state["summary_text_embeddings_mask_token"].expand(config["num_words"], -1)
    else:
        shown = text @ words.t()
    size = linear(state, "resolution_conditioning_mlp.0", resolution)
    size = linear(state, "resolution_conditioning_mlp.2", F.gelu(size))
    context = torch.cat((shown, waves(state, "time_mlp", t)[None], size[None]))

    def crossed_feed(name: str, x: Tensor) -> Tensor:
        return x + feed(state, name, x) if crossed else 2 * x

    n = config["fit_blocks_count"]
    local, compute = config["local_layers_per_block"], config["global_layers_per_block"]
    for b in range(n + (local > 0)):
        block = f"blocks.{b}"
        for m in range(local):
            layer = f"{block}.local_layers.{m}"
            patches = [p + attend(state, f"{layer}.0", heads["local"], p, None) for p in patches]
            patches = [p + feed(state, f"{layer}.1", p, last) for p in patches]
        if b == n:
            break
        latents = latents + attend(
            state, f"{block}.latents_attend_to_context", heads["read_context"], latents, context
        )
        latents = crossed_feed(f"{block}.latents_context_attn_ff", latents)
        read = f"{block}.latents_attend_to_patches"
        latents = torch.cat(
            [
                own + attend(state, read, heads["read"], own, p)
                for own, p in zip(latents.chunk(len(groups)), patches, strict=True)
            ]
        )
        latents = crossed_feed(f"{block}.latents_cross_attn_ff", latents)
        for m in range(compute):
            layer = f"{block}.global_layers.{m}"
            latents = latents + attend(state, f"{layer}.0", heads["global"], latents, None)
            latents = latents + feed(state, f"{layer}.1", latents, last)
        write = f"{block}.patches_attend_to_latents"
        patches = [
            p + attend(state, write, heads["write"], p, own)
            for own, p in zip(latents.chunk(len(groups)), patches, strict=True)
        ]
        patches = [crossed_feed(f"{block}.patches_cross_attn_ff", p) for p in patches]
    sample = torch.zeros_like(clip)
    for group, tokens in zip(groups, patches, strict=True):
        values = linear(state, "patch_to_pixels.1", norm(state, "patch_to_pixels.0", tokens))
        for place, value in zip(group, values, strict=True):
            sample[box(place)] = value.view(len(clip), pt, ph, pw)
    return sample, latents


def rin(
    state: State,
    config: Mapping[str, Any],
    picture: Tensor,
    t: Tensor,
    earlier: Tensor,
    before: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One picture ``(C, S, S)`` -> prediction and latents; config is the official one."""
    side, heads = config["patch_size"], config["heads"]
    count = config["image_size"] // side
    both = torch.cat((earlier, picture))
    tape = both.view(len(both), count, side, count, side).permute(1, 3, 0, 2, 4).flatten(2)
    if config["dual_patchnorm"]:
        names = ("to_patches.1", "to_patches.2", "to_patches.3")
        tape = F.layer_norm(tape, tape.shape[-1:], *(state[f"{names[0]}.{w}"] for w in WORDS))
        tape = linear(state, names[1], tape)
        tape = F.layer_norm(tape, tape.shape[-1:], *(state[f"{names[2]}.{w}"] for w in WORDS))
    else:
        tape = linear(state, "to_patches.1", tape)
    for axis, name in ((1, "height"), (0, "width")):
        y = torch.linspace(0, 1, count)[:, None]
        for layer in (1, 3, 5):
            y = linear(state, f"axial_pos_emb_{name}_mlp.{layer}", y if layer == 1 else F.silu(y))
        tape = tape + y.unsqueeze(axis)
    tape = tape.flatten(0, 1)
    c = waves(state, "time_mlp", t)
    latents = state["latents"]
    if before is not None:
        past = "init_self_cond_latents"
        latents = latents + norm(state, f"{past}.1", feed(state, f"{past}.0", before))
    if config["latent_token_time_cond"]:
        latents = torch.cat((latents, c[None]))
    vector = None if config["latent_token_time_cond"] else c
    for b in range(config["depth"]):
        block = f"blocks.{b}"
        maps = tape.t().view(1, -1, count, count)
        kernel, bias = (state[f"{block}.patches_peg.ds_conv.{w}"] for w in WORDS)
        maps = F.conv2d(maps, kernel, bias, padding=1, groups=len(kernel))
        tape = tape + maps.flatten(2)[0].t()
        name = f"{block}.latents_attend_to_patches"
        latents = latents + attend(state, name, heads, latents, tape, vector)
        latents = latents + feed(state, f"{block}.latents_cross_attn_ff", latents)
        for m in range(config["latent_self_attn_depth"]):
            layer = f"{block}.latent_self_attns.{m}"
            latents = latents + attend(state, f"{layer}.0", heads, latents, None, vector)
            latents = latents + feed(state, f"{layer}.1", latents)
        if config["patches_self_attn"]:
            tape = tape + linear_attention(state, f"{block}.patches_self_attn", heads, tape, vector)
            tape = tape + feed(state, f"{block}.patches_self_attn_ff", tape)
        name = f"{block}.patches_attend_to_latents"
        tape = tape + attend(state, name, heads, tape, latents, vector)
        tape = tape + feed(state, f"{block}.patches_cross_attn_ff", tape)
        latents = norm(state, f"{block}.latent_final_norm", latents)
    pixels = linear(state, "to_pixels.1", norm(state, "to_pixels.0", tape))
    pixels = pixels.view(count, count, len(picture), side, side).permute(2, 0, 3, 1, 4)
    return pixels.reshape(picture.shape), latents[: config["num_latents"]]


WORDS = ("weight", "bias")


def linear_attention(state: State, name: str, heads: int, x: Tensor, c: Tensor | None) -> Tensor:
    y = norm(state, f"{name}.norm", x)
    if c is not None:
        scale, shift = linear(state, f"{name}.time_cond.1", F.silu(c)).chunk(2)
        y = y * (1 + scale) + shift
    q, k, v = linear(state, f"{name}.to_qkv", y).chunk(3, dim=-1)
    size = q.shape[-1] // heads
    parts = []
    for h in range(heads):
        own = slice(h * size, (h + 1) * size)
        weights = (q[:, own].softmax(-1) / math.sqrt(size)) @ k[:, own].softmax(0).t()
        parts.append(weights @ v[:, own])
    return norm(state, f"{name}.to_out.1", linear(state, f"{name}.to_out.0", torch.cat(parts, -1)))
