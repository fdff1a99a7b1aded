"""DiT and SiT checkpoints: official keys, or those of diffusers, <-> ours, losslessly both ways.

Reads the bare (EMA) state dicts that the official programs publish and writes files they can
load; the layout of both is the same. Nothing is transposed. The position table of the official
files is no weight: it is checked on load and rebuilt on save.

diffusers' ``DiTTransformer2DModel`` keeps a copy of the time and class embedders in every block
and splits queries, keys and values. Its numbers differ from the official ones in two places,
which no weight can mend: its time sinusoid divides by 127 where the paper's divides by 128, and
its second norm of a block has eps 1e-5 in place of 1e-6 (diffusers 0.35 to 0.42). Outputs agree
exactly once both are set.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from genscale.backbones.dit import DiT
from genscale.conditioning.text import reads_text
from genscale.errors import CheckpointError, ConfigError
from genscale.io.keys import (
    check_keys,
    check_shapes,
    count_children,
    on_meta,
    settings_sentence,
    shapes_of,
)
from genscale.layers.embed import grid_places, sincos_positions

BACKBONE = DiT

# (ours, official), whole names of modules; blocks are numbered alike
_MODULES = (
    ("patch", "x_embedder.proj"),
    ("time_embed.linear_1", "t_embedder.mlp.0"),
    ("time_embed.linear_2", "t_embedder.mlp.2"),
    ("class_table", "y_embedder.embedding_table"),
    ("head_modulation", "final_layer.adaLN_modulation.1"),
    ("head", "final_layer.linear"),
)
_IN_BLOCKS = (
    ("attention.qkv", "attn.qkv"),
    ("attention.out", "attn.proj"),
    ("mlp.up", "mlp.fc1"),
    ("mlp.down", "mlp.fc2"),
    ("modulation", "adaLN_modulation.1"),
)
_POSITIONS = "pos_embed"
_OWN = "Give the state dict of a model with this config."
_MODEL_KEYS = {
    "input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "mlp_ratio",
    "class_dropout_prob", "num_classes", "learn_sigma",
}  # fmt: skip


def config_from_official(config: Mapping[str, Any], *, parity: bool = False) -> dict[str, Any]:
    """Translate the official constructor's settings, of DiT or SiT, into DiT's.

    Args:
        config: the official model settings; ``num_classes`` does not count the null class.
            Missing ones have the official defaults, those of XL/2.
        parity: number positions on larger grids onwards, as the official table does.

    Returns:
        Keyword arguments of :class:`~genscale.backbones.dit.DiT`.

    Raises:
        ConfigError: a setting is unknown.
    """
    unknown = sorted(set(config) - _MODEL_KEYS)
    if unknown:
        raise ConfigError(
            f"The official settings hold {unknown}, which DiT does not know; known are "
            f"{sorted(_MODEL_KEYS)}. Remove them if they change nothing."
        )
    # without drop-out of classes the official table has no null row: the last class doubles as it
    null_row = config.get("class_dropout_prob", 0.1) > 0
    return {
        "input_size": config.get("input_size", 32),
        "in_channels": config.get("in_channels", 4),
        "num_classes": config.get("num_classes", 1000) - (0 if null_row else 1),
        "patch_size": config.get("patch_size", 2),
        "hidden_size": config.get("hidden_size", 1152),
        "depth": config.get("depth", 28),
        "num_heads": config.get("num_heads", 16),
        "mlp_ratio": float(config.get("mlp_ratio", 4.0)),
        "learn_sigma": bool(config.get("learn_sigma", True)),
        "position_resize": "extend" if parity else "interpolate",
    }


def config_from_state_dict(
    state: Mapping[str, Tensor], *, num_heads: int | None = None, input_size: int | None = None
) -> dict[str, Any]:
    """Read DiT's settings off an official state dict, as far as shapes tell them.

    Args:
        state: official keys; tensors may be on the meta device.
        num_heads: attention heads, which no shape tells; default: as in the published models,
            64 channels a head, or 16 heads where the width is 1152.
        input_size: side of the trained input; default: what the position table tells.

    Returns:
        Keyword arguments of :class:`~genscale.backbones.dit.DiT`, for square inputs.

    Raises:
        CheckpointError: the state dict is none of DiT or SiT.
    """
    needed = ("x_embedder.proj.weight", "final_layer.linear.weight", _POSITIONS)
    missing = [name for name in needed if name not in state]
    if missing:
        raise CheckpointError(
            f"This is no official DiT or SiT state dict: '{missing[0]}' is missing, the first key "
            f"is '{next(iter(state), 'none')}'. Give the bare state dict, for example that below "
            "the key 'ema' of a training file."
        )
    patch, labels = state[needed[0]], state.get("y_embedder.embedding_table.weight")
    width, channels, side = patch.shape[:3]
    return {
        "input_size": input_size or math.isqrt(state[_POSITIONS].shape[1]) * side,
        "in_channels": channels,
        "num_classes": 0 if labels is None else len(labels) - 1,
        "patch_size": side,
        "hidden_size": width,
        "depth": count_children(state, "blocks"),
        "num_heads": num_heads or (16 if width == 1152 else max(1, width // 64)),
        "mlp_ratio": len(state["blocks.0.mlp.fc1.bias"]) / width,
        "learn_sigma": len(state[needed[1]]) == 2 * channels * side**2,
    }


def from_official(state: Mapping[str, Tensor], model: DiT) -> dict[str, Tensor]:
    """Turn an official state dict into one that ``model.load_state_dict`` takes strictly.

    Args:
        state: official keys.
        model: the model to load into; it may be on the meta device.

    Returns:
        Our keys, in the types and on the device of ``state``.

    Raises:
        CheckpointError: keys are missing or left over, shapes differ, or the position table is
            not the fixed one.
    """
    _check_published(model)
    names = {_official_name(name): name for name in model.state_dict()}
    own = {official: model.state_dict()[name] for official, name in names.items()}
    table = position_table(model.config)
    shapes = shapes_of({**own, _POSITIONS: table})
    read = partial(config_from_state_dict, state)
    advice = partial(settings_sentence, read, model.config, family="DiT")
    check_keys(state, shapes, owner="DiT", advice=advice)
    check_shapes(state, shapes, owner="DiT", advice=advice)
    _check_positions(state[_POSITIONS], table)
    return {name: state[official].clone() for official, name in names.items()}


def to_official(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Turn our state dict (or gradients by our names) into the official layout.

    Args:
        state: our keys.
        config: the model's settings, ``model.config`` or the constructor's arguments.

    Returns:
        Official keys, the position table included; the exact inverse of :func:`from_official`.

    Raises:
        CheckpointError: keys are missing or left over.
    """
    model = _on_meta(config)
    check_keys(state, model.state_dict(), owner="DiT", advice=_OWN)
    reference = next(iter(state.values()))
    official = {_official_name(name): tensor.clone() for name, tensor in state.items()}
    return {**official, _POSITIONS: position_table(model.config).to(reference)}


def diffusers_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the constructor arguments of diffusers' ``DiTTransformer2DModel`` for our settings.

    Raises:
        ConfigError: settings that its layout cannot hold.
    """
    model = _on_meta(config)
    settings = model.config
    square = model.grid[0] == model.grid[1]
    if not settings["num_classes"] or settings["mlp_ratio"] != 4 or not square:
        raise ConfigError(
            "diffusers' DiT has square inputs, classes and an mlp_ratio of 4, but this model has "
            f"input_size={settings['input_size']}, num_classes={settings['num_classes']} and "
            f"mlp_ratio={settings['mlp_ratio']}. Save it in the official layout instead."
        )
    channels, size = settings["in_channels"], settings["input_size"]
    return {
        "num_attention_heads": settings["num_heads"],
        "attention_head_dim": settings["hidden_size"] // settings["num_heads"],
        "in_channels": channels,
        "out_channels": channels * (2 if settings["learn_sigma"] else 1),
        "num_layers": settings["depth"],
        "sample_size": size if isinstance(size, int) else size[0],
        "patch_size": settings["patch_size"],
        "num_embeds_ada_norm": settings["num_classes"],
    }


def config_from_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the settings of diffusers' ``DiTTransformer2DModel`` into DiT's."""
    heads = config["num_attention_heads"]
    return {
        "input_size": config["sample_size"],
        "in_channels": config["in_channels"],
        "num_classes": config["num_embeds_ada_norm"],
        "patch_size": config["patch_size"],
        "hidden_size": heads * config["attention_head_dim"],
        "depth": config["num_layers"],
        "num_heads": heads,
        "learn_sigma": config["out_channels"] == 2 * config["in_channels"],
    }


def from_diffusers(state: Mapping[str, Tensor], model: DiT) -> dict[str, Tensor]:
    """Turn a state dict of diffusers' ``DiTTransformer2DModel`` into ours.

    Args:
        state: diffusers' keys. Its position table, which is no weight, may be left out.
        model: the model to load into; it may be on the meta device.

    Returns:
        Our keys, in the types and on the device of ``state``.

    Raises:
        CheckpointError: keys are missing or left over, shapes differ, or the blocks' copies of
            an embedder are not the same.
    """
    _check_published(model)
    own = model.state_dict()
    pieces = {name: list(_diffusers_pieces(name, tensor, model)) for name, tensor in own.items()}
    wanted = {theirs: shape for parts in pieces.values() for theirs, shape in parts}
    given = {name: tensor for name, tensor in state.items() if name != "pos_embed.pos_embed"}
    advice = "Build the model from config_from_diffusers(config), the file's own config."
    check_keys(given, wanted, owner="diffusers' DiT", advice=advice)
    check_shapes(given, wanted, owner="diffusers' DiT", advice=advice)
    result: dict[str, Tensor] = {}
    for name, parts in pieces.items():
        tensors = [given[theirs] for theirs, _ in parts]
        if ".attention.qkv." in name:
            result[name] = torch.cat(tensors)
            continue
        for (theirs, _), tensor in zip(parts, tensors, strict=True):
            if not tensor.is_meta and not torch.equal(tensor, tensors[0]):
                raise CheckpointError(
                    f"'{theirs}' differs from '{parts[0][0]}', but all blocks of a DiT share one "
                    "embedder. The file was trained with embedders of their own, which DiT lacks."
                )
        result[name] = tensors[0].clone()
    return result


def to_diffusers(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Turn our state dict into that of diffusers' ``DiTTransformer2DModel``.

    Build it from :func:`diffusers_config`; see the module about its two differences.

    Raises:
        CheckpointError: keys are missing or left over.
        ConfigError: settings that its layout cannot hold.
    """
    diffusers_config(config)
    model = _on_meta(config)
    check_keys(state, model.state_dict(), owner="DiT", advice=_OWN)
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        parts = list(_diffusers_pieces(name, tensor, model))
        split = ".attention.qkv." in name
        values = tensor.chunk(3) if split else [tensor] * len(parts)
        for (theirs, _), value in zip(parts, values, strict=True):
            result[theirs] = value.clone()
    return result


def position_table(config: Mapping[str, Any]) -> Tensor:
    """Return the official position table ``(1, N, D)`` float32 of a model's trained grid."""
    model = _on_meta(config)
    rows, columns = (
        grid_places(count, count, "extend", torch.device("cpu")) for count in model.grid
    )
    return sincos_positions(rows, columns, model.config["hidden_size"]).flatten(0, 1)[None]


def _official_name(name: str) -> str:
    """Return the official key of ours; blocks keep their number."""
    for ours, official in _MODULES:
        if name.startswith(ours + "."):
            return official + name[len(ours) :]
    for ours, official in _IN_BLOCKS:
        renamed, changes = re.subn(
            rf"^(blocks\.\d+\.){re.escape(ours)}(?=\.)", rf"\g<1>{official}", name
        )
        if changes:
            return renamed
    return name


def _diffusers_pieces(
    name: str, tensor: Tensor, model: DiT
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield diffusers' keys of one of our tensors, with the shape of each."""
    shape = tuple(tensor.shape)
    module, leaf = name.rsplit(".", 1)
    shared = {
        "time_embed.linear_1": "timestep_embedder.linear_1",
        "time_embed.linear_2": "timestep_embedder.linear_2",
        "class_table": "class_embedder.embedding_table",
    }
    whole = {"patch": "pos_embed.proj", "head_modulation": "proj_out_1", "head": "proj_out_2"}
    inside = {
        "attention.out": "attn1.to_out.0",
        "mlp.up": "ff.net.0.proj",
        "mlp.down": "ff.net.2",
        "modulation": "norm1.linear",
    }
    if module in shared:
        for i in range(model.config["depth"]):
            yield f"transformer_blocks.{i}.norm1.emb.{shared[module]}.{leaf}", shape
    elif module in whole:
        yield f"{whole[module]}.{leaf}", shape
    else:
        _, number, part = module.split(".", 2)
        prefix = f"transformer_blocks.{number}."
        if part == "attention.qkv":
            for which in "qkv":
                yield f"{prefix}attn1.to_{which}.{leaf}", (shape[0] // 3, *shape[1:])
        else:
            yield f"{prefix}{inside[part]}.{leaf}", shape


def _on_meta(config: Mapping[str, Any]) -> DiT:
    model: DiT = on_meta(DiT, config)
    _check_published(model)
    return model


def _check_published(model: DiT) -> None:
    if model.config["attention"] != "softmax":
        raise ConfigError(
            "The official layout holds softmax attention only, but the model has attention="
            f"{model.config['attention']}. Save it with save_pretrained instead."
        )
    if reads_text(model.config):
        raise ConfigError(
            "The published layouts know no text, but the model has text_size="
            f"{model.config['text_size']} and pooled_text_size="
            f"{model.config['pooled_text_size']}. Save it with save_pretrained instead."
        )


def _check_positions(given: Tensor, table: Tensor) -> None:
    """Refuse tables that were trained; the tolerance is that of half precision."""
    if given.is_meta:
        return
    difference = (given.detach().float().cpu() - table).abs().max().item()
    if not difference < 1e-2:
        raise CheckpointError(
            f"The position table '{_POSITIONS}' is up to {difference:.3g} away from the fixed "
            "sines and cosines of DiT. Such a trained table cannot be loaded."
        )
