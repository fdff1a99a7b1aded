"""What transformers on patches check of their settings and inputs, and their rows of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from genscale.backbones.base import Backbone
from genscale.conditioning.base import NULL_LABEL
from genscale.errors import ConfigError, did_you_mean


def check_positive(config: Mapping[str, Any], *names: str) -> None:
    """Check that settings are integers of at least 1, and ``num_classes`` one of at least 0.

    Raises:
        ConfigError: one is not.
    """
    for name in (*names, "num_classes"):
        value, least = config[name], 0 if name == "num_classes" else 1
        if not isinstance(value, int) or value < least:
            raise ConfigError(
                f"model.{name} must be an integer of at least {least}, but is {value}. "
                f"Give {least} or more."
            )


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    """Check that a setting is one of the known words.

    Raises:
        ConfigError: it is not.
    """
    if value not in known:
        raise ConfigError(
            f"model.{name} must be one of {', '.join(known)}, but is {value!r}."
            f"{did_you_mean(str(value), tuple(known))}"
        )


def check_heads(hidden_size: int, num_heads: int) -> None:
    """Check that heads divide the width.

    Raises:
        ConfigError: they do not.
    """
    if num_heads < 1 or hidden_size % num_heads:
        raise ConfigError(
            f"model.hidden_size is {hidden_size}, which model.num_heads={num_heads} heads do not "
            "divide. Change one of them."
        )


def check_text(text_size: int, num_text_tokens: int, pooled_text_size: int) -> None:
    """Check the sizes of text.

    Raises:
        ConfigError: one is negative, or there are tokens of a width but none in number.
    """
    if min(text_size, pooled_text_size) < 0 or (text_size and num_text_tokens < 1):
        raise ConfigError(
            f"model.text_size={text_size}, model.num_text_tokens={num_text_tokens} and "
            f"model.pooled_text_size={pooled_text_size} must be positive, or 0 for a model without "
            "text. Give the sizes of the text encoder."
        )


def mlp_width(hidden_size: int, mlp_ratio: float) -> int:
    """Return the width inside feed-forward layers.

    Raises:
        ConfigError: it is not positive.
    """
    width = int(hidden_size * mlp_ratio)
    if width < 1:
        raise ConfigError(
            f"model.mlp_ratio must be positive, but is {mlp_ratio}. The published models have 4."
        )
    return width


def trained_grid(
    model: Backbone, input_size: int | Sequence[int], patch_size: int
) -> tuple[int, int]:
    """Return rows and columns of the trained grid of patches.

    A size that a config library or a tuple gave is kept in the model's config as a plain list,
    as JSON has it.

    Raises:
        ConfigError: patches do not divide the input.
    """
    if not isinstance(input_size, int):
        model.register_to_config(input_size=list(input_size))
    height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
    if min(height, width) < 1 or height % patch_size or width % patch_size:
        raise ConfigError(
            f"model.input_size is {height} x {width}, which must be a multiple of "
            f"model.patch_size={patch_size}. Change one of them."
        )
    return height // patch_size, width // patch_size


def check_inputs(model: Backbone, x: Tensor, t: Tensor, labels: Tensor | None) -> None:
    """Check the shapes of a network's inputs against each other and its config.

    Raises:
        ValueError: they do not fit together.
    """
    name = type(model).__name__
    channels, patch_size = model.config["in_channels"], model.config["patch_size"]
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(
            f"{name} takes x of shape (B, {channels}, H, W), but {tuple(x.shape)} was given. "
            "Give pictures with as many channels as model.in_channels."
        )
    if x.shape[2] % patch_size or x.shape[3] % patch_size:
        raise ValueError(
            f"Height and width must be multiples of {patch_size}, the patch, but x is "
            f"{x.shape[2]} x {x.shape[3]}. Pad, crop or resize it."
        )
    if t.shape not in ((len(x),), (1,)):
        raise ValueError(
            f"t must have shape ({len(x)},), or (1,) when shared, but has {tuple(t.shape)}. "
            "Give one time a sample."
        )
    if labels is not None and labels.shape != (len(x),):
        raise ValueError(
            f"cond.labels must have shape ({len(x)},), but has {tuple(labels.shape)}. "
            "Give one label a sample."
        )


def class_rows(
    labels: Tensor | None, num_classes: int, batch_size: int, device: torch.device
) -> Tensor:
    """Return the row of the class table ``(B,)`` of each label; null is the last row."""
    if labels is None:
        labels = torch.full((batch_size,), NULL_LABEL, device=device)
    return torch.where(labels < 0, num_classes, labels)
