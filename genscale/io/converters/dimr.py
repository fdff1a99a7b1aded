"""DiMR checkpoints: official keys <-> ours, losslessly both ways.

Reads the bare (EMA) state dicts that the official program publishes and writes files it can
load. Nothing is transposed; two things are laid out differently here: the four vectors of every
time-dependent parameter lie packed in four flat tensors, and the two input matrices of a gated
feed-forward layer are stacked. With rotary positions the official stages also own a pair of
frequency tables (``stages.i.pos_emb``) that no computation reads: they are left out on load, and
written with their initial values on save.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from genscale.backbones.dimr import DiMR
from genscale.errors import CheckpointError, ConfigError
from genscale.io.keys import (
    check_keys,
    check_shapes,
    count_children,
    on_meta,
    refuse_scaled_skips,
    settings_sentence,
)
from genscale.layers.rope import initial_log_frequencies

BACKBONE = DiMR

# (our module, official module), innermost names; applied to every key in both directions
_MODULES = (
    ("patch", "input_layer.1"),
    ("position.table", "input_layer.3.position_embeddings.weight"),
    ("class_table", "class_embeds"),
    ("upsample.norm_in", "upsample.0"),
    ("upsample.project", "upsample.1.kernel"),
    ("upsample.norm_out", "upsample.2"),
    ("attention_norm", "block1.norm"),
    ("attention.qkv", "block1.query_key_value"),
    ("attention.out", "block1.dense"),
    ("attention.rope", "block1.pos_emb"),
    ("attention.qk_norm", "block1.qk_norm"),
    ("conv", "block1.1"),
    ("mlp_norm", "block2.norm"),
    ("mlp.down", "block2.w2"),
    ("skips", "skip_denses"),
    ("head_norm", "output_layer.0"),
    ("head", "output_layer.2"),
)
_PACKED = {
    "time.value_0": "param0",
    "time.value_1": "param1",
    "time.gate_weight": "nodecay_weight",
    "time.gate_bias": "nodecay_bias",
}
_NORMS = {"TDRMSN": "td_rms", "LN": "td_ln", "RMSN": "rms", "ADARMSN": "ada_rms"}
_POSITIONS = {"APE": "learned", "Axial_RoPE": "axial_rope"}
_BLOCKS = {"TransformerBlock": "transformer", "ConvNeXtBlock": "convnext"}
_UNUSED = re.compile(r"stages\.\d+\.pos_emb\.freqs_[hw]")

_MODEL_KEYS = {
    "channels", "num_classes", "block_grad_to_lowres", "norm_type", "pe_type", "stage_configs",
}  # fmt: skip
_STAGE_KEYS = {
    "block_type", "dim", "hidden_dim", "num_attention_heads", "kernel_size", "num_blocks",
    "max_height", "max_width", "image_input_ratio", "input_feature_ratio", "final_kernel_size",
    "dropout_prob",
}  # fmt: skip


def config_from_official(config: Mapping[str, Any], *, parity: bool = False) -> dict[str, Any]:
    """Translate the official constructor's settings into DiMR's.

    Args:
        config: the official model settings: ``channels``, ``num_classes`` (null class
            included), ``norm_type``, ``stage_configs``, ...
        parity: crop position tables on smaller grids as the official program does, instead of
            stretching them.

    Returns:
        Keyword arguments of :class:`~genscale.backbones.dimr.DiMR`.

    Raises:
        ConfigError: a setting is unknown, missing, or has no counterpart.
    """
    _refuse_unknown("the model", config, _MODEL_KEYS)
    stages = [dict(stage) for stage in config["stage_configs"]]
    for r, stage in enumerate(stages):
        _refuse_unknown(f"stage_configs[{r}]", stage, _STAGE_KEYS)
    blocks = [_translate("block_type", stage["block_type"], _BLOCKS) for stage in stages]
    sizes = {
        tuple(
            stage[side] * stage.get("image_input_ratio", 1) * stage["input_feature_ratio"]
            for side in ("max_height", "max_width")
        )
        for stage in stages
    }
    if len(sizes) != 1:
        raise ConfigError(
            f"The stages' position tables belong to inputs of different sizes {sorted(sizes)}. "
            "Give max_height and max_width that times the stage's ratios give one input size."
        )
    height, width = sizes.pop()
    return {
        "input_size": height if height == width else [height, width],
        "in_channels": config["channels"],
        # without a transformer the official program has no class table, whatever is asked for
        "num_classes": (config.get("num_classes") or 1) - 1 if "transformer" in blocks else 0,
        "hidden_sizes": [stage["dim"] for stage in stages],
        # an even number builds one block more there: pairs around a middle one
        "depths": [stage["num_blocks"] // 2 * 2 + 1 for stage in stages],
        "patch_sizes": [stage["input_feature_ratio"] for stage in stages],
        "image_ratios": [stage.get("image_input_ratio", 1) for stage in stages],
        "block_types": blocks,
        "num_heads": [stage.get("num_attention_heads", 1) for stage in stages],
        "kernel_sizes": [stage.get("kernel_size", 1) for stage in stages],
        "mlp_sizes": [stage["hidden_dim"] for stage in stages],
        "head_kernel_sizes": [stage["final_kernel_size"] for stage in stages],
        "dropout": [float(stage.get("dropout_prob", 0)) for stage in stages],
        "norm": _translate("norm_type", config.get("norm_type", "LN"), _NORMS),
        "position": _translate("pe_type", config.get("pe_type", "APE"), _POSITIONS),
        "position_resize": "crop" if parity else "interpolate",
        "detach_lowres": bool(config.get("block_grad_to_lowres", False)),
    }


def _refuse_unknown(owner: str, given: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(given) - known)
    if unknown:
        raise ConfigError(
            f"The official settings of {owner} hold {unknown}, which DiMR does not know; known are "
            f"{sorted(known)}. Remove them if they change nothing."
        )


def _translate(name: str, value: str, table: Mapping[str, str]) -> str:
    if value not in table:
        raise ConfigError(
            f"The official {name} must be one of {', '.join(table)}, but is {value!r}. "
            "Check the official settings."
        )
    return table[value]


def config_from_state_dict(
    state: Mapping[str, Tensor], *, num_heads: int | None = None, input_size: int | None = None
) -> dict[str, Any]:
    """Read DiMR's settings off an official state dict, as far as shapes tell them.

    Args:
        state: official keys; tensors may be on the meta device.
        num_heads: attention heads, which no shape tells apart (rotary positions do, and then
            win); the default is that of the released models, 16.
        input_size: side of the trained input; needed only where no branch has a position table.

    Returns:
        Keyword arguments of :class:`~genscale.backbones.dimr.DiMR`. Square grids and a finest
        branch that does not average its input are assumed; drop-out and ``detach_lowres``, which
        leave no trace, keep their defaults.

    Raises:
        CheckpointError: the state dict is none of DiMR.
    """
    count = count_children(state, "stages")
    if count == 0 or "stages.0.input_layer.1.weight" not in state:
        first = next(iter(state), "none")
        raise CheckpointError(
            f"This is no official DiMR state dict: keys must begin with 'stages.0.', the first is "
            f"'{first}'. Give the bare state dict, not a folder or wrapper around it."
        )
    branches = [_read_branch(state, f"stages.{r}.", num_heads or 16) for r in range(count)]
    downsamples = [branches[-1]["patch_sizes"]]
    for branch in reversed(branches[1:]):
        downsamples.insert(0, downsamples[0] * branch.pop("ratio"))
    branches[0].pop("ratio")
    cells = [branch.pop("cells") for branch in branches]
    for r, number in enumerate(cells):
        if number is not None and input_size is None:
            input_size = math.isqrt(number) * downsamples[r]
    if input_size is None:
        raise CheckpointError(
            "This state dict holds no position table, so that its input size is unknown. "
            "Give it: input_size=32 for 256 pixels and an 8-fold autoencoder."
        )
    norm = "block2.norm."
    kinds = {"scale.param0": "td_rms", "weight.param0": "td_ln", "scale": "rms"}
    found = [kind for key, kind in kinds.items() if f"stages.0.blocks.0.{norm}{key}" in state]
    rotary = any("block1.pos_emb" in key for key in state)
    labels = [len(t) for key, t in state.items() if key.endswith("class_embeds.weight")]
    settings: dict[str, Any] = {
        "input_size": input_size,
        "in_channels": state["stages.0.input_layer.1.weight"].shape[1],
        "num_classes": labels[0] - 1 if labels else 0,
        "norm": found[0] if found else "ada_rms",
        "position": "axial_rope" if rotary else "learned",
    }
    settings |= {name: [branch[name] for branch in branches] for name in branches[0]}
    settings["image_ratios"] = [
        total // patch for total, patch in zip(downsamples, settings["patch_sizes"], strict=True)
    ]
    return settings


def _read_branch(state: Mapping[str, Tensor], prefix: str, num_heads: int) -> dict[str, Any]:
    """Read one branch's settings, with its ``cells`` and upsampling ``ratio`` where known."""
    patch = state[prefix + "input_layer.1.weight"]
    convolution = state.get(prefix + "blocks.0.block1.1.weight")
    frequencies = state.get(prefix + "blocks.0.block1.pos_emb.freqs_h")
    table = state.get(prefix + "input_layer.3.position_embeddings.weight")
    kernel = state.get(prefix + "upsample.1.kernel.weight")
    return {
        "hidden_sizes": len(patch),
        "depths": count_children(state, prefix + "blocks"),
        "patch_sizes": patch.shape[-1],
        "block_types": "transformer" if convolution is None else "convnext",
        "num_heads": num_heads if frequencies is None else len(frequencies),
        "kernel_sizes": 1 if convolution is None else convolution.shape[-1],
        "mlp_sizes": len(state[prefix + "blocks.0.block2.w0.bias"]),
        "head_kernel_sizes": state[prefix + "output_layer.2.weight"].shape[-1],
        "cells": None if table is None else len(table),
        "ratio": 1 if kernel is None else math.isqrt(len(kernel) // len(patch)),
    }


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows ``rows`` of our tensor ``ours`` are the official tensor ``official``."""

    ours: str
    official: str
    rows: slice
    shape: tuple[int, ...]


def _pieces(model: DiMR) -> Iterator[_Piece]:
    """Yield the official tensors that make up each of our tensors, in order of rows."""
    refuse_scaled_skips(model.config, family="DiMR")
    vectors = {_official_name(name): rows for name, rows in model.time.slices().items()}
    for name, tensor in model.state_dict().items():
        if name in _PACKED:
            for vector, rows in vectors.items():
                size = rows.stop - rows.start
                yield _Piece(name, f"{vector}.{_PACKED[name]}", rows, (size,))
        elif ".mlp.gate_up." in name:
            half = len(tensor) // 2
            for part, rows in (("w0", slice(0, half)), ("w1", slice(half, 2 * half))):
                official = name.replace(".mlp.gate_up.", f".block2.{part}.")
                yield _Piece(name, official, rows, (half, *tensor.shape[1:]))
        else:
            rows = slice(0, len(tensor))
            yield _Piece(name, _official_name(name), rows, tuple(tensor.shape))


def _official_name(name: str) -> str:
    for ours, official in _MODULES:
        renamed, changes = re.subn(rf"(?<=\.){re.escape(ours)}(?=\.|$)", official, name, count=1)
        if changes:
            return renamed
    return name


def from_official(state: Mapping[str, Tensor], model: DiMR) -> dict[str, Tensor]:
    """Turn an official state dict into one that ``model.load_state_dict`` takes strictly.

    Args:
        state: official keys. Tables that no computation reads are left out.
        model: the model to load into; it may be on the meta device.

    Returns:
        Our keys, in the types and on the device of ``state``.

    Raises:
        CheckpointError: keys are missing or left over, or shapes differ.
    """
    pieces = list(_pieces(model))
    shapes = {piece.official: piece.shape for piece in pieces}
    read = partial(config_from_state_dict, state)
    advice = partial(settings_sentence, read, model.config, family="DiMR")
    check_keys(state, shapes, owner="DiMR", advice=advice, ignored=_UNUSED)
    check_shapes(state, shapes, owner="DiMR", advice=advice)
    parts: dict[str, list[Tensor]] = {}
    for piece in pieces:
        parts.setdefault(piece.ours, []).append(state[piece.official])
    return {
        name: values[0].clone() if len(values) == 1 else torch.cat(values)
        for name, values in parts.items()
    }


def to_official(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Turn our state dict (or gradients by our names) into the official layout.

    Args:
        state: our keys.
        config: the model's settings, ``model.config`` or the constructor's arguments.

    Returns:
        Official keys; the exact inverse of :func:`from_official`, plus the unused rotary tables
        of the official program, where it has them, at their initial values.

    Raises:
        CheckpointError: keys are missing or left over.
    """
    model: DiMR = on_meta(DiMR, config)
    advice = "Give the state dict of a model with this config."
    check_keys(state, model.state_dict(), owner="DiMR", advice=advice)
    result = {piece.official: state[piece.ours][piece.rows].clone() for piece in _pieces(model)}
    for r, branch in enumerate(model.stages):
        if branch.axial_rope:
            reference = next(iter(state.values()))
            heads, size = model.config["num_heads"], model.config["hidden_sizes"][r]
            heads = heads if isinstance(heads, int) else heads[r]
            table = initial_log_frequencies(size // 4).repeat(heads, 1).to(reference)
            result |= {f"stages.{r}.pos_emb.freqs_{axis}": table.clone() for axis in "hw"}
    return result
