"""Parity of VAR's multi-scale VQVAE: tokens, running latents, pictures, losses and gradients."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genscale.autoencoders.msvq import MSVQ
from genscale.io.converters.msvq import config_from_official, from_official, to_official
from scripts.parity import Case, Comparison, compare_in_words


def run(case: Case) -> list[Comparison]:
    """Run one case: whatever outputs and gradients it holds."""
    # says how the case was made, not what of
    settings = {k: v for k, v in case.config.items() if k != "official_full_layout"}
    model = MSVQ(**config_from_official(settings, parity=True))
    state = case.group("state") or _from_recipe(case.info["state_keys"])
    model.load_state_dict(from_official(state, model))
    model.eval()
    images = case.group("input")["image"]
    outputs, grads = case.group("output"), case.group("grad")
    got = _outputs(model, images, with_training=bool(grads) or "train_vq_loss" in outputs)
    unknown = sorted(set(outputs) - set(got))
    if unknown:
        raise KeyError(f"The case holds output/{unknown[0]}, which this adapter does not know.")
    results = [_compare(case, name, got[name], outputs[name]) for name in outputs]
    if grads:
        torch.autograd.backward(
            got["train_reconstruction_unclamped"].square().mean() + got["train_vq_loss"].sum()
        )
        own = {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in model.named_parameters()
        }
        official = to_official(own, model.config)
        results += [
            _compare(case, f"grad {name}", official[name], grad) for name, grad in grads.items()
        ]
    return results


def _outputs(model: MSVQ, images: Tensor, *, with_training: bool) -> dict[str, Tensor]:
    """Return everything that can be computed, under the names that cases use."""
    with torch.no_grad():
        tokens = model.tokens(images)
        parts = model.quantizer.split(tokens)
        snapshots = model.snapshots(tokens)
        got = {
            "feature": model.encode_features(images),
            # the first scale's rows are zeros, and no input of the official program
            "teacher_input": model.features(tokens)[:, parts[0].shape[1] :],
            "fhat_last": snapshots[-1],
            "reconstruction": model.decode(snapshots[-1]).clamp(-1, 1),
            "image_from_fhat_mid": model.decode(snapshots[len(snapshots) // 2]).clamp(-1, 1),
        }
    got |= {f"indices_{k}": part for k, part in enumerate(parts)}
    got |= {f"fhat_{k}": snapshot for k, snapshot in enumerate(snapshots)}
    if with_training:
        images_again, quantized = model(images)
        got["train_reconstruction_unclamped"] = images_again
        got["train_vq_loss"] = quantized.losses.mean()[None]
    return got


def _compare(case: Case, name: str, got: Tensor, expected: Tensor) -> Comparison:
    """Compare tokens exactly, numbers and gradients within what the case says in words."""
    stated: Mapping[str, str] = case.info["tolerance"]
    words = stated["grad" if name.startswith("grad ") else "float"]
    return compare_in_words(words, name, got, expected)


def _from_recipe(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Make the weights of a case that stores none: normal numbers seeded by each key."""
    return {key: torch.from_numpy(_values(key, list(shape))) for key, shape in shapes.items()}


def _values(key: str, shape: list[int]) -> Any:
    # the recipe is written in these terms, so the old generator is the right one
    generator = np.random.RandomState(zlib.crc32(key.encode()))
    normal = generator.standard_normal(math.prod(shape)).astype(np.float32).reshape(shape)
    if key == "quantize.ema_vocab_hit_SV":
        return np.zeros(shape, np.float32)
    if key == "quantize.embedding.weight":
        return normal * np.float32(0.5)
    if len(shape) > 1:
        return normal * np.float32(1 / math.sqrt(math.prod(shape[1:])))
    is_norm = ".norm" in key or key.endswith("norm_out.weight")
    scaled = normal * np.float32(0.1)
    return 1 + scaled if is_norm and key.endswith("weight") else scaled
