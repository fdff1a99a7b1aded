"""Settings of FIT: what must fit together, and what it makes of its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from genscale.backbones.base import Backbone
from genscale.backbones.fit_groups import Groups
from genscale.backbones.fit_layers import SelfConditioning
from genscale.backbones.shapes import check_choice, check_positive, check_text
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError, did_you_mean

HEADS = ("read", "write", "context", "global", "local")
_MODES = ("nearest", "trilinear")


@dataclass(frozen=True, slots=True)
class Sizes:
    """Widths of a block.

    Attributes:
        patch: width of the patches' tokens.
        latent: width of the latents.
        context: width of the condition's tokens.
        heads: number and size of heads, by layer.
        eps: of the norms.
    """

    patch: int
    latent: int
    context: int
    heads: dict[str, tuple[int, int]]
    eps: float


@dataclass(frozen=True, slots=True)
class ExtraInput:
    """An average of the input over windows, stretched back to its size.

    Attributes:
        kernel: frames, height and width of a window.
        mode: ``nearest`` or ``trilinear``.
    """

    kernel: tuple[int, int, int]
    mode: str

    def view_of(self, clip: Tensor) -> Tensor:
        """Return the view of a clip ``(B, C, T, H, W)``, shaped as it.

        Raises:
            ValueError: the windows do not divide it.
        """
        sides = tuple(clip.shape[2:])
        if any(side % window for side, window in zip(sides, self.kernel, strict=True)):
            raise ValueError(
                f"A clip of {sides} must be a multiple of the windows {self.kernel} of "
                "model.extra_inputs. Give another size, or other windows."
            )
        means = F.avg_pool3d(clip, self.kernel)
        return F.interpolate(means, size=sides, mode=self.mode)


def read_extra_inputs(given: Sequence[Mapping[str, Any]]) -> list[ExtraInput]:
    """Read ``extra_inputs``.

    Raises:
        ConfigError: an entry is none.
    """
    found = []
    for entry in given:
        kernel, mode = entry.get("kernel"), entry.get("mode", "nearest")
        if set(entry) - {"kernel", "mode"} or kernel is None or len(kernel) != 3:
            raise ConfigError(
                "model.extra_inputs holds entries {kernel: [frames, height, width], mode: nearest "
                f"or trilinear}}, but one is {dict(entry)}. Give such entries."
            )
        check_choice("extra_inputs.mode", mode, _MODES)
        found.append(ExtraInput((int(kernel[0]), int(kernel[1]), int(kernel[2])), mode))
    return found


def frames_and_sides(input_size: int | Sequence[int]) -> tuple[int, int, int]:
    """Return frames, height and width of an ``input_size``; pictures have one frame."""
    if isinstance(input_size, int):
        return 1, input_size, input_size
    if len(input_size) not in (2, 3):
        raise ConfigError(
            f"model.input_size has {len(input_size)} entries, which must be [frames, height, "
            "width], or [height, width] for pictures. Give one of the two."
        )
    frames, height, width = (1, *input_size)[-3:]
    return int(frames), int(height), int(width)


def check_settings(model: Backbone) -> tuple[Sizes, Groups]:
    """Check FIT's settings, and return its widths and the groups of the trained clip.

    Lists that a config library or tuples gave are kept in the model's config as plain lists, as
    JSON has them.

    Raises:
        ConfigError: settings that do not fit together.
    """
    config = model.config
    check_positive(
        config, *("in_channels", "patch_width", "latent_width", "context_width", "num_latents"),
        *("depth", "global_depth", "patch_head_size", "latent_head_size"),
    )  # fmt: skip
    check_choice("arch", config["arch"], ("snap", "fit_original"))
    check_choice("local_kind", config["local_kind"], ("attention", "convolution"))
    check_text(config["text_size"], config["num_text_tokens"], 0)
    if (
        not 0 <= config["dropout"] < 1
        or min(config["local_depth"], config["reference_channels"]) < 0
    ):
        raise ConfigError(
            f"model.dropout={config['dropout']} must lie in [0, 1), and model.local_depth="
            f"{config['local_depth']} and model.reference_channels={config['reference_channels']} "
            "must be 0 or more. Change them."
        )
    for name in ("patch_size", "group_size"):
        sides = config[name]
        if len(sides) != 3 or min(sides) < 1:
            raise ConfigError(
                f"model.{name} must be three positive numbers, along time, height and width, but "
                f"is {list(sides)}. Give e.g. [1, 4, 4]."
            )
    lists = {name: list(config[name]) for name in ("patch_size", "group_size")}
    lists["extra_inputs"] = [
        {name: value if isinstance(value, str) else list(value) for name, value in entry.items()}
        for entry in config["extra_inputs"]
    ]
    if not isinstance(config["input_size"], int):
        lists["input_size"] = list(config["input_size"])
    given = config["heads"]
    heads = None if given is None else {name: list(pair) for name, pair in given.items()}
    model.register_to_config(**lists, heads=heads)
    try:
        size = frames_and_sides(config["input_size"])
        groups = Groups.of(size, config["patch_size"], config["group_size"])
    except ValueError as error:
        raise ConfigError(f"model.input_size does not fit. {error}") from None
    check_latents(config["num_latents"], groups.number)
    eps = 1e-6 if config["arch"] == "fit_original" else 1e-5
    widths = (config["patch_width"], config["latent_width"], config["context_width"])
    return Sizes(*widths, _heads(config, heads or {}), eps), groups


def check_latents(num_latents: int, groups: int) -> None:
    """Check that latents can be shared out among groups.

    Raises:
        ConfigError: they cannot.
    """
    if num_latents % groups:
        raise ConfigError(
            f"model.num_latents is {num_latents}, which the clip's {groups} groups cannot share "
            f"out. Give a multiple of {groups}, or another model.group_size."
        )


def _heads(
    config: Mapping[str, Any], given: Mapping[str, Sequence[int]]
) -> dict[str, tuple[int, int]]:
    unknown = [name for name in given if name not in HEADS]
    if unknown or any(len(pair) != 2 or min(pair) < 1 for pair in given.values()):
        raise ConfigError(
            f"model.heads gives [number, size] for any of {', '.join(HEADS)}, but is "
            f"{dict(given)}.{did_you_mean(unknown[0], HEADS) if unknown else ''} Correct it."
        )
    patch, latent, context = (config[f"{name}_width"] for name in ("patch", "latent", "context"))
    widths = {
        "read": min(latent, patch),
        "write": min(latent, patch),
        "context": min(latent, context),
        "global": latent,
        "local": patch,
    }
    found: dict[str, tuple[int, int]] = {}
    for name, width in widths.items():
        kind = "latent" if name in ("context", "global") else "patch"
        size = config[f"{kind}_head_size"]
        if name in given:
            found[name] = (int(given[name][0]), int(given[name][1]))
        elif width % size == 0:
            found[name] = (width // size, size)
        else:
            raise ConfigError(
                f"model.{kind}_head_size is {size}, which does not divide the width {width} of "
                f"'{name}'. Change it, or give model.heads.{name}=[number, size]."
            )
    return found


def check_clip(model: Backbone, x: Tensor, t: Tensor, cond: Conditioning) -> None:
    """Check the shapes of a network's inputs against each other.

    Raises:
        ValueError: they do not fit together.
    """
    channels, name = model.config["in_channels"], type(model).__name__
    if x.dim() not in (4, 5) or x.shape[1] != channels:
        raise ValueError(
            f"{name} takes x of shape (B, {channels}, T, H, W) or (B, {channels}, H, W), but "
            f"{tuple(x.shape)} was given. Give clips with as many channels as model.in_channels."
        )
    if t.shape not in ((len(x),), (1,)):
        raise ValueError(
            f"t must have shape ({len(x)},), or (1,) when shared, but has {tuple(t.shape)}. "
            "Give one time a sample."
        )
    wanted = {
        "labels": (len(x),),
        "size": (len(x), 2),
        "frame_rate": (len(x),),
        "reference_level": (len(x),),
    }
    for field, shape in wanted.items():
        value = getattr(cond, field)
        if value is not None and value.shape != shape:
            raise ValueError(
                f"cond.{field} must have shape {shape}, but has {tuple(value.shape)}. "
                "Give one row a sample."
            )
    reference, count = cond.reference, model.config["reference_channels"]
    if count and reference is not None:
        fits = reference.dim() in (4, 5) and reference.shape[:2] == (len(x), count)
        if not fits:
            raise ValueError(
                f"cond.reference must have shape ({len(x)}, {count}, [T,] H, W), but has "
                f"{tuple(reference.shape)}. Give as many channels as model.reference_channels."
            )


def with_memory(
    latents: Tensor, past: SelfConditioning, memory: Any, *, batch: int, groups: int = 1
) -> Tensor:
    """Return the latents ``(B, L, D)`` with which a call begins.

    Args:
        latents: the learned ones, ``(L, D)``.
        past: adds those of an earlier call.
        memory: None, or ``{"latents": (B, L, D), "known": (B,) bool}``.
        batch: B.
        groups: among which they are shared out.

    Raises:
        ConfigError: the groups do not divide them.
        ValueError: the memory has another shape.
    """
    check_latents(len(latents), groups)
    start = latents.expand(batch, *latents.shape)
    if memory is None:
        return start
    before, known = memory["latents"], memory["known"]
    if before.shape != start.shape or known.shape != (batch,):
        raise ValueError(
            f"memory must hold latents {tuple(start.shape)} and known {(batch,)}, but holds "
            f"{tuple(before.shape)} and {tuple(known.shape)}. Give what the same model returned."
        )
    return past(start, before, known)
