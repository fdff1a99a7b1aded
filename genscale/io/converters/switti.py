"""Switti checkpoints: official keys <-> ours, losslessly both ways.

Reads ``model.safetensors`` of the published folders, whose ``config.json`` beside it holds what no
shape tells, and ``model_state_dict.pt`` of the training program. Nothing is transposed; the two
input layers of a gated feed-forward layer are one of ours.

Two official buffers are no weights. ``lvl_1L``, the scale of every token, tells the scales; it is
checked on load and rebuilt on save. ``attn_bias_for_masking``, a table over pairs of tokens (357 MB
at 1024 pixels), is dropped and not written: the official constructor makes it. It does not say
either whether a model is autoregressive, as the program that trains writes a causal one always.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from genscale.backbones.switti import Switti
from genscale.errors import CheckpointError, ConfigError
from genscale.io.converters import scale_wise
from genscale.io.converters.msvq import PUBLISHED_SCALES
from genscale.io.keys import (
    check_keys,
    check_shapes,
    count_children,
    on_meta,
    settings_sentence,
    shapes_of,
)

BACKBONE = Switti

UNTOLD = ("use_ar",)
"""Settings that neither shapes nor a published default tell: config.json or the user does."""

_SCALE_OF_TOKENS, _MASK = "lvl_1L", "attn_bias_for_masking"
# (ours, official) beyond what all scale-wise transformers have: whole names, and inside blocks
_NAMES = (
    ("pooled.", "text_pooler."),
    ("crop_frequencies", "crop_embed.weight"),
    ("crop.", "crop_proj."),
)
_IN_BLOCKS: scale_wise.Names = (
    ("attention_norm_in", "self_attention_norm1"),
    ("attention_norm_out", "self_attention_norm2"),
    ("attention.qkv", "attn.to_qkv"),
    ("attention.out", "attn.proj"),
    ("cross_norm_in", "cross_attention_norm1"),
    ("cross_norm_out", "cross_attention_norm2"),
    ("text_norm", "attention_y_norm"),
    ("cross_attention.q", "cross_attn.to_q"),
    ("cross_attention.kv", "cross_attn.to_kv"),
    ("cross_attention.out", "cross_attn.proj"),
    ("mlp_norm_in", "ffn_norm1"),
    ("mlp_norm_out", "ffn_norm2"),
    ("crop_scale", "crop_cond_scales"),
)
_GATED = ("gate_proj", "up_proj")  # the halves of our gate_up
_OWN = "Give the state dict of a model with this config."
_KNOWN = {
    "depth", "embed_dim", "num_heads", "mlp_ratio", "rope", "rope_theta", "rope_size",
    "use_swiglu_ffn", "use_ar", "use_crop_cond", "reso", "patch_nums", "Cvae", "V",
    "pooled_embed_size", "context_dim",
}  # fmt: skip
# nothing depends on them, or one value alone is right
_FIXED = {"norm_eps": 1e-6, "attn_l2_norm": True}
_WITHOUT_EFFECT = {
    "vq_quant_resi", "vq_share_quant_resi", "drop_rate", "attn_drop_rate", "drop_path_rate",
    "flash_if_available", "fused_if_available",
}  # fmt: skip


def config_from_official(config: Mapping[str, Any], *, parity: bool = False) -> dict[str, Any]:
    """Translate the official settings, of the constructor or of ``config.json``, into Switti's.

    Args:
        config: official settings. Missing ones have the values of the published models: depth 30,
            and all else that follows from the depth and ``reso``, the side of pictures.
        parity: compute crops in float32, as the official program does.

    Returns:
        Keyword arguments of :class:`~genscale.backbones.switti.Switti`.

    Raises:
        ConfigError: a setting is unknown, or of a value that Switti cannot have.
    """
    unknown = sorted(set(config) - _KNOWN - set(_FIXED) - _WITHOUT_EFFECT)
    if unknown:
        raise ConfigError(
            f"The official settings hold {unknown}, which Switti does not know; known are "
            f"{sorted(_KNOWN)}. Remove them if they change nothing."
        )
    for name, value in _FIXED.items():
        if config.get(name, value) != value:
            raise ConfigError(
                f"The official setting {name} must be {value}, as in all published models, but is "
                f"{config[name]}. Switti has no such variant."
            )
    depth = config.get("depth", 30)
    swiglu = bool(config.get("use_swiglu_ffn", True))
    return {
        "scales": list(config["patch_nums"] if "patch_nums" in config else _of_side(config)),
        "latent_channels": config.get("Cvae", 32),
        "vocab_size": config.get("V", 4096),
        "text_size": config.get("context_dim", 2048),
        "pooled_text_size": config.get("pooled_embed_size", 1280),
        "hidden_size": config.get("embed_dim", 64 * depth),
        "depth": depth,
        "num_heads": config.get("num_heads", depth),
        "use_ar": bool(config.get("use_ar", False)),
        "rope": bool(config.get("rope", True)),
        "rope_theta": float(config.get("rope_theta", 10000)),
        "rope_extent": float(config.get("rope_size", 128)),
        "mlp": "swiglu" if swiglu else "gelu",
        "mlp_ratio": float(config.get("mlp_ratio", 4.0)),
        "crop_condition": bool(config.get("use_crop_cond", True)),
        "float32_crop": parity,
    }


def config_to_official(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what ``config.json`` of a published folder holds, for our settings.

    None for widths and scales that such a folder cannot state, as they follow from the depth and
    the side of the pictures there.
    """
    depth, scales = config["depth"], list(config["scales"])
    side = next((16 * side for side, known in PUBLISHED_SCALES.items() if known == scales), None)
    plain = {"hidden_size": 64 * depth, "num_heads": depth, "latent_channels": 32}
    plain |= {"vocab_size": 4096, "text_size": 2048, "pooled_text_size": 1280, "mlp_ratio": 4.0}
    if side is None or any(config[name] != value for name, value in plain.items()):
        return None
    return {
        "depth": depth,
        "rope": config["rope"],
        "rope_theta": config["rope_theta"],
        "rope_size": config["rope_extent"],
        "use_swiglu_ffn": config["mlp"] == "swiglu",
        "use_ar": config["use_ar"],
        "use_crop_cond": config["crop_condition"],
        "reso": side,
    }


def config_from_state_dict(
    state: Mapping[str, Tensor],
    *,
    num_heads: int | None = None,
    input_size: int | None = None,
    scales: Sequence[int | Sequence[int]] | None = None,
) -> dict[str, Any]:
    """Read Switti's settings off an official state dict, as far as tensors tell them.

    Args:
        state: official keys; tensors may be on the meta device.
        num_heads: attention heads, which no shape tells; default: of 64 channels, as published.
        input_size: not read; the scales tell the size.
        scales: the scales, where ``lvl_1L`` is not there to tell them; default: the finest
            published list of as many.

    Returns:
        Keyword arguments of :class:`~genscale.backbones.switti.Switti`, without :data:`UNTOLD`.

    Raises:
        CheckpointError: the state dict is none of Switti, or its scales are not known.
    """
    state = scale_wise.without_prefix(state)
    needed = ("word_embed.weight", "text_pooler.weight", "lvl_embed.weight", "head.weight",
              "blocks.0.cross_attn.to_kv.weight")  # fmt: skip
    missing = [name for name in needed if name not in state]
    if missing:
        raise CheckpointError(
            f"This is no official Switti state dict: '{missing[0]}' is missing, the first key is "
            f"'{next(iter(state), 'none')}'. Give model.safetensors of a published folder, or "
            "model_state_dict.pt of a training run."
        )
    width, channels = state["word_embed.weight"].shape
    swiglu = "blocks.0.ffn.gate_proj.weight" in state
    found: dict[str, Any] = {
        "scales": list(scales) if scales is not None else scale_wise.read_scales(state),
        "latent_channels": channels,
        "vocab_size": len(state["head.weight"]),
        "text_size": state["blocks.0.cross_attn.to_kv.weight"].shape[1],
        "pooled_text_size": state["text_pooler.weight"].shape[1],
        "hidden_size": width,
        "depth": count_children(state, "blocks"),
        "num_heads": num_heads or max(1, width // 64),
        "rope": "pos_1LC" not in state,
        "mlp": "swiglu" if swiglu else "gelu",
        "crop_condition": "crop_proj.weight" in state,
    }
    if not swiglu and "blocks.0.ffn.fc1.bias" in state:
        found["mlp_ratio"] = len(state["blocks.0.ffn.fc1.bias"]) / width
    return found


def from_official(state: Mapping[str, Tensor], model: Switti) -> dict[str, Tensor]:
    """Turn an official state dict into one that ``model.load_state_dict`` takes strictly.

    Args:
        state: official keys, with or without the two buffers that are no weights.
        model: the model to load into; it may be on the meta device.

    Returns:
        Our keys, in the types and on the device of ``state``.

    Raises:
        CheckpointError: keys are missing or left over, shapes differ, or the scales are others.
    """
    state, own = scale_wise.without_prefix(state), model.state_dict()
    shapes = shapes_of(_to_official(own))
    no_weights = (_SCALE_OF_TOKENS, _MASK)
    given = {name: tensor for name, tensor in state.items() if name not in no_weights}
    read = partial(config_from_state_dict, state)
    advice = partial(settings_sentence, read, model.config, family="Switti")
    check_keys(given, shapes, owner="Switti", advice=advice)
    check_shapes(given, shapes, owner="Switti", advice=advice)
    scale_wise.check_levels(state, model, "Switti")
    result = {}
    gated = model.config["mlp"] == "swiglu"
    for name, tensor in own.items():
        pieces = [given[official] for official in _official_names(name, gated=gated)]
        result[name] = (torch.cat(pieces) if len(pieces) > 1 else pieces[0].clone()).view(
            tensor.shape
        )
    return result


def to_official(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Turn our state dict (or gradients by our names) into the official layout.

    Args:
        state: our keys.
        config: the model's settings, ``model.config`` or the constructor's arguments.

    Returns:
        Official keys with ``lvl_1L``, without ``attn_bias_for_masking``; else the exact inverse of
        :func:`from_official`.

    Raises:
        CheckpointError: keys are missing or left over.
    """
    model: Switti = on_meta(Switti, config)
    check_keys(state, model.state_dict(), owner="Switti", advice=_OWN)
    official = _to_official(state)
    return {**official, _SCALE_OF_TOKENS: scale_wise.token_levels(model)[None]}


def _to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    official: dict[str, Tensor] = {}
    gated = any(".mlp.gate_up." in name for name in state)
    for name, tensor in state.items():
        names = _official_names(name, gated=gated)
        for theirs, piece in zip(names, tensor.chunk(len(names)), strict=True):
            # tables and scales by channel have a first axis of one
            lone = theirs in ("pos_start", "pos_1LC") or theirs.endswith("crop_cond_scales")
            official[theirs] = piece[None].clone() if lone else piece.clone()
    return official


def _official_names(name: str, *, gated: bool) -> list[str]:
    """Return the official keys of one of ours, two where ours joins two tensors.

    Args:
        name: ours.
        gated: whether feed-forward layers are gated.
    """
    for ours, official in _NAMES:
        if name.startswith(ours):
            return [official + name[len(ours) :]]
    if ".mlp.gate_up." in name:
        return [name.replace("mlp.gate_up", f"ffn.{half}") for half in _GATED]
    if gated and ".mlp.down." in name:
        return [name.replace("mlp.down", "ffn.down_proj")]
    return [scale_wise.official_name(name, _IN_BLOCKS)]


def _of_side(config: Mapping[str, Any]) -> list[int]:
    """Return the published scales of the side of pictures that a config names."""
    side = config.get("reso", 512)
    if side % 16 or side // 16 not in PUBLISHED_SCALES:
        raise ConfigError(
            f"The official setting reso must be one of {[16 * s for s in PUBLISHED_SCALES]}, but "
            f"is {side}. Give patch_nums, the sides of the scales, for other ones."
        )
    return PUBLISHED_SCALES[side // 16]
