"""Causal Wan checkpoints: official keys, or those of diffusers, <-> ours, losslessly both ways.

Reads the files of Self Forcing and CausVid, whose weights lie below ``generator_ema`` and
``generator`` and may carry the prefixes of wrappers (FSDP, activation checkpointing, compile), and
bare state dicts of Wan, whose layout is the same. Queries, keys and values are one matrix of ours;
the patch's convolution has an axis more there, of length 1.

Published weights were trained to attend to the padding of the text, so models built from them
have ``attend_padding``. diffusers' ``WanTransformer3DModel`` has the same weights under other names
but attends to all frames: its numbers are ours where the whole video is one block.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from genscale.backbones.causal_video import CausalVideo
from genscale.errors import CheckpointError, ConfigError
from genscale.io.keys import (
    check_keys,
    check_shapes,
    count_children,
    on_meta,
    settings_sentence,
    shapes_of,
)

BACKBONE = CausalVideo

CONTAINERS = {"generator_ema": "ema", "generator": "model"}
"""What training files call the weights -> what it is called here."""

DIFFUSERS = "WanTransformer3DModel"

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "module.")

Names = tuple[tuple[str, tuple[str, ...]], ...]  # ours -> theirs, several where ours is fused

_OFFICIAL: Names = (
    ("patch", ("patch_embedding",)),
    ("text_1", ("text_embedding.0",)),
    ("text_2", ("text_embedding.2",)),
    ("time_embed.linear_1", ("time_embedding.0",)),
    ("time_embed.linear_2", ("time_embedding.2",)),
    ("time_embed.modulation", ("time_projection.1",)),
    ("head.linear", ("head.head",)),
)
_OFFICIAL_IN_BLOCKS: Names = (
    ("attention.qkv", ("self_attn.q", "self_attn.k", "self_attn.v")),
    ("attention.out", ("self_attn.o",)),
    ("attention.q_norm", ("self_attn.norm_q",)),
    ("attention.k_norm", ("self_attn.norm_k",)),
    ("text_norm", ("norm3",)),
    ("text_attention.q_norm", ("cross_attn.norm_q",)),
    ("text_attention.k_norm", ("cross_attn.norm_k",)),
    ("text_attention.q", ("cross_attn.q",)),
    ("text_attention.kv", ("cross_attn.k", "cross_attn.v")),
    ("text_attention.out", ("cross_attn.o",)),
    ("mlp.up", ("ffn.0",)),
    ("mlp.down", ("ffn.2",)),
)
_DIFFUSERS: Names = (
    ("patch", ("patch_embedding",)),
    ("text_1", ("condition_embedder.text_embedder.linear_1",)),
    ("text_2", ("condition_embedder.text_embedder.linear_2",)),
    ("time_embed.linear_1", ("condition_embedder.time_embedder.linear_1",)),
    ("time_embed.linear_2", ("condition_embedder.time_embedder.linear_2",)),
    ("time_embed.modulation", ("condition_embedder.time_proj",)),
    ("head.modulation", ("scale_shift_table",)),
    ("head.linear", ("proj_out",)),
)
_DIFFUSERS_IN_BLOCKS: Names = (
    ("attention.qkv", ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
    ("attention.out", ("attn1.to_out.0",)),
    ("attention.q_norm", ("attn1.norm_q",)),
    ("attention.k_norm", ("attn1.norm_k",)),
    ("text_norm", ("norm2",)),
    ("text_attention.q_norm", ("attn2.norm_q",)),
    ("text_attention.k_norm", ("attn2.norm_k",)),
    ("text_attention.q", ("attn2.to_q",)),
    ("text_attention.kv", ("attn2.to_k", "attn2.to_v")),
    ("text_attention.out", ("attn2.to_out.0",)),
    ("mlp.up", ("ffn.net.0.proj",)),
    ("mlp.down", ("ffn.net.2",)),
    ("modulation", ("scale_shift_table",)),
)
_LAYOUTS = {
    "official": (_OFFICIAL, _OFFICIAL_IN_BLOCKS),
    "diffusers": (_DIFFUSERS, _DIFFUSERS_IN_BLOCKS),
}
_OWN = "Give the state dict of a model with this config."
_PUBLISHED_FRAMES = (21, 60, 104)  # 81 frames of 480 x 832 pixels, as latents
_UNTOLD = ("input_size", "attend_padding")  # assumed where a state dict is all there is
_KNOWN = {
    "patch_size", "text_len", "in_dim", "dim", "ffn_dim", "freq_dim", "text_dim", "num_heads",
    "num_layers", "local_attn_size", "sink_size", "qk_norm", "cross_attn_norm",
    "num_frame_per_block", "independent_first_frame", "out_dim",
}  # fmt: skip
# one value alone is right
_FIXED = {"model_type": "t2v", "eps": 1e-6, "window_size": [-1, -1]}


def config_from_official(config: Mapping[str, Any], *, parity: bool = False) -> dict[str, Any]:
    """Translate the official settings into CausalVideo's.

    Args:
        config: of ``CausalWanModel``, with ``num_frame_per_block`` and
            ``independent_first_frame``, which its trainer sets; missing ones have the official
            defaults.
        parity: number frames by their place in the video however long it is, as the official
            program does.

    Returns:
        Keyword arguments of :class:`~genscale.backbones.causal_video.CausalVideo`.

    Raises:
        ConfigError: a setting is unknown, or of a value that CausalVideo cannot have.
    """
    unknown = sorted(set(config) - _KNOWN - set(_FIXED))
    if unknown:
        raise ConfigError(
            f"The official settings hold {unknown}, which CausalVideo does not know; known are "
            f"{sorted(_KNOWN)}. Remove them if they change nothing."
        )
    for name, value in _FIXED.items():
        given = config.get(name, value)
        if (list(given) if isinstance(given, tuple) else given) != value:
            raise ConfigError(
                f"The official setting {name} must be {value}, but is {given}. CausalVideo has no "
                "such variant."
            )
    patch, channels = list(config.get("patch_size", (1, 2, 2))), config.get("in_dim", 16)
    if patch[0] != 1 or patch[1] != patch[2] or config.get("out_dim", channels) != channels:
        raise ConfigError(
            f"CausalVideo has square patches of one frame and as many channels out as in, but the "
            f"official settings have patch_size={patch}, in_dim={channels} and "
            f"out_dim={config.get('out_dim', channels)}."
        )
    window = config.get("local_attn_size", -1)
    block_size = config.get("num_frame_per_block", 1)
    first = bool(config.get("independent_first_frame", False))
    return {
        "input_size": [_frames(block_size, first), *_PUBLISHED_FRAMES[1:]],
        "in_channels": channels,
        "patch_size": patch[1],
        "hidden_size": config.get("dim", 2048),
        "depth": config.get("num_layers", 32),
        "num_heads": config.get("num_heads", 16),
        "mlp_size": config.get("ffn_dim", 8192),
        "frequency_size": config.get("freq_dim", 256),
        "text_size": config.get("text_dim", 4096),
        "num_text_tokens": config.get("text_len", 512),
        "attend_padding": True,
        "qk_norm": bool(config.get("qk_norm", True)),
        "text_norm": bool(config.get("cross_attn_norm", True)),
        "block_size": block_size,
        "independent_first_frame": first,
        "window": max(window, 0),
        "sink": config.get("sink_size", 0) if window > 0 else 0,
        "cache": "rolling" if window > 0 else "full",
        "positions": "absolute" if parity else "auto",
    }


def config_from_state_dict(
    state: Mapping[str, Tensor], *, num_heads: int | None = None, input_size: int | None = None
) -> dict[str, Any]:
    """Read CausalVideo's settings off an official state dict, as far as shapes tell them.

    Args:
        state: official keys, wrappers' prefixes included; tensors may be on the meta device.
        num_heads: attention heads, which no shape tells; default: of 128 channels each.
        input_size: side of the trained latents; default: those of 81 frames of 480 x 832 pixels.

    Returns:
        Keyword arguments of :class:`~genscale.backbones.causal_video.CausalVideo`; blocks have
        the published 3 frames.

    Raises:
        CheckpointError: the state dict is none of Wan.
    """
    state = plain_names(state)
    needed = ("patch_embedding.weight", "text_embedding.0.weight", "time_embedding.0.weight")
    missing = [name for name in (*needed, "head.modulation") if name not in state]
    if missing:
        raise CheckpointError(
            f"This is no state dict of a causal Wan: '{missing[0]}' is missing, the first key is "
            f"'{next(iter(state), 'none')}'. Give the weights below 'generator_ema' or 'generator' "
            "of a training file."
        )
    patch, text, time = (state[name] for name in needed)
    width = len(patch)
    frames, height, breadth = _PUBLISHED_FRAMES
    sides = [input_size or height, input_size or breadth]
    return {
        "input_size": [frames, *sides],
        "in_channels": patch.shape[1],
        "patch_size": patch.shape[-1],
        "hidden_size": width,
        "depth": count_children(state, "blocks"),
        "num_heads": num_heads or max(1, width // 128),
        "mlp_size": len(state["blocks.0.ffn.0.bias"]),
        "frequency_size": time.shape[1],
        "text_size": text.shape[1],
        "attend_padding": True,
        "qk_norm": "blocks.0.self_attn.norm_q.weight" in state,
        "text_norm": "blocks.0.norm3.weight" in state,
    }


def plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove from names what wrappers put into them.

    Raises:
        CheckpointError: two names become one.
    """
    result: dict[str, Tensor] = {}
    for given, tensor in state.items():
        name = given
        for word in WRAPPERS:
            name = name.replace(word, "")
        name = name.removeprefix("model.")
        if name in result:
            raise CheckpointError(
                f"'{given}' and another key both become '{name}' without the names of wrappers. "
                "Give the weights of one network."
            )
        result[name] = tensor
    return result


def from_official(state: Mapping[str, Tensor], model: CausalVideo) -> dict[str, Tensor]:
    """Turn an official state dict into one that ``model.load_state_dict`` takes strictly.

    Args:
        state: official keys, wrappers' prefixes included.
        model: the model to load into; it may be on the meta device.

    Returns:
        Our keys, in the types and on the device of ``state``.

    Raises:
        CheckpointError: keys are missing or left over, or shapes differ.
        ConfigError: the model has parts that the layout cannot hold.
    """
    state = plain_names(state)
    read = partial(_told_by_shapes, state)
    advice = partial(settings_sentence, read, model.config, family="CausalVideo")
    return _read(state, model, "official", owner="CausalVideo", advice=advice)


def to_official(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Turn our state dict (or gradients by our names) into the official layout.

    Args:
        state: our keys.
        config: the model's settings, ``model.config`` or the constructor's arguments.

    Returns:
        Official keys, without prefixes; the exact inverse of :func:`from_official`.

    Raises:
        CheckpointError: keys are missing or left over.
        ConfigError: the model has parts that the layout cannot hold.
    """
    return _write(state, config, "official")


def config_from_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the settings of diffusers' ``WanTransformer3DModel`` into CausalVideo's.

    Raises:
        ConfigError: settings that CausalVideo cannot have.
    """
    heads = config["num_attention_heads"]
    if config.get("image_dim") is not None or config.get("added_kv_proj_dim") is not None:
        raise ConfigError(
            f"CausalVideo reads no pictures, but the file has image_dim={config.get('image_dim')}. "
            "Give a text-to-video model."
        )
    found = config_from_official(
        {
            "patch_size": config["patch_size"],
            "in_dim": config["in_channels"],
            "out_dim": config["out_channels"],
            "dim": heads * config["attention_head_dim"],
            "ffn_dim": config["ffn_dim"],
            "freq_dim": config["freq_dim"],
            "text_dim": config["text_dim"],
            "num_heads": heads,
            "num_layers": config["num_layers"],
            "cross_attn_norm": config["cross_attn_norm"],
            "qk_norm": config["qk_norm"] is not None,
            "eps": config["eps"],
        }
    )
    # of no causal model: what is published attends to all frames at once
    return {**found, "block_size": _PUBLISHED_FRAMES[0]}


def diffusers_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the constructor arguments of diffusers' ``WanTransformer3DModel`` for our settings.

    Raises:
        ConfigError: the model has parts that its layout cannot hold.
    """
    settings = _publishable(on_meta(CausalVideo, config)).config
    return {
        "patch_size": (1, settings["patch_size"], settings["patch_size"]),
        "num_attention_heads": settings["num_heads"],
        "attention_head_dim": settings["hidden_size"] // settings["num_heads"],
        "in_channels": settings["in_channels"],
        "out_channels": settings["in_channels"],
        "text_dim": settings["text_size"],
        "freq_dim": settings["frequency_size"],
        "ffn_dim": settings["mlp_size"],
        "num_layers": settings["depth"],
        "cross_attn_norm": settings["text_norm"],
        "qk_norm": "rms_norm_across_heads" if settings["qk_norm"] else None,
    }


def from_diffusers(state: Mapping[str, Tensor], model: CausalVideo) -> dict[str, Tensor]:
    """Turn a state dict of diffusers' ``WanTransformer3DModel`` into ours.

    Raises:
        CheckpointError: keys are missing or left over, or shapes differ.
        ConfigError: the model has parts that the layout cannot hold.
    """
    advice = "Build the model from config_from_diffusers(config), the file's own config."
    return _read(state, model, "diffusers", owner="diffusers' Wan", advice=advice)


def to_diffusers(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Turn our state dict into that of diffusers' ``WanTransformer3DModel``.

    Raises:
        CheckpointError: keys are missing or left over.
        ConfigError: the model has parts that the layout cannot hold.
    """
    return _write(state, config, "diffusers")


def _told_by_shapes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    found = config_from_state_dict(state)
    return {name: value for name, value in found.items() if name not in _UNTOLD}


def _read(
    state: Mapping[str, Tensor], model: CausalVideo, layout: str, *, owner: str, advice: Any
) -> dict[str, Tensor]:
    own = _publishable(model).state_dict()
    pieces = {name: _pieces(name, tensor, layout) for name, tensor in own.items()}
    wanted = {theirs: shape for parts in pieces.values() for theirs, shape in parts}
    check_keys(state, wanted, owner=owner, advice=advice)
    check_shapes(state, wanted, owner=owner, advice=advice)
    return {
        name: torch.cat([state[theirs] for theirs, _ in parts]).reshape(own[name].shape)
        for name, parts in pieces.items()
    }


def _write(
    state: Mapping[str, Tensor], config: Mapping[str, Any], layout: str
) -> dict[str, Tensor]:
    model = _publishable(on_meta(CausalVideo, config))
    check_keys(state, shapes_of(model.state_dict()), owner="CausalVideo", advice=_OWN)
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        parts = _pieces(name, tensor, layout)
        for (theirs, shape), value in zip(parts, tensor.chunk(len(parts)), strict=True):
            result[theirs] = value.reshape(shape).clone()
    return result


def _pieces(name: str, tensor: Tensor, layout: str) -> list[tuple[str, tuple[int, ...]]]:
    """Return the keys and shapes that one of our tensors has in a layout."""
    whole, in_blocks = _LAYOUTS[layout]
    prefix, inside, table = "", name, whole
    if name.startswith("blocks."):
        _, number, inside = name.split(".", 2)
        prefix, table = f"blocks.{number}.", in_blocks
    theirs: tuple[str, ...] = (inside,)  # where they are called alike
    for ours, others in table:
        if inside == ours or inside.startswith(ours + "."):
            theirs = tuple(other + inside[len(ours) :] for other in others)
            break
    shape = tuple(tensor.shape)
    if name.rpartition(".")[2] == "modulation":  # a learned vector for each, behind a batch axis
        shape = (1, *shape)
    elif name == "patch.weight":  # one frame deep
        shape = (*shape[:2], 1, *shape[2:])
    else:
        shape = (shape[0] // len(theirs), *shape[1:])
    return [(prefix + key, shape) for key in theirs]


def _publishable(model: CausalVideo) -> CausalVideo:
    if model.config["num_classes"] or not model.config["text_size"]:
        raise ConfigError(
            "Wan's layout has text and no classes, but this model has num_classes="
            f"{model.config['num_classes']} and text_size={model.config['text_size']}. "
            "Save it with save_pretrained."
        )
    return model


def _frames(block_size: int, short_first: bool) -> int:
    """Return a number of frames near the published one that is whole blocks."""
    rest = max(1, (_PUBLISHED_FRAMES[0] - short_first) // block_size)
    return int(short_first) + rest * block_size
