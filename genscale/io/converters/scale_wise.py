"""What the official checkpoints of VAR and M-VAR have in common, and how it is named here.

Tensors that follow from the scales (levels of tokens, masks, a key bias of zeros) are no weights:
they are dropped on load and made again on save.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from genscale.backbones.base import ScaleBackbone
from genscale.errors import CheckpointError, ConfigError
from genscale.io.converters.msvq import PUBLISHED_SCALES
from genscale.io.keys import (
    check_keys,
    check_shapes,
    count_children,
    settings_sentence,
    shapes_of,
)
from genscale.layers.scales import scale_spans

Names = Sequence[tuple[str, str]]

# (ours, official); modules, then single tensors
MODULES: Names = (
    ("embed.word", "word_embed"),
    ("embed.level", "lvl_embed"),
    ("class_table", "class_emb"),
    ("shared_modulation", "shared_ada_lin.1"),
    ("head.modulation", "head_nm.ada_lin.1"),
    ("head.out", "head"),
)
IN_BLOCKS: Names = (
    ("attention.qkv", "attn.mat_qkv"),
    ("attention.out", "attn.proj"),
    ("mlp.up", "ffn.fc1"),
    ("mlp.down", "ffn.fc2"),
    ("modulation", "ada_lin.1"),
)
_TENSORS: Names = (("embed.start", "pos_start"), ("embed.places", "pos_1LC"))
_IN_BLOCK_TENSORS: Names = (
    ("attention.q_bias", "attn.q_bias"),
    ("attention.v_bias", "attn.v_bias"),
    ("attention.log_factor", "attn.scale_mul_1H11"),
    ("offsets", "ada_gss"),
)
# axes of length 1 that the official program keeps: those of batch, places and channels
_AXES = {"pos_start": 1, "pos_1LC": 1, "scale_mul_1H11": (1, 2), "ada_gss": 2}

_DERIVED = re.compile(
    r"lvl_1L|attn_bias_for_masking|blocks\.\d+\.attn\.(zero_k_bias|patch_nums|mat_qkv\.bias)"
)
_PREFIX = "_orig_mod."  # of compiled modules


def settings_from_official(config: Mapping[str, Any], *, family: str) -> dict[str, Any]:
    """Translate the official constructor's settings that VAR and M-VAR share.

    Args:
        config: official settings; the tokenizer's ``vocab_size`` and ``Cvae`` among them, or below
            ``vae``. Missing ones have the official defaults.
        family: for the sentence.

    Returns:
        Keyword arguments.

    Raises:
        ConfigError: a setting is unknown or has no counterpart.
    """
    shared = {
        "num_classes", "depth", "embed_dim", "num_heads", "mlp_ratio", "drop_rate",
        "attn_drop_rate", "drop_path_rate", "norm_eps", "shared_aln", "cond_drop_rate",
        "attn_l2_norm", "patch_nums",
        "flash_if_available", "fused_if_available", "vae", "vocab_size", "Cvae", "quant_resi",
        "share_quant_resi",
    }  # fmt: skip
    unknown = sorted(set(config) - shared)
    dropped = [name for name in ("drop_rate", "attn_drop_rate") if config.get(name, 0.0)]
    if unknown or dropped:
        raise ConfigError(
            f"The official settings hold {unknown or dropped}, which {family} does not know; known "
            f"are {sorted(shared)}, drop-out of activations being 0. Remove them if they "
            "change nothing."
        )
    tokenizer = {**config, **config.get("vae", {})}
    return {
        "scales": list(config.get("patch_nums", PUBLISHED_SCALES[16])),
        "latent_channels": tokenizer.get("Cvae", 32),
        "vocab_size": tokenizer.get("vocab_size", 4096),
        "num_classes": config.get("num_classes", 1000),
        "hidden_size": config.get("embed_dim", 1024),
        "depth": config.get("depth", 16),
        "num_heads": config.get("num_heads", 16),
        "mlp_ratio": float(config.get("mlp_ratio", 4.0)),
        "l2_norm": bool(config.get("attn_l2_norm", False)),
        "drop_path": float(config.get("drop_path_rate", 0.0)),
        "eps": float(config.get("norm_eps", 1e-6)),
    }


def settings_from_state(
    state: Mapping[str, Tensor],
    *,
    family: str,
    num_heads: int | None,
    scales: Sequence[int | Sequence[int]] | None,
) -> dict[str, Any]:
    """Read the settings that VAR and M-VAR share off an official state dict.

    Args:
        state: official keys; tensors may be on the meta device.
        family: for the sentence.
        num_heads: attention heads, which a file without learned factors does not tell; default:
            64 channels a head.
        scales: the scales, where the file does not tell them.

    Raises:
        CheckpointError: the state dict is of another network, or its scales are not told.
    """
    state = without_prefix(state)
    needed = ("pos_1LC", "lvl_embed.weight", "head.weight", "word_embed.weight")
    missing = [name for name in (*needed, "blocks.0.ffn.fc1.bias") if name not in state]
    if missing:
        raise CheckpointError(
            f"This is no official {family} state dict: '{missing[0]}' is missing, the first key is "
            f"'{next(iter(state), 'none')}'. Give the transformer's weights, not the tokenizer's."
        )
    vocab_size, width = state["head.weight"].shape
    factor = state.get("blocks.0.attn.scale_mul_1H11")
    heads = num_heads or max(1, width // 64)
    return {
        "scales": list(scales) if scales is not None else read_scales(state),
        "latent_channels": state["word_embed.weight"].shape[1],
        "vocab_size": vocab_size,
        "num_classes": len(state["class_emb.weight"]) - 1,
        "hidden_size": width,
        "depth": count_children(state, "blocks"),
        "num_heads": heads if factor is None else factor.numel(),
        "mlp_ratio": len(state["blocks.0.ffn.fc1.bias"]) / width,
        "l2_norm": factor is not None,
    }


def without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict without the prefix that compilation gives its keys."""
    return {name.removeprefix(_PREFIX): tensor for name, tensor in state.items()}


def load(
    state: Mapping[str, Tensor], model: ScaleBackbone, *, read: Any, family: str, extra: Names = ()
) -> dict[str, Tensor]:
    """Turn an official state dict into one that ``model.load_state_dict`` takes strictly.

    Args:
        state: official keys.
        model: the model to load into; it may be on the meta device.
        read: reads the settings off a state dict.
        family: for the sentence.
        extra: names in blocks that this family has beyond the shared ones.

    Raises:
        CheckpointError: keys are missing or left over, shapes differ, or keys have a bias.
    """
    state = without_prefix(state)
    state = {**state, **_split_biases(state)}
    own = model.state_dict()
    names = {name: official_name(name, extra) for name in own}
    shapes = shapes_of({names[name]: _official_shape(name, own[name], extra) for name in own})
    settings = {**model.config}
    advice = partial(settings_sentence, partial(read, state), settings, family=family)
    check_keys(state, shapes, owner=family, advice=advice, ignored=_DERIVED)
    check_shapes(state, shapes, owner=family, advice=advice)
    check_levels(state, model, family)
    return {name: state[names[name]].reshape(own[name].shape).clone() for name in own}


def save(
    state: Mapping[str, Tensor], model: ScaleBackbone, *, family: str, extra: Names = ()
) -> dict[str, Tensor]:
    """Turn our state dict (or gradients by our names) into the official layout.

    Args:
        state: our keys.
        model: a model of these settings, on the meta device.
        family: for the sentence.
        extra: as in :func:`load`.

    Returns:
        Official keys of weights; what follows from the scales is in :func:`derived`.

    Raises:
        CheckpointError: keys are missing or left over.
        ConfigError: oblong scales, which the official layouts cannot hold.
    """
    oblong = [scale for scale in model.scales if scale[0] != scale[1]]
    if oblong:
        raise ConfigError(
            f"The official {family} has square scales, but the model has {list(oblong[0])}. Save "
            "it with save_pretrained instead."
        )
    check_keys(
        state,
        model.state_dict(),
        owner=family,
        advice="Give the state dict of a model with this config.",
    )
    return {
        official_name(name, extra): _official_shape(name, tensor, extra).clone()
        for name, tensor in state.items()
    }


def derived(model: ScaleBackbone, like: Tensor, *, same_scale: bool = False) -> dict[str, Tensor]:
    """Return the tensors of an official file that follow from the scales.

    Args:
        model: its settings.
        like: of the type and device wanted.
        same_scale: mask all pairs of two scales, as M-VAR; else those that look ahead.
    """
    config, levels = model.config, token_levels(model)
    query, key = levels[:, None], levels[None]
    seen = query == key if same_scale else query >= key
    mask = torch.zeros(seen.shape).masked_fill(~seen, -math.inf)
    zeros = like.new_zeros(config["hidden_size"])
    return {
        "lvl_1L": levels[None].to(like.device),
        "attn_bias_for_masking": mask[None, None].to(like),
        **{f"blocks.{i}.attn.zero_k_bias": zeros.clone() for i in range(config["depth"])},
    }


def token_levels(model: ScaleBackbone) -> Tensor:
    """Return the scale of every token: ``(L,)`` int64 on the CPU."""
    spans = scale_spans(model.scales)
    rows = [k for k, (start, end) in enumerate(spans) for _ in range(end - start)]
    return torch.tensor(rows, device="cpu")


def official_name(name: str, extra: Names = ()) -> str:
    """Return the official key of ours; blocks keep their number."""
    for ours, official in _TENSORS:
        if name == ours:
            return official
    for ours, official in MODULES:
        if name.startswith(ours + "."):
            return official + name[len(ours) :]
    for ours, official in (*extra, *IN_BLOCKS, *_IN_BLOCK_TENSORS):
        renamed, changes = re.subn(
            rf"^(blocks\.\d+\.){re.escape(ours)}(?=\.|$)", rf"\g<1>{official}", name
        )
        if changes:
            return renamed
    return name


def _official_shape(name: str, tensor: Tensor, extra: Names) -> Tensor:
    """View a tensor of ours with the axes of length 1 of the official one."""
    axes = _AXES.get(official_name(name, extra).rpartition(".")[2])
    if axes is None:
        return tensor
    before, after = axes if isinstance(axes, tuple) else (axes, 0)
    return tensor[(None,) * before + (...,) + (None,) * after]


def _split_biases(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return biases of queries and values of a joined bias; that of keys must be zero."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(".attn.mat_qkv.bias"):
            q, k, v = tensor.chunk(3)
            block = name.removesuffix("mat_qkv.bias")
            found |= {block + "q_bias": q, block + "v_bias": v}
        elif name.endswith(".attn.zero_k_bias"):
            k = tensor
        else:
            continue
        if not k.is_meta and bool(k.any()):
            raise CheckpointError(
                f"'{name}' gives keys a bias, up to {k.abs().max().item():.3g}, but the official "
                "attention has none. Such a file cannot be loaded."
            )
    return found


def read_scales(state: Mapping[str, Tensor]) -> list[int]:
    """Return the sides of square scales.

    A file that tells the number of scales alone is taken for the finest published list of so many.

    Raises:
        CheckpointError: the file does not tell them.
    """
    sides, levels = state.get("blocks.0.attn.patch_nums"), state.get("lvl_1L")
    if sides is not None and not sides.is_meta:
        return [int(side) for side in sides.tolist()]
    count = len(state["lvl_embed.weight"])
    tokens = state["pos_1LC"].shape[1] if "pos_1LC" in state else None
    if levels is not None and not levels.is_meta:
        sizes = torch.bincount(levels.flatten().long(), minlength=count).tolist()
        roots = [math.isqrt(size) for size in sizes]
        if all(root * root == size for root, size in zip(roots, sizes, strict=True)):
            return roots
    for known in reversed(PUBLISHED_SCALES.values()):
        if len(known) == count and tokens in (None, sum(side * side for side in known)):
            return list(known)
    raise CheckpointError(
        f"The file has {count} scales"
        + (f" of {tokens} tokens in all" if tokens is not None else "")
        + ", and does not tell their sizes. Give them, e.g. scales=[1,2,3,4]."
    )


def check_levels(state: Mapping[str, Tensor], model: ScaleBackbone, family: str) -> None:
    """Refuse a file whose tokens are split over the scales in another way than the model's."""
    levels = state.get("lvl_1L")
    if levels is None or levels.is_meta:
        return
    sizes = [end - start for start, end in scale_spans(model.scales)]
    found = torch.bincount(levels.flatten().long()).tolist()
    if found != sizes:
        raise CheckpointError(
            f"The file has scales of {found} tokens, but the {family} has {sizes}. Build the model "
            "with the file's scales."
        )
