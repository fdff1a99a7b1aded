"""VAR checkpoints: official keys <-> ours, losslessly both ways.

Reads the released files and what the official training writes (``ar-ckpt-last.pth``), and writes
files that the official program loads strictly. Nothing is transposed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from genscale.backbones.var import VAR
from genscale.io.converters import scale_wise
from genscale.io.keys import on_meta

BACKBONE = VAR
NESTED = ("trainer", "var_wo_ddp")  # where training files hold the weights


def config_from_official(config: Mapping[str, Any], *, parity: bool = False) -> dict[str, Any]:
    """Translate the official constructor's settings into VAR's.

    Args:
        config: official settings, and ``vocab_size`` and ``Cvae`` of the tokenizer. Missing ones
            have the official defaults.
        parity: changes nothing.

    Returns:
        Keyword arguments of :class:`~genscale.backbones.var.VAR`.

    Raises:
        ConfigError: a setting is unknown or has no counterpart.
    """
    settings = scale_wise.settings_from_official(config, family="VAR")
    return {**settings, "shared_adaln": bool(config.get("shared_aln", False))}


def config_from_state_dict(
    state: Mapping[str, Tensor],
    *,
    num_heads: int | None = None,
    input_size: int | None = None,
    scales: Sequence[int | Sequence[int]] | None = None,
) -> dict[str, Any]:
    """Read VAR's settings off an official state dict.

    Args:
        state: official keys; tensors may be on the meta device.
        num_heads: attention heads, which a file without learned factors does not tell; default:
            64 channels a head.
        input_size: not read; the scales tell the size.
        scales: the scales, where the file does not tell them: unpublished ones in a file without
            the levels of tokens.

    Returns:
        Keyword arguments of :class:`~genscale.backbones.var.VAR`.

    Raises:
        CheckpointError: the state dict is none of VAR, or its scales are not told.
    """
    settings = scale_wise.settings_from_state(
        state, family="VAR", num_heads=num_heads, scales=scales
    )
    keys = scale_wise.without_prefix(state)
    return {**settings, "shared_adaln": "blocks.0.ada_gss" in keys}


def from_official(state: Mapping[str, Tensor], model: VAR) -> dict[str, Tensor]:
    """Turn an official state dict into one that ``model.load_state_dict`` takes strictly.

    Args:
        state: official keys; masks and levels of tokens may be left out.
        model: the model to load into; it may be on the meta device.

    Returns:
        Our keys, in the types and on the device of ``state``.

    Raises:
        CheckpointError: keys are missing or left over, shapes or scales differ, or keys of the
            attention have a bias.
    """
    return scale_wise.load(state, model, read=config_from_state_dict, family="VAR")


def to_official(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Turn our state dict (or gradients by our names) into the official layout.

    Args:
        state: our keys.
        config: the model's settings, ``model.config`` or the constructor's arguments.

    Returns:
        Official keys, those of masks and levels included; the exact inverse of
        :func:`from_official`.

    Raises:
        CheckpointError: keys are missing or left over.
        ConfigError: oblong scales, which the official layout cannot hold.
    """
    model: VAR = on_meta(VAR, config)
    official = scale_wise.save(state, model, family="VAR")
    return {**official, **scale_wise.derived(model, next(iter(official.values())))}
