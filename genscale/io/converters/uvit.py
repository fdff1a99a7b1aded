"""U-ViT checkpoints: official keys, ScaleLong's included, <-> ours, losslessly both ways.

Reads the bare (EMA) state dicts that the official programs publish and writes files they can
load. Nothing is transposed; two things are laid out differently here: one position table of all
tokens is split into that of the extra tokens and that of the patches, and the three lists of
blocks are one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from genscale.backbones.uvit import UViT
from genscale.errors import CheckpointError, ConfigError
from genscale.io.keys import (
    check_keys,
    check_shapes,
    count_children,
    on_meta,
    settings_sentence,
    shapes_of,
)

BACKBONE = UViT

# (ours, official), whole names of modules
_MODULES = (
    ("patch", "patch_embed.proj"),
    ("class_table", "label_emb"),
    ("time_embed.linear_1", "time_embed.0"),
    ("time_embed.linear_2", "time_embed.2"),
    ("text_embed", "context_embed"),
    ("head_norm", "norm"),
    ("head", "decoder_pred"),
    ("smooth", "final_layer"),
)
_IN_BLOCKS = (
    ("join", "skip_linear"),
    ("attention_norm", "norm1"),
    ("attention.qkv", "attn.qkv"),
    ("attention.out", "attn.proj"),
    ("mlp_norm", "norm2"),
    ("mlp.up", "mlp.fc1"),
    ("mlp.down", "mlp.fc2"),
)
_TABLES = ("extra_positions", "position.table")  # in the order of their rows in the official one
_POSITIONS = "pos_embed"
_SKIP_SCALES = ("none", "constant", "geometric", "gate_shared", "gate")  # ScaleLong's numbers
_MODEL_KEYS = {
    "img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio",
    "qkv_bias", "mlp_time_embed", "num_classes", "conv", "skip", "clip_dim", "num_clip_token",
    "scalelong", "kappa",
}  # fmt: skip
# these change how the official program computes, not what
_WITHOUT_EFFECT = {"use_checkpoint", "qk_scale"}


def config_from_official(config: Mapping[str, Any], *, parity: bool = False) -> dict[str, Any]:
    """Translate the settings of the official constructors (class, text, ScaleLong) into UViT's.

    Args:
        config: the official model settings; ``num_classes`` counts the null class. Missing ones
            have the official defaults.
        parity: changes nothing: the official program takes inputs of the trained size only.

    Returns:
        Keyword arguments of :class:`~genscale.backbones.uvit.UViT`.

    Raises:
        ConfigError: a setting is unknown or has no counterpart.
    """
    unknown = sorted(set(config) - _MODEL_KEYS - _WITHOUT_EFFECT)
    if unknown:
        raise ConfigError(
            f"The official settings hold {unknown}, which UViT does not know; known are "
            f"{sorted(_MODEL_KEYS)}. Remove them if they change nothing."
        )
    scale = config.get("scalelong", 0)
    if scale not in range(len(_SKIP_SCALES)):
        raise ConfigError(
            f"The official setting scalelong must be 0 to 4, but is {scale!r}. "
            "Check the official settings."
        )
    return {
        "input_size": config.get("img_size", 224),
        "in_channels": config.get("in_chans", 3),
        "num_classes": max(config.get("num_classes", -1), 1) - 1,
        "patch_size": config.get("patch_size", 16),
        "hidden_size": config.get("embed_dim", 768),
        # an even number builds one block more there: pairs around a middle one
        "depth": config.get("depth", 12) // 2 * 2 + 1,
        "num_heads": config.get("num_heads", 12),
        "mlp_ratio": float(config.get("mlp_ratio", 4.0)),
        "qkv_bias": bool(config.get("qkv_bias", False)),
        "time_mlp": bool(config.get("mlp_time_embed", False)),
        "head_conv": bool(config.get("conv", True)),
        "long_skips": bool(config.get("skip", True)),
        "text_size": config.get("clip_dim", 0),
        "num_text_tokens": config.get("num_clip_token", 77),
        "skip_scale": _SKIP_SCALES[scale],
        "skip_kappa": float(config.get("kappa", 0.5)),
    }


def config_from_state_dict(
    state: Mapping[str, Tensor], *, num_heads: int | None = None, input_size: int | None = None
) -> dict[str, Any]:
    """Read UViT's settings off an official state dict, as far as shapes tell them.

    Args:
        state: official keys; tensors may be on the meta device.
        num_heads: attention heads, which no shape tells; default: as in the published models,
            64 channels a head, or 72 where the width is 1152.
        input_size: side of the trained input; default: what the position table tells.

    Returns:
        Keyword arguments of :class:`~genscale.backbones.uvit.UViT`, for square inputs. Constant
        and geometric scales of the skips leave no trace in a file: give them on your own.

    Raises:
        CheckpointError: the state dict is none of U-ViT.
    """
    needed = ("patch_embed.proj.weight", "mid_block.mlp.fc1.bias", _POSITIONS)
    missing = [name for name in needed if name not in state]
    if missing:
        raise CheckpointError(
            f"This is no official U-ViT state dict: '{missing[0]}' is missing, the first key is "
            f"'{next(iter(state), 'none')}'. Give the bare state dict, not a wrapper around it."
        )
    width, channels, side = state[needed[0]].shape[:3]
    labels, text = state.get("label_emb.weight"), state.get("context_embed.weight")
    tokens = state[_POSITIONS].shape[1]
    # with text the number of its tokens is open too: the largest square of patches is taken
    extras = 1 + (0 if labels is None else 1)
    grid = math.isqrt(tokens - extras) if input_size is None else input_size // side
    gate = "gate_shared" if "se.layer1.weight" in state else "gate"
    return {
        "input_size": grid * side if input_size is None else input_size,
        "in_channels": channels,
        "num_classes": 0 if labels is None else len(labels) - 1,
        "patch_size": side,
        "hidden_size": width,
        "depth": 2 * count_children(state, "in_blocks") + 1,
        "num_heads": num_heads or (16 if width == 1152 else max(1, width // 64)),
        "mlp_ratio": len(state[needed[1]]) / width,
        "qkv_bias": "mid_block.attn.qkv.bias" in state,
        "time_mlp": "time_embed.0.weight" in state,
        "head_conv": "final_layer.weight" in state,
        "long_skips": "out_blocks.0.skip_linear.weight" in state,
        "text_size": 0 if text is None else text.shape[1],
        "num_text_tokens": 77 if text is None else tokens - extras - grid**2,
        "skip_scale": gate if any(key.startswith("se.") for key in state) else "none",
    }


def from_official(state: Mapping[str, Tensor], model: UViT) -> dict[str, Tensor]:
    """Turn an official state dict into one that ``model.load_state_dict`` takes strictly.

    Args:
        state: official keys.
        model: the model to load into; it may be on the meta device.

    Returns:
        Our keys, in the types and on the device of ``state``.

    Raises:
        CheckpointError: keys are missing or left over, or shapes differ.
        ConfigError: the model has skips that the official layout cannot hold.
    """
    own = model.state_dict()
    shapes = shapes_of(_official(own, model))
    read = partial(config_from_state_dict, state)
    advice = partial(settings_sentence, read, model.config, family="UViT")
    check_keys(state, shapes, owner="UViT", advice=advice)
    check_shapes(state, shapes, owner="UViT", advice=advice)
    rows = [len(own[name]) for name in _TABLES]
    tables = dict(zip(_TABLES, torch.split(state[_POSITIONS][0], rows), strict=True))
    return {
        name: (tables[name] if name in tables else state[_official_name(name, model)]).clone()
        for name in own
    }


def to_official(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Turn our state dict (or gradients by our names) into the official layout.

    Args:
        state: our keys.
        config: the model's settings, ``model.config`` or the constructor's arguments.

    Returns:
        Official keys; the exact inverse of :func:`from_official`.

    Raises:
        CheckpointError: keys are missing or left over.
        ConfigError: the model has skips that the official layout cannot hold.
    """
    model: UViT = on_meta(UViT, config)
    advice = "Give the state dict of a model with this config."
    check_keys(state, model.state_dict(), owner="UViT", advice=advice)
    return _official(state, model)


def _official(state: Mapping[str, Tensor], model: UViT) -> dict[str, Tensor]:
    """Rename our tensors, and join the two position tables."""
    if model.config["skip_scale"] == "channel":
        raise ConfigError(
            "The official layout knows no skip_scale=channel. Save the model with save_pretrained "
            "instead."
        )
    result = {
        _official_name(name, model): tensor.clone()
        for name, tensor in state.items()
        if name not in _TABLES
    }
    result[_POSITIONS] = torch.cat([state[name] for name in _TABLES])[None]
    return result


def _official_name(name: str, model: UViT) -> str:
    """Return the official key of ours."""
    for ours, official in _MODULES:
        if name.startswith(ours + "."):
            return official + name[len(ours) :]
    if match := re.match(r"skip_factors\.gates\.(\d+)\.linear_(\d)\.(.*)", name):
        gate, layer, leaf = match.groups()
        shared = model.config["skip_scale"] == "gate_shared"
        return f"se.layer{layer}.{leaf}" if shared else f"se.{gate}.layer{layer}.{leaf}"
    match = re.match(r"blocks\.(\d+)\.(.*)", name)
    if match is None:
        return name
    number, part = int(match[1]), match[2]
    half = len(model.blocks) // 2
    for ours, official in _IN_BLOCKS:
        if part.startswith(ours + "."):
            part = official + part[len(ours) :]
            break
    if number == half:
        return f"mid_block.{part}"
    if number < half:
        return f"in_blocks.{number}.{part}"
    return f"out_blocks.{number - half - 1}.{part}"
