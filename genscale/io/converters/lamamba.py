"""LaMamba-Diff checkpoints: official keys <-> ours, losslessly both ways.

The official program publishes no weights; this reads the state dicts that it writes (``model`` or
``ema`` of its checkpoint files) and gives back ones that it can load. Names differ, the position
table has another shape, and the official file also holds attention masks and indices, which follow
from the settings: they are left out on load, and the official program loads without them when it
is not strict.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from genscale.backbones.lamamba import LaMamba
from genscale.errors import CheckpointError, ConfigError

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


def config_from_official(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the official constructor's settings into LaMamba's.

    Args:
        config: ``dims``, ``depths``, ``in_resolution`` (the grid, not the input), ...

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
    names = _names(model)
    missing = [official for official in names.values() if official not in state]
    wanted = set(names.values())
    unexpected = [key for key in state if key not in wanted and not _DERIVED.fullmatch(key)]
    if missing or unexpected:
        raise CheckpointError(
            f"{len(missing)} missing, {len(unexpected)} unexpected keys for LaMamba (first: "
            f"{(missing + unexpected)[0]}). Build the model from the settings in the checkpoint, "
            "with config_from_official."
        )
    result: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        found = state[names[name]]
        if name == "position.table":
            found = found.flatten(0, -2)  # (1, H, W, D) there
        if found.shape != tensor.shape:
            raise CheckpointError(
                f"{names[name]} has shape {tuple(state[names[name]].shape)} but LaMamba's {name} "
                f"{tuple(tensor.shape)}. Build the model with the settings of the checkpoint."
            )
        result[name] = found.clone()
    return result


def to_official(state: Mapping[str, Tensor], model: LaMamba) -> dict[str, Tensor]:
    """Turn our state dict (or gradients by our names) into the official layout.

    Args:
        state: our keys.
        model: a model with the same settings; it may be on the meta device.

    Returns:
        Official keys without masks and indices; the inverse of :func:`from_official`.

    Raises:
        CheckpointError: keys are missing or left over.
    """
    names = _names(model)
    missing, unexpected = sorted(set(names) - set(state)), sorted(set(state) - set(names))
    if missing or unexpected:
        raise CheckpointError(
            f"{len(missing)} missing, {len(unexpected)} unexpected keys for LaMamba (first: "
            f"{(missing + unexpected)[0]}). Give the state dict of a model with these settings."
        )
    result = {official: state[name].clone() for name, official in names.items()}
    height, width = model.position.height, model.position.width
    result["pos_embed"] = result["pos_embed"].view(1, height, width, -1)
    return result
