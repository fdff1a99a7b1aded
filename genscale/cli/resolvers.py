"""The arithmetic that YAML may do: ``latent_size``, ``count``, ``div`` and the like; ``tokenizer``.

input_size: ${latent_size:${data.resolution},${autoencoder.downsample}}
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from genscale.errors import ConfigError, GenscaleError

Number = int | float


def latent_size(resolution: int | None, downsample: int) -> int | None:
    """Return the side of the latents of images of ``resolution`` pixels.

    Where the data tell the resolution once they are read, it is None until then, and so is this.

    Raises:
        ConfigError: ``downsample`` is not positive or does not divide ``resolution``.
    """
    if resolution is None:
        return None
    if downsample < 1 or resolution % downsample:
        raise ConfigError(
            f"A resolution of {resolution} does not divide by the autoencoder's downsample of "
            f"{downsample}. Give data.resolution as a multiple of it."
        )
    return resolution // downsample


def latent_frames(num_frames: int | None, autoencoder: Any) -> int | None:
    """Return the latent frames of clips: as many as frames, unless the autoencoder merges them.

    None where the data have yet to tell the number of frames.

    Args:
        num_frames: of the clips.
        autoencoder: its node.

    Raises:
        ConfigError: clips of the autoencoder cannot have so many frames.
    """
    from genscale.autoencoders.video_kinds import kind_of

    ratio = autoencoder.get("temporal_downsample")
    if num_frames is None or not num_frames or ratio is None:
        return num_frames
    return kind_of(autoencoder.kind).latent_frames(num_frames, ratio)


def scale_sides(resolution: int | None, downsample: int) -> list[int] | None:
    """Return the sides of a tokenizer's scales: 1, 2, 4 and so on up to the side of the latents.

    None where :func:`latent_size` is.

    Raises:
        ConfigError: see :func:`latent_size`.
    """
    side = latent_size(resolution, downsample)
    if side is None:
        return None
    return [2**power for power in range(side.bit_length()) if 2**power < side] + [side]


def div(dividend: Number, divisor: Number) -> Number:
    """Divide; two integers must divide without rest and give an integer.

    Raises:
        ConfigError: division by zero, or integers that leave a rest.
    """
    if divisor == 0:
        raise ConfigError(f"div was asked to divide {dividend} by 0. Give another divisor.")
    if isinstance(dividend, int) and isinstance(divisor, int):
        if dividend % divisor:
            raise ConfigError(
                f"div was asked for {dividend} / {divisor}, which is no whole number. "
                f"Give a multiple of {divisor}, or write {float(dividend)} for a fraction."
            )
        return dividend // divisor
    return dividend / divisor


def mul(*factors: Number) -> Number:
    """Return the product of all factors."""
    return math.prod(factors)


def share(total: int, part: float) -> int:
    """Return a part of a whole number, rounded down: ``${share:${trainer.max_steps},0.2}``.

    Raises:
        ConfigError: a part outside [0, 1].
    """
    if not 0.0 <= part <= 1.0:
        raise ConfigError(f"share was asked for {part} of {total}. Give a number in [0, 1].")
    return int(total * part)


def count(items: Sequence[Any] | None) -> int | None:
    """Return how many items a list has; None where there is no list yet."""
    return None if items is None else len(items)


def frames_of(input_size: int | Sequence[int] | None) -> int | None:
    """Return the frames of a network's input ``[frames, height, width]``; None of a picture's."""
    sizes = input_size if isinstance(input_size, Sequence) else ()
    return sizes[0] if len(sizes) == 3 else None


def tokenizer(run: str | None, setting: str, otherwise: Any) -> Any:
    """Return what a trained tokenizer says of itself, so that a network fits it.

    Args:
        run: its folder. Where there is none, or none of a tokenizer, ``otherwise`` is returned: the
            autoencoder's own check says so once, before anything is trained or sampled.
        setting: ``scales``, ``vocab_size``, ``latent_channels``, ``downsample`` or
            ``image_channels``.
        otherwise: what stands in.
    """
    if run is None:
        return otherwise
    from genscale.autoencoders.msvq_folder import holds_tokenizer, read_settings

    return read_settings(run)[setting] if holds_tokenizer(run) else otherwise


def trained(run: str | None, setting: str) -> Any:
    """Return what the autoencoder that a run trained says of itself.

    None where there is no run or none of an autoencoder, which is told before anything is built.

    Args:
        run: its folder.
        setting: ``latent_channels``, ``downsample`` or ``image_channels``.
    """
    if run is None:
        return None
    from genscale.cli.trained_autoencoders import trained_node

    try:
        return trained_node(run)[setting]
    except GenscaleError:
        return None


def register_resolvers() -> None:
    """Make them known to OmegaConf; may be called any number of times."""
    from omegaconf import OmegaConf

    for resolver in (
        latent_size,
        latent_frames,
        scale_sides,
        share,
        count,
        frames_of,
        div,
        mul,
        tokenizer,
        trained,
    ):
        OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)
