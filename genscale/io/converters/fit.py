"""FIT state dicts in the layout of Snap's published audio model <-> ours, losslessly both ways.

No weights of Snap Video are published; files of its network have these keys. Nothing is transposed.
Norms without bias keep a buffer ``beta`` of zeros there: it is checked on load and written on save.
Sizes of clip, patches, groups and heads leave no trace in shapes: ``config.json`` or users tell.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from genscale.backbones.fit import FIT
from genscale.errors import CheckpointError, ConfigError
from genscale.io.keys import (
    check_keys,
    check_shapes,
    count_children,
    on_meta,
    settings_sentence,
    shapes_of,
)

BACKBONE = FIT

UNTOLD = ("input_size", "patch_size", "group_size", "heads")
"""Settings that no tensor tells and no default should guess: config.json or the user does."""

Names = tuple[tuple[str, str], ...]

# (ours, official): patterns of whole names, and of names below a block
_NAMES: Names = (
    (r"positions\.table$", "patches_pe"),
    (r"patch\.", "to_patches.0."),
    (r"patch_norm\.", "to_patches.1."),
    (r"head_norm\.", "patch_to_pixels.0."),
    (r"head\.", "patch_to_pixels.1."),
    (r"past\.mlp\.", "self_conditioning_latents_projection.0."),
    (r"past\.norm\.", "self_conditioning_latents_projection.1."),
    (r"context\.time\.frequencies$", "time_mlp.0.weights"),
    (r"context\.time\.linear_1\.", "time_mlp.1."),
    (r"context\.time\.linear_2\.", "time_mlp.3."),
    (r"context\.text\.", "context_projection_summary_text_embeddings."),
    (r"context\.text_null$", "summary_text_embeddings_mask_token"),
    (r"context\.picture_size\.linear_1\.", "resolution_conditioning_mlp.0."),
    (r"context\.picture_size\.linear_2\.", "resolution_conditioning_mlp.2."),
    (r"(blocks\.\d+)\.context\.", r"\1.latents_attend_to_context."),
    (r"(blocks\.\d+)\.context_mlp\.", r"\1.latents_context_attn_ff."),
    (r"(blocks\.\d+)\.read\.", r"\1.latents_attend_to_patches."),
    (r"(blocks\.\d+)\.read_mlp\.", r"\1.latents_cross_attn_ff."),
    (r"(blocks\.\d+)\.write\.", r"\1.patches_attend_to_latents."),
    (r"(blocks\.\d+)\.write_mlp\.", r"\1.patches_cross_attn_ff."),
    (r"(blocks\.\d+\.(?:global|local)_layers\.\d+)\.attention\.", r"\1.0."),
    (r"(blocks\.\d+\.(?:global|local)_layers\.\d+)\.mlp\.", r"\1.1."),
)
_LAYERS = {
    "context_norm.weight": "norm_context.gamma",
    "norm.weight": "norm.gamma",
    "q.weight": "to_q.weight",
    "kv.weight": "to_kv.weight",
    "out.weight": "to_out.weight",
    "up.weight": "net.0.weight",
    "up.bias": "net.0.bias",
    "down.weight": "net.2.weight",
    "down.bias": "net.2.bias",
}
_BARE_GAINS = ("head_norm.weight", "past.norm.weight")  # norms that are a step of a sequence
_DROPPED = re.compile(r"(\.(?:global|local)_layers\.\d+\.1\.net\.)[23](?=\.)")
_OWN = "Give the state dict of a model with this config."

_RENAMED = {
    "input_channels": "in_channels",
    "patch_channels": "patch_width",
    "latent_channels": "latent_width",
    "context_channels": "context_width",
    "latent_count": "num_latents",
    "fit_blocks_count": "depth",
    "global_layers_per_block": "global_depth",
    "local_layers_per_block": "local_depth",
    "summary_text_embeddings_channels": "text_size",
    "summary_text_embeddings_use_mask_token": "text_null_token",
    "use_resolution_conditioning": "reads_size",
    "input_size": "input_size",
    "patch_size": "patch_size",
    "group_size": "group_size",
}
_FIXED: dict[str, Any] = {
    "fit_block_module": "FITBlockV5",
    "conditioning_in_context": True,
    "time_pe_type": "learned",
    "use_dataset_id_conditioning": False,
    "self_conditioning_ff_config": {},
    "time_scaling": 1.0,
}
_OPTIONAL = {"summary_text_embeddings_channels": 0, "summary_text_embeddings_use_mask_token": False,
             "use_resolution_conditioning": False, "local_layers_per_block": 0}  # fmt: skip
_HEADS = ("read", "write", "read_context", "local", "global")
_BLOCK = {"drop_units", "drop_path", "use_cross_attention_feedforward", "default_attention_config"}
_BLOCK |= {f"{name}_attention_config" for name in _HEADS}
# what the official layout has no place for: (setting, its value without)
_OURS_ALONE: dict[str, Any] = {
    "num_classes": 0,
    "reads_frame_rate": False,
    "reference_channels": 0,
    "extra_inputs": [],
    "output_conv": False,
    "arch": "snap",
    "local_kind": "attention",
}


def config_from_official(config: Mapping[str, Any], *, parity: bool = False) -> dict[str, Any]:
    """Translate the official constructor's settings into FIT's.

    Args:
        config: the official model settings.
        parity: changes nothing: the official program's quirk is part of what its weights mean.

    Returns:
        Keyword arguments of :class:`~genscale.backbones.fit.FIT`.

    Raises:
        ConfigError: a setting is unknown, missing, or of a value that FIT cannot have.
    """
    known = {*_RENAMED, *_FIXED, "weight_initializer", "fit_block_config"}
    _check_known(config, known, "settings")
    missing = [name for name in _RENAMED if name not in config and name not in _OPTIONAL]
    if missing:
        raise ConfigError(
            f"The official settings lack {missing}, which have no default. Give the model's whole "
            "settings."
        )
    for name, value in _FIXED.items():
        if config.get(name, value) != value:
            raise ConfigError(
                f"The official setting {name} must be {value}, but is {config[name]}. FIT has no "
                "such variant."
            )
    block = config.get("fit_block_config", {})
    _check_known(block, _BLOCK, "settings of blocks")
    if block.get("drop_path", 0.0):
        raise ConfigError(
            f"The official setting drop_path is {block['drop_path']}, but FIT drops no paths. Set "
            "it to 0 if the weights are only to be used."
        )
    cross_mlp = bool(block.get("use_cross_attention_feedforward", False))
    scale = config.get("weight_initializer", {}).get("scale", 1.0)
    found = {
        ours: config.get(name, _OPTIONAL.get(name)) for name, ours in _RENAMED.items()
    }  # fmt: skip
    sizes = {name: list(found[name]) for name in ("input_size", "patch_size", "group_size")}
    return {
        **found,
        **sizes,
        "text_null_token": bool(found["text_null_token"]),
        "reads_size": bool(found["reads_size"]),
        "heads": {name.removeprefix("read_"): _heads(block, name) for name in _HEADS},
        "cross_mlp": cross_mlp,
        "dropout": float(block.get("drop_units", 0.0)),
        "init_scale": float(scale),
        # such weights were trained in a program that doubles
        "double_residual_quirk": not cross_mlp,
    }


def config_to_official(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the official settings of ours; None for a model that the program cannot build."""
    if _unofficial(config) or config["double_residual_quirk"] == config["cross_mlp"]:
        return None
    model: FIT = on_meta(FIT, config)
    block: dict[str, Any] = {
        "drop_units": config["dropout"],
        "drop_path": 0.0,
        "use_cross_attention_feedforward": config["cross_mlp"],
    }
    for name in _HEADS:
        heads, size = model.sizes.heads[name.removeprefix("read_")]
        block[f"{name}_attention_config"] = {"heads": heads, "dim_head": size}
    return {
        **{name: config[ours] for name, ours in _RENAMED.items()},
        **{name: value for name, value in _FIXED.items() if name != "time_scaling"},
        "weight_initializer": {
            "target": "RINWeightScalerInitializer",
            "scale": config["init_scale"],
        },
        "fit_block_config": block,
    }


def config_from_state_dict(
    state: Mapping[str, Tensor], *, num_heads: int | None = None, input_size: int | None = None
) -> dict[str, Any]:
    """Read FIT's settings off an official state dict, as far as shapes tell them.

    Args:
        state: official keys; tensors may be on the meta device.
        num_heads: not read: layers differ in their heads.
        input_size: not read: a clip has three sizes.

    Returns:
        Keyword arguments of :class:`~genscale.backbones.fit.FIT`, without :data:`UNTOLD`.

    Raises:
        CheckpointError: the state dict is none of FIT.
    """
    first = "blocks.0."
    needed = ("latents", "patches_pe", "to_patches.0.weight",
              first + "latents_attend_to_context.norm_context.gamma")  # fmt: skip
    missing = [name for name in needed if name not in state]
    if missing:
        raise CheckpointError(
            f"This is no official FIT state dict: '{missing[0]}' is missing, the first key is "
            f"'{next(iter(state), 'none')}'. Give the bare state dict, not a wrapper around it."
        )
    text = state.get("context_projection_summary_text_embeddings.weight")
    local = count_children(state, first + "local_layers")
    cross_mlp = first + "latents_cross_attn_ff.net.0.weight" in state
    return {
        "patch_width": state["patches_pe"].shape[1],
        "latent_width": state["latents"].shape[1],
        "context_width": len(state[needed[3]]),
        "num_latents": len(state["latents"]),
        # local layers bring a last block of their own
        "depth": count_children(state, "blocks") - (1 if local else 0),
        "global_depth": count_children(state, first + "global_layers"),
        "local_depth": local,
        "text_size": 0 if text is None else text.shape[1],
        "text_null_token": "summary_text_embeddings_mask_token" in state,
        "reads_size": "resolution_conditioning_mlp.0.weight" in state,
        "cross_mlp": cross_mlp,
        "double_residual_quirk": not cross_mlp,
    }


def from_official(state: Mapping[str, Tensor], model: FIT) -> dict[str, Tensor]:
    """Turn an official state dict into one that ``model.load_state_dict`` takes strictly.

    Args:
        state: official keys.
        model: the model to load into; it may be on the meta device.

    Returns:
        Our keys, in the types and on the device of ``state``.

    Raises:
        CheckpointError: keys are missing or left over, shapes differ, or a norm has a bias.
        ConfigError: the model has parts that the official layout cannot hold.
    """
    _check_official(model.config)
    # a file may have been written with or without drop-out; the layer itself has no weights
    place = rf"\g<1>{_place(model.config)}"
    given = {_DROPPED.sub(place, name): tensor for name, tensor in state.items()}
    own = model.state_dict()
    shapes = shapes_of(_official(own, model.config))
    advice = partial(
        settings_sentence, partial(config_from_state_dict, state), model.config, family="FIT"
    )
    check_keys(given, shapes, owner="FIT", advice=advice)
    check_shapes(given, shapes, owner="FIT", advice=advice)
    check_betas(given, owner="FIT")
    return {name: given[_official_name(name, model.config)].clone() for name in own}


def to_official(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Turn our state dict (or gradients by our names) into the official layout.

    Args:
        state: our keys.
        config: the model's settings, ``model.config`` or the constructor's arguments.

    Returns:
        Official keys, the zeros of norms included; the exact inverse of :func:`from_official`.

    Raises:
        CheckpointError: keys are missing or left over.
        ConfigError: the model has parts that the official layout cannot hold.
    """
    model: FIT = on_meta(FIT, config)
    _check_official(model.config)
    check_keys(state, model.state_dict(), owner="FIT", advice=_OWN)
    return _official(state, model.config)


def layer_name(name: str) -> str:
    """Return the official name of a part of an attention or feed-forward layer, from its end.

    Also used for RIN, whose program has the same layers.
    """
    for ours, official in _LAYERS.items():
        head = name.removesuffix(ours)
        if head != name and (not head or head.endswith(".")):
            return head + official
    return name


def with_betas(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put a ``beta`` of zeros beside every ``gamma``."""
    betas = {
        name.removesuffix("gamma") + "beta": torch.zeros_like(tensor)
        for name, tensor in official.items()
        if name.endswith(".gamma")
    }
    return {**official, **betas}


def check_betas(state: Mapping[str, Tensor], *, owner: str) -> None:
    """Check that norms have no bias.

    Raises:
        CheckpointError: a ``beta`` is not zero.
    """
    for name, tensor in state.items():
        if name.endswith(".beta") and not tensor.is_meta and bool(tensor.any()):
            raise CheckpointError(
                f"'{name}' must be zero, since {owner}'s norms have no bias, but is not. The file "
                "is of another program, or was changed."
            )


def _official(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    return with_betas({_official_name(name, config): t.clone() for name, t in state.items()})


def _official_name(name: str, config: Mapping[str, Any]) -> str:
    """Return the official key of ours."""
    if name in _BARE_GAINS:
        name = name.removesuffix("weight") + "gamma"
    elif name.startswith(("blocks.", "past.mlp.")):
        name = layer_name(name)
    for ours, official in _NAMES:
        renamed, changes = re.subn("^" + ours, official, name)
        if changes:
            return _DROPPED.sub(rf"\g<1>{_place(config)}", renamed)
    return name


def _place(config: Mapping[str, Any]) -> int:
    """Return the place of a feed-forward layer's last linear layer: drop-out counts as one."""
    return 3 if config["dropout"] > 0 else 2


def _heads(block: Mapping[str, Any], name: str) -> list[int]:
    stated = block.get(f"{name}_attention_config", block.get("default_attention_config"))
    if stated is None:
        raise ConfigError(
            f"The official settings hold neither {name}_attention_config nor "
            "default_attention_config. Give the model's whole settings."
        )
    return [stated["heads"], stated["dim_head"]]


def _check_known(config: Mapping[str, Any], known: set[str], what: str) -> None:
    unknown = sorted(set(config) - known)
    if unknown:
        raise ConfigError(
            f"The official {what} hold {unknown}, which FIT does not know; known are "
            f"{sorted(known)}. Remove them if they change nothing."
        )


def _unofficial(config: Mapping[str, Any]) -> list[str]:
    return [name for name, value in _OURS_ALONE.items() if config[name] != value]


def _check_official(config: Mapping[str, Any]) -> None:
    wrong = _unofficial(config)
    if wrong:
        raise ConfigError(
            f"The official layout has no place for model.{wrong[0]}={config[wrong[0]]}. Save the "
            "model with save_pretrained instead."
        )
