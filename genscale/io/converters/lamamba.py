"""LaMamba-Diff checkpoints: official keys <-> ours, losslessly both ways.

The official program publishes no weights; this reads the state dicts that it writes (``model`` or
``ema`` of its checkpoint files) and gives back ones that it can load. Names differ, the position
table has another shape, and the official file also holds attention masks and indices, which follow
from the settings: they are left out on load, and the official program loads without them when it
is not strict.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from genscale.backbones.lamamba import LaMamba
from genscale.errors import CheckpointError, ConfigError
from genscale.io.keys import (
    check_keys,
    check_shapes,
    count_children,
    on_meta,
    refuse_scaled_skips,
    settings_sentence,
)

BACKBONE = LaMamba

# (pattern of our key, official key); the first that matches is applied, then the block's table
_OUTER = (
    (r"patch\.", "patch_embed.proj."),
    (r"embed_norm\.", "patch_embed.norm."),
    (r"position\.table", "pos_embed"),
    (r"time\.linear_1\.", "t_embedder.mlp.0."),
    (r"time\.linear_2\.", "t_embedder.mlp.2."),
    (r"class_table\.", "y_embedder.embedding_table."),
    (r"encoder\.(\d+)\.", r"layers.\1."),
    (r"downsamples\.(\d+)\.norm\.", r"layers.\1.downsample.norm."),
    (r"downsamples\.(\d+)\.reduce\.", r"layers.\1.downsample.reduction."),
    (r"middle\.", "mid_layer."),
    (r"upsamples\.0\.", "layers_up.2.upsample."),
    (r"upsamples\.1\.", "layers_up.3.upsample."),
    (r"decoder\.(\d+)\.", r"layers_up.\1."),
    (r"head_up\.", "final_up."),
    (r"head_condition\.", "final_condition_projection."),
    (r"head_modulation\.", "final_adaLN_modulation.1."),
    (r"head\.", "final_linear."),
)
# a strided convolution stands in a plain sequence: permute, convolution, permute, norm
_STRIDED = (
    (r"downsamples\.(\d+)\.conv\.", r"layers.\1.downsample.1."),
    (r"downsamples\.(\d+)\.norm\.", r"layers.\1.downsample.3."),
)
_BLOCK = {
    "condition": "condition_projection",
    "modulation": "adaLN_modulation.1",
    "scan_norm": "norm",
    "scan.in_proj": "op.in_proj",
    "scan.conv": "op.conv2d",
    "scan.select": "op.x_proj_weight",
    "scan.step_weight": "op.dt_projs_weight",
    "scan.step_bias": "op.dt_projs_bias",
    "scan.log_rate": "op.A_logs",
    "scan.skip": "op.Ds",
    "scan.out_norm": "op.out_norm",
    "scan.out_proj": "op.out_proj",
    "attention_norm": "norm_swin",
    "attention.qkv": "attn.qkv",
    "attention.out": "attn.proj",
    "attention.bias_table": "attn.relative_position_bias_table",
    "mlp_norm": "norm2",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}
_DERIVED = re.compile(r".*\.(attn_mask|attn\.relative_position_index)")
_DOWNSAMPLES = {"v1": "merge", "v2": "conv2", "v3": "conv3"}
_FIXED = {"skip_concat": False, "forward_type": "v2", "norm_layer": "ln"}
_IGNORED = {"drop_path_rate"}  # accepted by the official constructor, and never applied
_KNOWN = {
    "patch_size", "in_chans", "num_classes", "depths", "bottleneck_depth", "dims", "unconditional",
    "sd_unet_decoder_design", "in_resolution", "num_heads", "window_size", "continuous_scan",
    "ssm_d_state", "ssm_ratio", "ssm_dt_rank", "ssm_conv", "ssm_conv_bias", "mlp_ratio",
    "patch_norm", "downsample_version", *_FIXED, *_IGNORED,
}  # fmt: skip


def config_from_official(config: Mapping[str, Any], *, parity: bool = False) -> dict[str, Any]:
    """Translate the official constructor's settings into LaMamba's.

    Args:
        config: ``dims``, ``depths``, ``in_resolution`` (the grid, not the input), ...
        parity: changes nothing: the official program takes inputs of the trained size only.

    Returns:
        Keyword arguments of :class:`~genscale.backbones.lamamba.LaMamba`.

    Raises:
        ConfigError: a setting is unknown or has no counterpart.
    """
    unknown = sorted(set(config) - _KNOWN)
    if unknown:
        raise ConfigError(
            f"The official settings hold {unknown}, which LaMamba does not know; known are "
            f"{sorted(_KNOWN)}. Remove them if they change nothing."
        )
    for name, value in _FIXED.items():
        if config.get(name, value) != value:
            raise ConfigError(
                f"The official setting {name}={config[name]!r} has no counterpart in LaMamba, "
                f"which knows {value!r} only. Such a model cannot be converted."
            )
    version = config.get("downsample_version", "v1")
    if version not in _DOWNSAMPLES:
        raise ConfigError(
            f"The official downsample_version must be one of {', '.join(_DOWNSAMPLES)}, but is "
            f"{version!r}. Check the official settings."
        )
    depths = list(config["depths"])
    decoder = depths[::-1]
    if config.get("sd_unet_decoder_design", True):
        # the coarsest stage alone stays empty when it is
        decoder = [depth + 1 if depth or i else 0 for i, depth in enumerate(decoder)]
    rank = config.get("ssm_dt_rank", "auto")
    return {
        "input_size": config["in_resolution"] * config["patch_size"],
        "in_channels": config["in_chans"],
        "num_classes": 0 if config.get("unconditional", False) else config["num_classes"],
        "patch_size": config["patch_size"],
        "hidden_sizes": list(config["dims"]),
        "depths": depths,
        "bottleneck_depth": config["bottleneck_depth"],
        "decoder_depths": decoder,
        "num_heads": list(config["num_heads"]),
        "window_size": config["window_size"],
        "scan": "continuous" if config["continuous_scan"] else "cross",
        "state_size": config["ssm_d_state"],
        "expansion": config["ssm_ratio"],
        "step_rank": None if rank == "auto" else rank,
        "kernel_size": config["ssm_conv"],
        "conv_bias": config["ssm_conv_bias"],
        "mlp_ratio": config["mlp_ratio"],
        "downsample": _DOWNSAMPLES[version],
        "patch_norm": config.get("patch_norm", True),
        "learn_sigma": True,
    }


def config_from_state_dict(
    state: Mapping[str, Tensor], *, num_heads: int | None = None, input_size: int | None = None
) -> dict[str, Any]:
    """Read LaMamba's settings off an official state dict, as far as shapes tell them.

    Args:
        state: official keys; tensors may be on the meta device.
        num_heads: heads of stages without blocks; those of the others are told by their tables.
        input_size: side of the trained input; default: what the position table tells.

    Returns:
        Keyword arguments of :class:`~genscale.backbones.lamamba.LaMamba`, for the continuous
        scan: the order of the scan leaves no trace.

    Raises:
        CheckpointError: the state dict is none of LaMamba.
    """
    needed = ("patch_embed.proj.weight", "pos_embed", "final_linear.weight")
    missing = [name for name in needed if name not in state]
    lists = ["layers.0", "layers.1", "layers.2", "layers.3", "mid_layer"]
    lists += [f"layers_up.{i}" for i in range(4)]
    depths = [count_children(state, f"{name}.blocks") for name in lists]
    if missing or not any(depths):
        raise CheckpointError(
            f"This is no official LaMamba state dict: '{(missing or ['layers.0.blocks.0'])[0]}' is "
            f"missing, the first key is '{next(iter(state), 'none')}'. Give the bare state dict, "
            "for example that below the key 'ema' of a training file."
        )
    width, channels, patch = state[needed[0]].shape[:3]
    first = f"{next(name for name, depth in zip(lists, depths, strict=True) if depth)}.blocks.0."
    block = {name.removeprefix(first): t for name, t in state.items() if name.startswith(first)}
    convolution = state.get("layers.0.downsample.1.weight")
    heads, window_size = _read_attention(state, lists, num_heads)
    return {
        "input_size": input_size or state["pos_embed"].shape[1] * patch,
        "in_channels": channels,
        "num_classes": len(state["y_embedder.embedding_table.weight"]) - 1,
        "patch_size": patch,
        "hidden_sizes": [width, 2 * width, 4 * width, 4 * width],
        "depths": depths[:4],
        "bottleneck_depth": depths[4],
        "decoder_depths": depths[5:],
        "num_heads": heads,
        **_read_scan(block),
        "conv_bias": "op.conv2d.bias" in block,
        "mlp_ratio": len(block["mlp.fc1.weight"]) / block["mlp.fc1.weight"].shape[1],
        "downsample": "merge" if convolution is None else f"conv{convolution.shape[-1]}",
        "patch_norm": "patch_embed.norm.weight" in state,
        "learn_sigma": len(state[needed[2]]) == 2 * channels,
        "window_size": window_size,
    }


def _read_attention(
    state: Mapping[str, Tensor], lists: list[str], num_heads: int | None
) -> tuple[list[int], int]:
    """Read heads of every level, and the window of the largest grid, off the bias tables."""
    names = {name: f"{name}.blocks.0.{_BLOCK['attention.bias_table']}" for name in lists}
    tables = {name: state[key] for name, key in names.items() if key in state}
    # on one level: an encoder stage, the decoder stage that mirrors it, and the middle
    levels = [[f"layers.{i}", f"layers_up.{3 - i}"] for i in range(4)]
    levels[3].append("mid_layer")
    found = [[tables[name].shape[1] for name in level if name in tables] for level in levels]
    other = num_heads or next(heads[0] for heads in found if heads)
    windows = [(math.isqrt(len(table)) + 1) // 2 for table in tables.values()]
    return [heads[0] if heads else other for heads in found], max(windows)


def _read_scan(block: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the settings of the scan off the parameters of one block."""
    inner, width = block["op.in_proj.weight"].shape
    rank = block["op.dt_projs_weight"].shape[2]
    return {
        "state_size": block["op.A_logs"].shape[1],
        "expansion": inner / 2 / width,
        "step_rank": None if rank == math.ceil(width / 16) else rank,
        "kernel_size": block["op.conv2d.weight"].shape[-1],
    }


def official_name(name: str, *, strided: bool = False) -> str:
    """Return the official name of one of our tensors.

    Args:
        name: our key.
        strided: whether the model downsamples by strided convolutions.
    """
    if match := re.fullmatch(r"(.*\.blocks\.\d+\.)(.+?)(\.weight|\.bias)?", name):
        prefix, inner, kind = match.groups()
        name = prefix + _BLOCK[inner] + (kind or "")
    for ours, official in (*(_STRIDED if strided else ()), *_OUTER):
        renamed, changes = re.subn(rf"\A{ours}", official, name)
        if changes:
            return renamed
    raise CheckpointError(
        f"'{name}' has no counterpart in the official program. Give the state dict of a LaMamba."
    )


def _names(model: LaMamba) -> dict[str, str]:
    """Return the official name of every tensor of a model."""
    if model.config["modulation_rank"] is not None:
        raise CheckpointError(
            f"The model has modulation_rank={model.config['modulation_rank']}, which the official "
            "program does not know. Build it with modulation_rank=null."
        )
    refuse_scaled_skips(model.config, family="LaMamba")
    strided = model.config["downsample"] != "merge"
    return {name: official_name(name, strided=strided) for name in model.state_dict()}


def from_official(state: Mapping[str, Tensor], model: LaMamba) -> dict[str, Tensor]:
    """Turn an official state dict into one that ``model.load_state_dict`` takes strictly.

    Args:
        state: official keys; attention masks and indices are left out.
        model: the model to load into; it may be on the meta device.

    Returns:
        Our keys, in the types and on the device of ``state``.

    Raises:
        CheckpointError: keys are missing or left over, or shapes differ.
    """
    names, own = _names(model), model.state_dict()
    read = partial(config_from_state_dict, state)
    advice = partial(settings_sentence, read, model.config, family="LaMamba")
    check_keys(state, names.values(), owner="LaMamba", advice=advice, ignored=_DERIVED)
    shapes = {official: tuple(own[name].shape) for name, official in names.items()}
    shapes["pos_embed"] = (1, *_grid(model), shapes["pos_embed"][-1])
    check_shapes(state, shapes, owner="LaMamba", advice=advice)
    return {
        name: state[official].reshape(own[name].shape).clone() for name, official in names.items()
    }


def to_official(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Turn our state dict (or gradients by our names) into the official layout.

    Args:
        state: our keys.
        config: the model's settings, ``model.config`` or the constructor's arguments.

    Returns:
        Official keys without masks and indices; the inverse of :func:`from_official`.

    Raises:
        CheckpointError: keys are missing or left over.
    """
    model: LaMamba = on_meta(LaMamba, config)
    names = _names(model)
    advice = "Give the state dict of a model with this config."
    check_keys(state, names, owner="LaMamba", advice=advice)
    result = {official: state[name].clone() for name, official in names.items()}
    result["pos_embed"] = result["pos_embed"].view(1, *_grid(model), -1)
    return result


def _grid(model: LaMamba) -> tuple[int, int]:
    return model.position.height, model.position.width
