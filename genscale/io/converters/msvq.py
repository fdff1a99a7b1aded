"""Checkpoints of VAR's multi-scale VQVAE: official keys <-> ours, losslessly both ways.

Reads ``vae_ch160v4096z32.pth``, a bare state dict of 324 tensors, and writes files that the
official program loads strictly. Nothing is transposed. The official decoder numbers its levels
from the picture's resolution down, though it runs through them upwards; ours are in the order
they run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from genscale.autoencoders.msvq import MSVQ
from genscale.errors import CheckpointError, ConfigError
from genscale.io.keys import (
    check_keys,
    check_shapes,
    count_children,
    on_meta,
    settings_sentence,
    shapes_of,
)

BACKBONE = MSVQ

# sides of the token maps of the published models by the side of the last
PUBLISHED_SCALES = {
    16: [1, 2, 3, 4, 5, 6, 8, 10, 13, 16],
    32: [1, 2, 3, 4, 6, 9, 13, 18, 24, 32],
    64: [1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64],
}

_HITS = "quantize.ema_vocab_hit_SV"
_PHI = "quantize.quant_resi."
# (ours, official) of whole names, below a level's number, and inside residual blocks and attention
_MODULES = (
    ("quantizer.embedding.", "quantize.embedding."),
    ("encoder.middle.", "encoder.mid."),
    ("decoder.middle.", "decoder.mid."),
)
_PARTS = (
    (r"(?<=mid\.)attention\.", "attn_1."),
    (r"(?<=\d\.)blocks\.", "block."),
    (r"(?<=\d\.)attentions\.", "attn."),
    (r"\.(norm|conv)_(\d)\.", r".\1\2."),
    (r"\.shortcut\.", ".nin_shortcut."),
    (r"(attn(?:_1|\.\d+))\.out\.", r"\1.proj_out."),
)
_MODEL_KEYS = {
    "vocab_size", "z_channels", "ch", "dropout", "beta", "using_znorm", "quant_conv_ks",
    "quant_resi", "share_quant_resi", "default_qresi_counts", "v_patch_nums", "ddconfig",
}  # fmt: skip
_LEVEL_KEYS = {
    "ch", "ch_mult", "num_res_blocks", "in_channels", "dropout", "using_sa", "using_mid_sa",
    "z_channels", "double_z",
}  # fmt: skip
_WITHOUT_EFFECT = {"test_mode"}


def config_from_official(config: Mapping[str, Any], *, parity: bool = False) -> dict[str, Any]:
    """Translate the official constructor's settings into MSVQ's.

    Args:
        config: the official settings; missing ones have the official defaults. ``ddconfig`` holds
            those of encoder and decoder.
        parity: changes nothing: there is no other behaviour.

    Returns:
        Keyword arguments of :class:`~genscale.autoencoders.msvq.MSVQ`.

    Raises:
        ConfigError: a setting is unknown.
    """
    levels: Mapping[str, Any] = config.get("ddconfig") or {}
    for given, known in ((config, _MODEL_KEYS | _WITHOUT_EFFECT), (levels, _LEVEL_KEYS)):
        unknown = sorted(set(given) - known)
        if unknown:
            raise ConfigError(
                f"The official settings hold {unknown}, which MSVQ does not know; known are "
                f"{sorted(known)}. Remove them if they change nothing."
            )
    multipliers = list(levels.get("ch_mult", (1, 1, 2, 2, 4)))
    attends = levels.get("using_sa", True)
    scales = list(config.get("v_patch_nums", PUBLISHED_SCALES[16]))
    share, own = config.get("share_quant_resi", 4), config.get("default_qresi_counts", 0)
    return {
        "scales": scales,
        "vocab_size": config.get("vocab_size", 4096),
        "latent_channels": config.get("z_channels", levels.get("z_channels", 32)),
        "image_channels": levels.get("in_channels", 3),
        "hidden_size": levels.get("ch", config.get("ch", 128)),
        "channel_multipliers": multipliers,
        "num_blocks": levels.get("num_res_blocks", 2),
        "attention_levels": None if attends else [],  # None: at the last level
        "middle_attention": bool(levels.get("using_mid_sa", True)),
        "dropout": float(levels.get("dropout", config.get("dropout", 0.0))),
        "num_phis": share or (None if own in (0, len(scales)) else own),
        "phi_weight": _phi_weight(config.get("quant_resi", 0.5)),
        "cosine": bool(config.get("using_znorm", False)),
        "latent_kernel": config.get("quant_conv_ks", 3),
        "beta": float(config.get("beta", 0.25)),
    }


def config_from_state_dict(
    state: Mapping[str, Tensor], *, num_heads: int | None = None, input_size: int | None = None
) -> dict[str, Any]:
    """Read MSVQ's settings off an official state dict, as far as shapes tell them.

    Args:
        state: official keys; tensors may be on the meta device.
        num_heads: not used: attention has one head.
        input_size: side of the pictures, which chooses among the published lists of scales.
            Default: that with as many scales as the file has counts of, else sides 1, 2, ...

    Returns:
        Keyword arguments of :class:`~genscale.autoencoders.msvq.MSVQ`. The scales' sides, the share
        of the convolution in phi layers, the kind of matching, and loss weights leave no trace:
        they are as published unless given on your own.

    Raises:
        CheckpointError: the state dict is none of a multi-scale VQVAE.
    """
    needed = ("quantize.embedding.weight", "encoder.conv_in.weight", "quant_conv.weight", _HITS)
    missing = [name for name in needed if name not in state]
    if missing:
        raise CheckpointError(
            f"This is no official multi-scale VQVAE: '{missing[0]}' is missing, the first key is "
            f"'{next(iter(state), 'none')}'. Give the bare state dict, as vae_ch160v4096z32.pth."
        )
    codes, first, kernel, hits = (state[name] for name in needed)
    width, channels = first.shape[:2]
    levels = count_children(state, "encoder.down")
    widths = [len(state[f"encoder.down.{i}.block.0.conv1.bias"]) for i in range(levels)]
    attends = [i for i in range(levels) if f"encoder.down.{i}.attn.0.norm.weight" in state]
    return {
        "scales": _scales(len(hits), input_size, 2 ** (levels - 1)),
        "vocab_size": codes.shape[0],
        "latent_channels": codes.shape[1],
        "image_channels": channels,
        "hidden_size": width,
        "channel_multipliers": [size // width for size in widths],
        "num_blocks": count_children(state, "encoder.down.0.block"),
        "attention_levels": None if attends == [levels - 1] else attends,
        "middle_attention": "encoder.mid.attn_1.norm.weight" in state,
        "num_phis": _count_phis(state),
        "latent_kernel": kernel.shape[-1],
        **({} if any(name.startswith(_PHI) for name in state) else {"phi_weight": 0.0}),
    }


def from_official(state: Mapping[str, Tensor], model: MSVQ) -> dict[str, Tensor]:
    """Turn an official state dict into one that ``model.load_state_dict`` takes strictly.

    Args:
        state: official keys. Counts of code usage are kept where they are of as many scales as the
            model has, and start anew otherwise, as in the official program.
        model: the model to load into; it may be on the meta device.

    Returns:
        Our keys, in the types and on the device of ``state``.

    Raises:
        CheckpointError: keys are missing or left over, or shapes differ.
    """
    own = model.state_dict()
    form = _phi_form(state, model)
    names = {_official_name(name, model, form): name for name in own}
    hits = own["quantizer.hits"]
    if _HITS in state and state[_HITS].shape != hits.shape:
        state = {**state, _HITS: state[_HITS].new_zeros(hits.shape)}
    wanted = shapes_of({official: own[name] for official, name in names.items()})
    read = partial(config_from_state_dict, state)
    # the sides of the scales are no shapes: a file does not tell them
    settings = {name: value for name, value in model.config.items() if name != "scales"}
    advice = partial(settings_sentence, read, settings, family="multi-scale VQVAE")
    check_keys(state, wanted, owner="MSVQ", advice=advice)
    check_shapes(state, wanted, owner="MSVQ", advice=advice)
    return {name: state[official].clone() for official, name in names.items()}


def to_official(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Turn our state dict (or gradients by our names) into the official layout.

    Args:
        state: our keys; the counts of code usage may be left out, as from gradients.
        config: the model's settings, ``model.config`` or the constructor's arguments.

    Returns:
        Official keys; the exact inverse of :func:`from_official`.

    Raises:
        CheckpointError: keys are missing or left over.
        ConfigError: settings that the official layout cannot hold.
    """
    model: MSVQ = on_meta(MSVQ, config)
    if model.config["norm_groups"] != 32:
        raise ConfigError(
            f"The official layout has norms of 32 groups, but the model has norm_groups="
            f"{model.config['norm_groups']}. Save it with save_pretrained instead."
        )
    wanted = [name for name in model.state_dict() if name != "quantizer.hits" or name in state]
    advice = "Give the state dict of a model with this config."
    check_keys(state, wanted, owner="MSVQ", advice=advice)
    form = _PHI + ("{0}" if config.get("num_phis", 4) is None else "qresi_ls.{0}")
    if config.get("num_phis", 4) == 1:
        form = _PHI + "qresi"
    return {_official_name(name, model, form): tensor.clone() for name, tensor in state.items()}


def _official_name(name: str, model: MSVQ, form: str) -> str:
    """Return the official key of ours.

    Args:
        name: our key.
        model: tells how many levels there are.
        form: how phi layers are called, with their number as ``{0}``.
    """
    if name == "quantizer.hits":
        return _HITS
    if match := re.fullmatch(r"quantizer\.phis\.(\d+)\.(.*)", name):
        return f"{form.format(match[1])}.{match[2]}"
    last = len(model.encoder.levels) - 1
    if match := re.match(r"(encoder|decoder)\.levels\.(\d+)\.", name):
        half, number = match[1], int(match[2])
        down = half == "encoder"
        start = f"{half}.down.{number}." if down else f"{half}.up.{last - number}."
        name = start + name[match.end() :]
        name = name.replace(".resample.", ".downsample." if down else ".upsample.")
    for ours, official in _MODULES:
        if name.startswith(ours):
            name = official + name[len(ours) :]
    for ours, official in _PARTS:
        name = re.sub(ours, official, name)
    return name


def _phi_weight(ratio: float) -> float:
    """Return the share of the convolution; the official program takes a tiny one for none."""
    return abs(float(ratio)) if abs(ratio) > 1e-6 else 0.0


def _phi_form(state: Mapping[str, Tensor], model: MSVQ) -> str:
    """Return how a file calls its phi layers: one for all, some that are shared, or one a scale."""
    if any(name.startswith(f"{_PHI}qresi_ls.") for name in state):
        return _PHI + "qresi_ls.{0}"
    if any(name.startswith(f"{_PHI}qresi.") for name in state):
        return _PHI + ("qresi" if len(model.quantizer.phis) == 1 else "qresi.{0}")
    return _PHI + "{0}"


def _count_phis(state: Mapping[str, Tensor]) -> int | None:
    """Return ``num_phis`` of a file: None where every scale has a layer of its own."""
    if f"{_PHI}qresi.weight" in state:
        return 1
    if shared := count_children(state, f"{_PHI}qresi_ls"):
        return shared
    own = count_children(state, _PHI[:-1])
    return None if own in (0, len(state[_HITS])) else own


def _scales(count: int, input_size: int | None, downsample: int) -> list[int]:
    """Return the sides of the scales: of a published list, or 1, 2, ..., ``count``."""
    if input_size is not None and input_size // downsample in PUBLISHED_SCALES:
        return PUBLISHED_SCALES[input_size // downsample]
    for sides in PUBLISHED_SCALES.values():
        if len(sides) == count:
            return sides
    return list(range(1, count + 1))
