"""The files that samples are written to, one by one or all in an npz."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from genscale.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

PICTURE_FORMATS = ("grid", "png", "npz")
CLIP_FORMATS = (*PICTURE_FORMATS, "webp", "gif", "mp4")


def known_format(name: str) -> None:
    """Raise a ``ConfigError`` unless samples of some kind can be written in this format."""
    if name not in CLIP_FORMATS:
        raise ConfigError(
            f"format must be one of {', '.join(CLIP_FORMATS)}, but '{name}' was given."
            f"{did_you_mean(str(name), CLIP_FORMATS)}"
        )


def check_format(name: str, *, clips: bool) -> None:
    """Raise before anything is sampled unless samples can be written in a known format.

    Args:
        name: the format.
        clips: whether samples are clips.

    Raises:
        ConfigError: pictures were to be written as films.
        ImportError: a package is missing; the sentence says how to install it.
    """
    if name not in PICTURE_FORMATS and not clips:
        raise ConfigError(
            f"format={name} is for clips, but the model makes pictures. "
            f"Give format={', '.join(PICTURE_FORMATS[:-1])} or {PICTURE_FORMATS[-1]}."
        )
    if name == "mp4":
        from genscale.io.video import require_mp4

        require_mp4()


def write_samples(
    name: str,
    folder: Path,
    images: Tensor,
    labels: Tensor,
    captions: list[str] | None,
    *,
    frame_rate: float | None = None,
) -> Path:
    """Write every sample in a format; return the path to name.

    Args:
        name: the format; ``grid`` writes nothing, the overview is the grid.
        folder: where to.
        images: uint8 ``(n, C, H, W)``, or clips ``(n, C, T, H, W)``.
        labels: ``(n,)`` classes, -1 where there is none.
        captions: n prompts, or None.
        frame_rate: frames a second of clips, where known.
    """
    from genscale.io.images import channels_last, save_npz, save_png
    from genscale.io.video import PLAYERS, is_clips, save_frames

    if name == "grid":
        return folder / "grid.png"
    if name == "npz":
        path = folder / "samples.npz"
        known = bool((labels >= 0).all())
        save_npz(path, channels_last(images), labels if known else None)
        return path
    for number, image in enumerate(images):
        stem = folder / _stem(number, images, labels, captions)
        if name != "png":
            PLAYERS[name](stem.with_name(f"{stem.name}.{name}"), image, frame_rate)
        elif is_clips(images):
            save_frames(stem, image)
        else:
            save_png(stem.with_name(f"{stem.name}.png"), image)
    return folder


def _stem(number: int, images: Tensor, labels: Tensor, captions: list[str] | None) -> str:
    """Return a name that says what a sample was asked to be."""
    from genscale.prompts import as_file_name

    width = max(len(str(len(images) - 1)), 5)
    stem = f"{number:0{width}d}"
    if int(labels[number]) >= 0:
        stem += f"_class{int(labels[number])}"
    return stem if captions is None else f"{stem}_{as_file_name(captions[number])}"
