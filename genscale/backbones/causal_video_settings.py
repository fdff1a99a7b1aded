"""What the block-causal video transformer checks of its settings and inputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from genscale.backbones.base import Backbone
from genscale.backbones.shapes import check_choice, check_heads, check_positive
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.layers.block_mask import block_spans
from genscale.layers.video_cache import VIDEO_CACHE


def check_clips(
    model: Backbone,
    x: Tensor,
    t: Tensor,
    cond: Conditioning,
    memory: dict[str, Any] | None,
    clean: Tensor | None,
) -> None:
    """Check the shapes of a call against each other and the model's config.

    Raises:
        ValueError: they do not fit together.
    """
    channels, side = model.config["in_channels"], model.config["patch_size"]
    if x.dim() != 5 or x.shape[1] != channels:
        raise ValueError(
            f"CausalVideo takes x of shape (B, {channels}, F, H, W), but {tuple(x.shape)} was "
            "given. Give clips with as many channels as model.in_channels."
        )
    if x.shape[3] % side or x.shape[4] % side:
        raise ValueError(
            f"Height and width must be multiples of {side}, the patch, but x is "
            f"{x.shape[3]} x {x.shape[4]}. Pad, crop or resize it."
        )
    batch, frames = len(x), x.shape[2]
    if t.shape not in ((batch,), (1,), (batch, frames), (1, frames)):
        raise ValueError(
            f"t must have shape ({batch},) or (1,), or with a time a frame ({batch}, {frames}) "
            f"or (1, {frames}), but has {tuple(t.shape)}."
        )
    if cond.labels is not None and cond.labels.shape != (batch,):
        raise ValueError(
            f"cond.labels must have shape ({batch},), but has {tuple(cond.labels.shape)}. "
            "Give one label a sample."
        )
    if clean is not None and (memory is not None or clean.shape != x.shape):
        raise ValueError(
            "Finished frames come either as clean, of x's shape "
            f"{tuple(x.shape)}, or in memory; clean has {tuple(clean.shape)} and memory is "
            f"{'not ' if memory is not None else ''}None. Give one of them."
        )
    if memory is not None:
        buffer: Tensor = memory[VIDEO_CACHE]["keys"][0]
        tokens = (x.shape[3] // side) * (x.shape[4] // side)
        if (len(buffer), buffer.shape[3]) != (batch, tokens):
            raise ValueError(
                f"The memory is of {len(buffer)} videos with {buffer.shape[3]} tokens a "
                f"frame, but x is of {batch} with {tokens}. Begin one for x's shape."
            )


def check_settings(config: Any) -> None:
    """Check that settings fit together.

    Raises:
        ConfigError: they do not.
    """
    names = ("in_channels", "patch_size", "depth", "mlp_size", "frequency_size", "block_size")
    check_positive(config, *names, "hidden_size", "bank_local")
    check_heads(config["hidden_size"], config["num_heads"])
    check_choice("cache", config["cache"], ("full", "rolling", "semantic"))
    check_choice("positions", config["positions"], ("auto", "absolute", "relative"))
    check_choice("position_resize", config["position_resize"], ("interpolate", "extend"))
    check_choice("attention", config["attention"], ("blocks", "flex"))
    size, side = list(config["input_size"]), config["patch_size"]
    if len(size) != 3 or min(size) < 1 or size[1] % side or size[2] % side:
        raise ConfigError(
            f"model.input_size must be [frames, height, width] with sides that are multiples of "
            f"model.patch_size={side}, but is {size}. Change one of them."
        )
    try:
        block_spans(size[0], config["block_size"], short_first=config["independent_first_frame"])
    except ValueError as error:
        raise ConfigError(f"model.input_size has {size[0]} frames. {error}") from None
    head_size = config["hidden_size"] // config["num_heads"]
    if head_size % 2 or head_size < 6:
        raise ConfigError(
            f"Heads must have an even number of channels, 6 at least, to turn with three axes, but "
            f"model.hidden_size={config['hidden_size']} and model.num_heads={config['num_heads']} "
            f"give {head_size}. Change one of them."
        )
    if config["frequency_size"] % 2:
        raise ConfigError(
            f"model.frequency_size must be even, half sines and half cosines, but is "
            f"{config['frequency_size']}. Give {config['frequency_size'] + 1}."
        )
    if config["text_size"] < 0 or (config["text_size"] and config["num_text_tokens"] < 1):
        raise ConfigError(
            f"model.text_size={config['text_size']} and model.num_text_tokens="
            f"{config['num_text_tokens']} must be positive, or model.text_size=0 for a model "
            "without text. Give the sizes of the text encoder."
        )
    if not 0 < config["bank_share"] <= 1:
        raise ConfigError(
            f"model.bank_share must lie in (0, 1], but is {config['bank_share']}. "
            "The paper has 0.97 to 0.98."
        )
    _check_windows(config, size[0])


def _check_windows(config: Any, frames: int) -> None:
    block_size, sink = config["block_size"], config["sink"]
    for name in ("window", "cache_window"):
        window = config[name] or (config["window"] or frames if name == "cache_window" else 0)
        used = config["cache"] == "rolling" if name == "cache_window" else window > 0
        if used and (window < sink + block_size or sink < 0):
            raise ConfigError(
                f"model.{name} of {window} frames has no room for model.sink={sink} and a block of "
                f"model.block_size={block_size}. Give {sink + block_size} or more."
            )
    if config["cache"] == "semantic" and sink not in _chunk_ends(config, frames):
        raise ConfigError(
            f"model.cache=semantic keeps whole chunks, but model.sink={sink} ends inside one of "
            f"{block_size} frames. Give 0 or {block_size}."
        )


def _chunk_ends(config: Any, frames: int) -> list[int]:
    short = config["independent_first_frame"]
    spans = block_spans(frames, config["block_size"], short_first=short)
    return [0, *(stop for _, stop in spans)]
