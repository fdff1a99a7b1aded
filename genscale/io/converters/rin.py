"""RIN state dicts of lucidrains' program <-> ours, losslessly both ways.

Nothing is transposed. Norms without bias keep a buffer ``beta`` of zeros there: it is checked on
load and written on save. Its input holds an earlier estimate before its own channels: our
``reference_channels``, which are as many as the picture has.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from genscale.backbones.rin import RIN
from genscale.errors import CheckpointError, ConfigError
from genscale.io.converters.fit import Names, check_betas, layer_name, with_betas
from genscale.io.keys import (
    check_keys,
    check_shapes,
    count_children,
    on_meta,
    settings_sentence,
    shapes_of,
)

BACKBONE = RIN

# (ours, official), patterns of names
_NAMES: Names = (
    (r"pixel_norm\.", "to_patches.1."),
    (r"head_norm\.weight$", "to_pixels.0.gamma"),
    (r"head\.", "to_pixels.1."),
    (r"past\.mlp\.", "init_self_cond_latents.0."),
    (r"past\.norm\.weight$", "init_self_cond_latents.1.gamma"),
    (r"time\.frequencies$", "time_mlp.0.weights"),
    (r"time\.linear_1\.", "time_mlp.1."),
    (r"time\.linear_2\.", "time_mlp.3."),
    (r"places\.0\.", "axial_pos_emb_height_mlp."),
    (r"places\.1\.", "axial_pos_emb_width_mlp."),
    (r"(blocks\.\d+)\.read\.", r"\1.latents_attend_to_patches."),
    (r"(blocks\.\d+)\.read_mlp\.", r"\1.latents_cross_attn_ff."),
    (r"(blocks\.\d+)\.write\.", r"\1.patches_attend_to_latents."),
    (r"(blocks\.\d+)\.write_mlp\.", r"\1.patches_cross_attn_ff."),
    (r"(blocks\.\d+)\.tape_conv\.", r"\1.patches_peg.ds_conv."),
    (r"(blocks\.\d+)\.tape_attention\.", r"\1.patches_self_attn."),
    (r"(blocks\.\d+)\.tape_mlp\.", r"\1.patches_self_attn_ff."),
    (r"(blocks\.\d+)\.latent_norm\.weight$", r"\1.latent_final_norm.gamma"),
    (r"(blocks\.\d+)\.compute\.(\d+)\.attention\.", r"\1.latent_self_attns.\2.0."),
    (r"(blocks\.\d+)\.compute\.(\d+)\.mlp\.", r"\1.latent_self_attns.\2.1."),
)
# within layers, beyond those of FIT: (ours, official), at the end of a name
_ENDS: Names = (
    (r"\.modulation\.", ".time_cond.1."),
    (r"\.q_norm\.gain$", ".q_norm.gamma"),
    (r"\.k_norm\.gain$", ".k_norm.gamma"),
    (r"\.tape_attention\.qkv\.", ".tape_attention.to_qkv."),
    (r"\.tape_attention\.out\.weight$", ".tape_attention.to_out.0.weight"),
    (r"\.tape_attention\.out_norm\.weight$", ".tape_attention.to_out.1.gamma"),
)
_PLACES = {"linear_1": "1", "linear_2": "3", "linear_3": "5"}
_WITHOUT_EFFECT = {"flash"}
_KNOWN = {
    "dim", "image_size", "patch_size", "channels", "depth", "latent_self_attn_depth", "dim_latent",
    "num_latents", "learned_sinusoidal_dim", "latent_token_time_cond", "dual_patchnorm",
    "patches_self_attn", "heads", "dim_head", "qk_norm",
}  # fmt: skip
_OWN = "Give the state dict of a model with this config."


def config_from_official(config: Mapping[str, Any], *, parity: bool = False) -> dict[str, Any]:
    """Translate the program's settings into RIN's.

    Args:
        config: the constructor's settings; missing ones have its defaults.
        parity: changes nothing.

    Returns:
        Keyword arguments of :class:`~genscale.backbones.rin.RIN`.

    Raises:
        ConfigError: a setting is unknown, missing, or of a value that RIN cannot have.
    """
    unknown = sorted(set(config) - _KNOWN - _WITHOUT_EFFECT)
    missing = [name for name in ("dim", "image_size") if name not in config]
    if unknown or missing:
        raise ConfigError(
            f"The settings hold {unknown or 'nothing'} that RIN does not know and lack "
            f"{missing or 'none'} of those without default; known are {sorted(_KNOWN)}. Correct "
            "them."
        )
    if config.get("learned_sinusoidal_dim", 16) != 16:
        raise ConfigError(
            f"The setting learned_sinusoidal_dim must be 16, but is "
            f"{config['learned_sinusoidal_dim']}. RIN embeds the time by 8 waves."
        )
    width, channels = config["dim"], config.get("channels", 3)
    return {
        "input_size": config["image_size"],
        "in_channels": channels,
        "patch_size": config.get("patch_size", 16),
        "tape_width": width,
        "latent_width": config.get("dim_latent") or width,
        "num_latents": config.get("num_latents", 256),
        "depth": config.get("depth", 6),
        "compute_depth": config.get("latent_self_attn_depth", 2),
        "num_heads": config.get("heads", 4),
        "head_size": config.get("dim_head", 32),
        "condition": "token" if config.get("latent_token_time_cond", False) else "adaln",
        "reference_channels": channels,
        "positions": "mlp",
        "patch_norm": "both" if config.get("dual_patchnorm", True) else "none",
        "tape_conv": True,
        "tape_attention": bool(config.get("patches_self_attn", True)),
        "latent_norm": True,
        "qk_norm": bool(config.get("qk_norm", False)),
    }


def config_from_state_dict(
    state: Mapping[str, Tensor], *, num_heads: int | None = None, input_size: int | None = None
) -> dict[str, Any]:
    """Read RIN's settings off a state dict, as far as shapes tell them.

    Args:
        state: official keys; tensors may be on the meta device.
        num_heads: heads, which no shape tells; default: of 32 channels, as the program has them.
        input_size: side of the trained picture, which no shape tells; default: the constructor's.

    Returns:
        Keyword arguments of :class:`~genscale.backbones.rin.RIN`, for pictures of three channels.

    Raises:
        CheckpointError: the state dict is none of RIN.
    """
    first = "blocks.0."
    needed = ("latents", "to_pixels.1.weight", "axial_pos_emb_height_mlp.1.weight",
              first + "latents_attend_to_patches.to_q.weight")  # fmt: skip
    missing = [name for name in needed if name not in state]
    if missing:
        raise CheckpointError(
            f"This is no RIN state dict: '{missing[0]}' is missing, the first key is "
            f"'{next(iter(state), 'none')}'. Give the bare state dict, not a wrapper around it."
        )
    pixels, width = state["to_pixels.1.weight"].shape
    inner = len(state[needed[3]])
    heads = num_heads or max(1, inner // 32)
    return {
        **({} if input_size is None else {"input_size": input_size}),
        "in_channels": 3,
        "patch_size": math.isqrt(pixels // 3),
        "tape_width": width,
        "latent_width": state["latents"].shape[1],
        "num_latents": len(state["latents"]),
        "depth": count_children(state, "blocks"),
        "compute_depth": count_children(state, first + "latent_self_attns"),
        "num_heads": heads,
        "head_size": inner // heads,
        "condition": "adaln"
        if first + "latents_attend_to_patches.time_cond.1.weight" in state
        else "token",
        "reference_channels": 3,
        "positions": "mlp",
        "patch_norm": "both" if "to_patches.3.weight" in state else "none",
        "tape_conv": True,
        "tape_attention": first + "patches_self_attn.to_qkv.weight" in state,
        "latent_norm": True,
        "qk_norm": first + "latents_attend_to_patches.q_norm.gamma" in state,
    }


def from_official(state: Mapping[str, Tensor], model: RIN) -> dict[str, Tensor]:
    """Turn the program's state dict into one that ``model.load_state_dict`` takes strictly.

    Args:
        state: official keys.
        model: the model to load into; it may be on the meta device.

    Returns:
        Our keys, in the types and on the device of ``state``.

    Raises:
        CheckpointError: keys are missing or left over, shapes differ, or a norm has a bias.
        ConfigError: the program cannot build the model.
    """
    _check_official(model.config)
    own = model.state_dict()
    shapes = shapes_of(_official(own, model.config))
    read = partial(config_from_state_dict, state)
    advice = partial(settings_sentence, read, model.config, family="RIN")
    check_keys(state, shapes, owner="RIN", advice=advice)
    check_shapes(state, shapes, owner="RIN", advice=advice)
    check_betas(state, owner="RIN")
    return {name: state[_official_name(name, model.config)].clone() for name in own}


def to_official(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Turn our state dict (or gradients by our names) into the program's layout.

    Args:
        state: our keys.
        config: the model's settings, ``model.config`` or the constructor's arguments.

    Returns:
        Official keys, the zeros of norms included; the exact inverse of :func:`from_official`.

    Raises:
        CheckpointError: keys are missing or left over.
        ConfigError: the program cannot build the model.
    """
    model: RIN = on_meta(RIN, config)
    _check_official(model.config)
    check_keys(state, model.state_dict(), owner="RIN", advice=_OWN)
    return _official(state, model.config)


def _official(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    named = {_official_name(name, config): tensor.clone() for name, tensor in state.items()}
    gains = {name for name in named if name.endswith(("q_norm.gamma", "k_norm.gamma"))}
    betas = with_betas({name: named[name] for name in named if name not in gains})
    return {**named, **betas}


def _official_name(name: str, config: Mapping[str, Any]) -> str:
    """Return the official key of ours."""
    if match := re.match(r"(patch|tape_norm)\.", name):  # steps of a sequence, some left out
        both = config["patch_norm"] == "both"
        place = "3" if match[1] == "tape_norm" else ("2" if both else "1")
        return f"to_patches.{place}." + name[match.end() :]
    if name.startswith("places."):
        name = re.sub(r"linear_\d", lambda found: _PLACES[found[0]], name)
    for ours, official in _ENDS:
        name, changes = re.subn(ours, official, name)
        if changes:
            break
    else:
        if name.startswith(("blocks.", "past.mlp.")) and ".latent_norm." not in name:
            name = layer_name(name) if ".tape_conv." not in name else name
    for ours, official in _NAMES:
        renamed, changes = re.subn("^" + ours, official, name)
        if changes:
            return renamed
    return name


def _check_official(config: Mapping[str, Any]) -> None:
    fixed = {"num_classes": 0, "text_size": 0, "positions": "mlp", "tape_conv": True}
    fixed |= {"latent_norm": True, "reference_channels": config["in_channels"]}
    wrong = [name for name, value in fixed.items() if config[name] != value]
    wrong += ["patch_norm"] if config["patch_norm"] == "after" else []
    for name in ("input_size", "patch_size"):
        wrong += [] if isinstance(config[name], int) else [name]
    if wrong:
        raise ConfigError(
            f"The program of this layout cannot build model.{wrong[0]}={config[wrong[0]]}. Save "
            "the model with save_pretrained instead."
        )
