"""M-VAR checkpoints: official keys <-> ours, losslessly both ways; and a warm start from VAR.

Reads the released files and what the official training writes, and writes files that the official
program loads strictly. Nothing is transposed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from genscale.backbones.mvar import MVAR
from genscale.errors import CheckpointError, ConfigError
from genscale.io.converters import scale_wise
from genscale.io.keys import check_shapes, on_meta

BACKBONE = MVAR
NESTED = ("trainer", "mvar_wo_ddp")  # where training files hold the weights

_SCAN: scale_wise.Names = (
    ("scan.in_proj", "mamba.in_proj"),
    ("scan.conv", "mamba.conv1d"),
    ("scan.step_bias", "mamba.dt_bias"),
    ("scan.log_rate", "mamba.A_log"),
    ("scan.skip", "mamba.D"),
    ("scan.norm_scale", "mamba.norm.weight"),
    ("scan.out_proj", "mamba.out_proj"),
)


def config_from_official(config: Mapping[str, Any], *, parity: bool = False) -> dict[str, Any]:
    """Translate the official constructor's settings into M-VAR's.

    Args:
        config: official settings, and ``vocab_size`` and ``Cvae`` of the tokenizer, or these below
            ``vae``. Missing ones have the official defaults.
        parity: start gates as the official program does.

    Returns:
        Keyword arguments of :class:`~genscale.backbones.mvar.MVAR`.

    Raises:
        ConfigError: a setting is unknown or has no counterpart.
    """
    if config.get("shared_aln"):
        raise ConfigError(
            "The official setting shared_aln=True does not run there, and M-VAR does not have it. "
            "Give shared_aln=False."
        )
    settings = scale_wise.settings_from_official(config, family="M-VAR")
    return {**settings, "fix_gate_init": not parity}


def config_from_state_dict(
    state: Mapping[str, Tensor],
    *,
    num_heads: int | None = None,
    input_size: int | None = None,
    scales: Sequence[int | Sequence[int]] | None = None,
) -> dict[str, Any]:
    """Read M-VAR's settings off an official state dict.

    Args:
        state: official keys; tensors may be on the meta device.
        num_heads: attention heads, which a file without learned factors does not tell; default:
            64 channels a head.
        input_size: not read; the scales tell the size.
        scales: the scales, where the file does not tell them.

    Returns:
        Keyword arguments of :class:`~genscale.backbones.mvar.MVAR`.

    Raises:
        CheckpointError: the state dict is none of M-VAR, or its scales are not told.
    """
    settings = scale_wise.settings_from_state(
        state, family="M-VAR", num_heads=num_heads, scales=scales
    )
    keys = scale_wise.without_prefix(state)
    rates, mixed = keys.get("blocks.0.mamba.A_log"), keys.get("blocks.0.mamba.conv1d.bias")
    if rates is None or mixed is None:
        raise CheckpointError(
            "This is no official M-VAR state dict: its blocks have no 'mamba'. If it is a VAR, "
            "give family=var."
        )
    inner = 2 * settings["hidden_size"]
    return {
        **settings,
        "state_size": (len(mixed) - inner) // 2,
        "scan_head_size": inner // len(rates),
    }


def from_official(state: Mapping[str, Tensor], model: MVAR) -> dict[str, Tensor]:
    """Turn an official state dict into one that ``model.load_state_dict`` takes strictly.

    Args:
        state: official keys; masks, levels of tokens and the list of scales may be left out.
        model: the model to load into; it may be on the meta device.

    Returns:
        Our keys, in the types and on the device of ``state``.

    Raises:
        CheckpointError: keys are missing or left over, shapes or scales differ, or keys of the
            attention have a bias.
    """
    return scale_wise.load(state, model, read=config_from_state_dict, family="M-VAR", extra=_SCAN)


def to_official(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Turn our state dict (or gradients by our names) into the official layout.

    Args:
        state: our keys.
        config: the model's settings, ``model.config`` or the constructor's arguments.

    Returns:
        Official keys, those of masks, levels and scales included; the exact inverse of
        :func:`from_official`.

    Raises:
        CheckpointError: keys are missing or left over.
        ConfigError: oblong scales, which the official layout cannot hold.
    """
    model: MVAR = on_meta(MVAR, config)
    official = scale_wise.save(state, model, family="M-VAR", extra=_SCAN)
    reference = next(iter(official.values()))
    sides = torch.tensor([side for side, _ in model.scales], device=reference.device)
    return {
        **official,
        **scale_wise.derived(model, reference, same_scale=True),
        **{f"blocks.{i}.attn.patch_nums": sides.clone() for i in range(len(model.blocks))},
    }


def from_var(state: Mapping[str, Tensor], model: MVAR) -> dict[str, Tensor]:
    """Start an M-VAR from a VAR of the same sizes, its scans being silent at first.

    The result is the VAR whose attention sees its own scale alone: a start, not an equal.

    Args:
        state: state dict of a :class:`~genscale.backbones.var.VAR`, our keys, with shared or own
            modulation of blocks.
        model: an M-VAR with weights; those of its scans are kept.

    Returns:
        A state dict for ``model.load_state_dict``.

    Raises:
        CheckpointError: the VAR has other sizes, or is none.
    """
    result = dict(model.state_dict())
    shared = {part: state.get(f"shared_modulation.{part}") for part in ("weight", "bias")}
    given: dict[str, Tensor] = {}
    for name in result:
        if ".modulation." in name and name.startswith("blocks."):
            block, part = name.rsplit(".modulation.", 1)
            six = state.get(name) if shared[part] is None else shared[part]
            offsets = state.get(f"{block}.offsets")
            if six is not None and offsets is not None and part == "bias":
                six = six + offsets.flatten()
            if six is not None:
                given[name] = _nine_of_six(six)
        elif ".scan." not in name and name in state:
            given[name] = state[name]
    missing = [name for name in result if name not in given and ".scan." not in name]
    if missing:
        raise CheckpointError(
            f"{len(missing)} weights are missing from the VAR (first: {missing[0]}). Give the "
            "state dict of a VAR of the same depth and attention."
        )
    advice = "Give a VAR of the same width, depth, heads, scales, codes and classes."
    wanted = {name: tuple(result[name].shape) for name in given}
    check_shapes(given, wanted, owner="the M-VAR", advice=advice)
    return {**result, **{name: tensor.clone() for name, tensor in given.items()}}


def _nine_of_six(six: Tensor) -> Tensor:
    """Spread gates, scales and shifts of attention and feed-forward layer; the scan's are zero."""
    attention, feed_forward = six.reshape(3, 2, len(six) // 6, *six.shape[1:]).unbind(1)
    silent = torch.zeros_like(attention)
    return torch.stack((attention, silent, feed_forward), dim=1).flatten(0, 2)
