"""SwinIR and LUA checkpoints: official keys <-> ours, losslessly both ways.

Both programs call the parts of the trunk alike, so one function reads both; only the heads
differ. Official files also hold tables that follow from the settings (indices of relative
positions, masks of one size), which are dropped on load and not written: the official programs
build their own, and load such a file with ``strict=False``.

The networks live in :mod:`genscale.upscaling`; here they are modules with a ``config``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from genscale.errors import CheckpointError, ConfigError
from genscale.io.keys import (
    check_keys,
    check_shapes,
    count_children,
    settings_sentence,
    shapes_of,
)

# (ours, official) of whole names, inside groups and blocks, and inside heads
_TRUNK = (
    (r"trunk\.stem\.", "conv_first."),
    (r"trunk\.stem_norm\.", "patch_embed.norm."),
    (r"trunk\.position_table", "absolute_pos_embed"),
    (r"trunk\.norm\.", "norm."),
    (r"trunk\.conv\.", "conv_after_body."),
    (r"trunk\.groups\.(\d+)\.conv\.", r"layers.\1.conv."),
    (r"trunk\.groups\.(\d+)\.blocks\.", r"layers.\1.residual_group.blocks."),
)
_IN_BLOCKS = (
    (r"\.norm_([12])\.", r".norm\1."),
    (r"\.attention\.bias_table", ".attn.relative_position_bias_table"),
    (r"\.attention\.qkv\.", ".attn.qkv."),
    (r"\.attention\.out\.", ".attn.proj."),
    (r"\.mlp\.up\.", ".mlp.fc1."),
    (r"\.mlp\.down\.", ".mlp.fc2."),
)
_LUA_HEADS = ((r"(heads\.[^.]+)\.before\.", r"\1.conv_before.0."), (r"\.last\.", ".conv_last."))
_SWINIR_HEADS = (
    (r"head\.before\.", "conv_before_upsample.0."),
    (r"head\.upsample\.", "upsample."),
    (r"head\.up\.0\.", "conv_up1."),
    (r"head\.up\.1\.", "conv_up2."),
    (r"head\.conv\.", "conv_hr."),
    (r"head\.last\.", "conv_last."),
)
_REBUILT = re.compile(r".*\.(relative_position_index|attn_mask)")
_COMMON = {
    "in_chans": ("channels", 3), "img_size": ("input_size", 64), "window_size": ("window_size", 7),
    "depths": ("depths", [6, 6, 6, 6]), "embed_dim": ("hidden_size", 96),
    "num_heads": ("num_heads", [6, 6, 6, 6]), "mlp_ratio": ("mlp_ratio", 4.0),
    "resi_connection": ("residual", "1conv"), "img_range": ("img_range", 1.0),
    "drop_path_rate": ("drop_path", 0.1), "qkv_bias": ("qkv_bias", True),
    "patch_norm": ("patch_norm", True), "ape": ("positions", False),
}  # fmt: skip
# settings that every published model leaves at these
_FIXED = {"patch_size": 1, "qk_scale": None, "drop_rate": 0.0, "attn_drop_rate": 0.0}
_WITHOUT_EFFECT = {"norm_layer", "use_checkpoint", "num_classes", "primary_head"}


def config_from_official(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate an official constructor's settings into SwinIR's, or into LUA's with ``heads``.

    Args:
        config: the official settings; missing ones have the official defaults.

    Returns:
        Keyword arguments of SwinIR or LUA.

    Raises:
        ConfigError: a setting is unknown, or one that the networks do not have.
    """
    lua = "heads" in config
    own = {"heads", "head_num_feat"} if lua else {"upscale", "upsampler"}
    unknown = sorted(set(config) - set(_COMMON) - set(_FIXED) - _WITHOUT_EFFECT - own)
    if unknown:
        raise ConfigError(
            f"The official settings hold {unknown}, which {'LUA' if lua else 'SwinIR'} does not "
            f"know; known are {sorted(own | set(_COMMON))}. Remove them if they change nothing."
        )
    for name, value in _FIXED.items():
        if config.get(name, value) != value:
            raise ConfigError(
                f"The official settings say {name}={config[name]}, but only {name}={value} is "
                "known, as of all published models. Give a model of that setting."
            )
    settings = {ours: config.get(name, default) for name, (ours, default) in _COMMON.items()}
    if not lua:
        return settings | {
            "scale": config.get("upscale", 2),
            "upsampler": config.get("upsampler") or "",
        }
    heads = config["heads"]
    channels = sorted({head.get("out_chans", settings["channels"]) for head in heads})
    if len(channels) != 1:
        raise ConfigError(
            f"The official heads give latents of {channels} channels, but LUA's give as many "
            "each. Give heads of one number of channels."
        )
    return settings | {
        "scales": [int(head["scale"]) for head in heads],
        "head_size": config.get("head_num_feat", 256),
        "out_channels": None if channels[0] == settings["channels"] else channels[0],
    }


def config_from_state_dict(
    state: Mapping[str, Tensor], *, img_range: float = 1.0, input_size: int | None = None
) -> dict[str, Any]:
    """Read SwinIR's or LUA's settings off an official state dict, as far as shapes tell them.

    Args:
        state: official keys; tensors may be on the meta device.
        img_range: which no shape tells; 255 in the models for JPEG artefacts.
        input_size: side that the network is made for; default: what its mask tells, else twice
            the window, so that windows shift.

    Returns:
        Keyword arguments of SwinIR, or of LUA where the file has several heads.

    Raises:
        CheckpointError: the state dict is neither's.
    """
    blocks = "layers.{}.residual_group.blocks"
    table = f"{blocks}.0.attn.relative_position_bias_table"
    first = state.get("conv_first.weight")
    depths = [
        count_children(state, blocks.format(i)) for i in range(count_children(state, "layers"))
    ]
    needed = [table.format(i) for i in range(len(depths))]
    if first is None or not depths or any(name not in state for name in needed):
        raise CheckpointError(
            "This is no official SwinIR or LUA state dict: conv_first.weight and the tables of "
            f"relative positions were expected, the first key is '{next(iter(state), 'none')}'. "
            "Give the state dict below the key 'params_ema' or 'params' of the official file."
        )
    width = first.shape[0]
    window = (math.isqrt(state[needed[0]].shape[0]) + 1) // 2
    settings = {
        "channels": first.shape[1],
        "input_size": input_size or _input_size(state, window, depths),
        "window_size": window,
        "depths": depths,
        "hidden_size": width,
        "num_heads": [state[name].shape[1] for name in needed],
        "mlp_ratio": state[f"{blocks.format(0)}.0.mlp.fc1.weight"].shape[0] / width,
        "residual": "1conv" if "conv_after_body.weight" in state else "3conv",
        "img_range": img_range,
        "qkv_bias": f"{blocks.format(0)}.0.attn.qkv.bias" in state,
        "patch_norm": "patch_embed.norm.weight" in state,
        "positions": "absolute_pos_embed" in state,
    }
    return settings | (_lua_settings(state) if _is_lua(state) else _swinir_settings(state))


def from_official(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Turn an official state dict into one that ``model.load_state_dict`` takes strictly.

    Args:
        state: official keys; a head of LUA may have any name, its layers tell its scale.
        model: a SwinIR or LUA; it may be on the meta device.

    Returns:
        Our keys, in the types and on the device of ``state``.

    Raises:
        CheckpointError: keys are missing or left over, or shapes differ.
    """
    given = {name: value for name, value in state.items() if not _REBUILT.fullmatch(name)}
    if _is_lua(given):
        names = head_names(given)
        given = {_rename_head(name, names): value for name, value in given.items()}
    own: dict[str, Any] = dict(model.state_dict())
    direct = _is_direct(model)
    official = {_official_name(name, direct=direct): name for name in own}
    shapes = shapes_of({name: own[ours] for name, ours in official.items()})
    settings: Any = model.config
    owner = type(model).__name__
    read = partial(
        config_from_state_dict,
        given,
        # no shape tells these for certain, so they are no explanation
        img_range=settings["img_range"],
        input_size=settings["input_size"],
    )
    advice = partial(settings_sentence, read, settings, family=owner)
    check_keys(given, shapes, owner=owner, advice=advice)
    check_shapes(given, shapes, owner=owner, advice=advice)
    return {ours: given[name].clone() for name, ours in official.items()}


def to_official(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    names: Mapping[int, str] | None = None,
) -> dict[str, Tensor]:
    """Turn our state dict (or gradients by our names) into the official layout.

    Args:
        state: our keys.
        config: the model's settings, ``model.config`` or the constructor's arguments.
        names: what a head of a scale is to be called; default ``x2`` for 2, and so on.

    Returns:
        Official keys, without the tables that official programs build themselves.
    """
    direct = config.get("upsampler") == "pixelshuffledirect"
    heads = {f"x{scale}": name for scale, name in (names or {}).items()}
    return {
        _rename_head(_official_name(name, direct=direct), heads): value.clone()
        for name, value in state.items()
    }


def head_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the heads of an official LUA by their name there, with ours: ``x`` and the scale."""
    found = {name.split(".")[1] for name in state if name.startswith("heads.")}
    return {name: f"x{_scale_of(state, f'heads.{name}.')}" for name in sorted(found)}


def is_official(state: Mapping[str, Tensor]) -> bool:
    """Return whether a state dict has the official keys of SwinIR or LUA."""
    return "conv_first.weight" in state


def _is_lua(state: Mapping[str, Tensor]) -> bool:
    return any(name.startswith("heads.") for name in state)


def _is_direct(model: nn.Module) -> bool:
    config: Any = model.config
    return bool(config.get("upsampler") == "pixelshuffledirect")


def _official_name(name: str, *, direct: bool) -> str:
    """Return what a tensor of ours is called officially."""
    if direct and name.startswith("head."):
        return name.replace("head.last.", "upsample.0.")
    heads = _LUA_HEADS if name.startswith("heads.") else _SWINIR_HEADS
    inside = _IN_BLOCKS if ".blocks." in name else ()
    for ours, theirs in (*inside, *(_TRUNK if name.startswith("trunk.") else heads)):
        name = re.sub(ours, theirs, name)
    return name


def _rename_head(name: str, names: Mapping[str, str]) -> str:
    if not name.startswith("heads."):
        return name
    first, head, rest = name.split(".", 2)
    return f"{first}.{names.get(head, head)}.{rest}"


def _scale_of(state: Mapping[str, Tensor], prefix: str = "") -> int:
    """Return the factor of the pixel shuffles below ``prefix``; 1 where there are none."""
    weights = [
        value
        for name, value in state.items()
        if name.startswith(f"{prefix}upsample.") and name.endswith(".weight")
    ]
    return math.prod(math.isqrt(value.shape[0] // value.shape[1]) for value in weights)


def _lua_settings(state: Mapping[str, Tensor]) -> dict[str, Any]:
    names = head_names(state)
    some = next(iter(names))
    out = state[f"heads.{some}.conv_last.weight"].shape[0]
    return {
        "scales": sorted(int(name[1:]) for name in names.values()),
        "head_size": state[f"heads.{some}.conv_before.0.weight"].shape[0],
        "out_channels": None if out == state["conv_first.weight"].shape[1] else out,
    }


def _swinir_settings(state: Mapping[str, Tensor]) -> dict[str, Any]:
    if "conv_up1.weight" in state:
        return {"upsampler": "nearest+conv", "scale": 4 if "conv_up2.weight" in state else 2}
    if "conv_before_upsample.0.weight" in state:
        return {"upsampler": "pixelshuffle", "scale": _scale_of(state)}
    if "upsample.0.weight" in state:
        factor = state["upsample.0.weight"].shape[0] // state["conv_first.weight"].shape[1]
        return {"upsampler": "pixelshuffledirect", "scale": math.isqrt(factor)}
    return {"upsampler": "", "scale": 1}


def _input_size(state: Mapping[str, Tensor], window: int, depths: list[int]) -> int:
    """Return the side that a network's masks were made for.

    A file that has indices but no mask, though it has blocks that could shift, is of a network
    whose windows never do.
    """
    masks = [value for name, value in state.items() if name.endswith(".attn_mask")]
    if masks:
        return math.isqrt(masks[0].shape[0]) * window
    has_tables = any(name.endswith(".relative_position_index") for name in state)
    return window if has_tables and max(depths) > 1 else 2 * window


def unwrapped(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the state dict in an official file: below ``params_ema``, ``params``, or bare.

    Raises:
        CheckpointError: there is none.
    """
    for name in ("params_ema", "params", "state_dict"):
        if isinstance(content.get(name), Mapping):
            content = content[name]
            break
    state = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if not state:
        raise CheckpointError(
            "The file holds no tensors by name, bare or below params_ema or params; its keys are "
            f"{', '.join(map(str, list(content)[:6])) or 'none'}. Give a file with a state dict."
        )
    return state
