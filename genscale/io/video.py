"""Clips at the edge of the program: WebP, GIF, MP4, contact sheets, grids that play.

A clip is uint8 ``(C, T, H, W)``; several are ``(n, C, T, H, W)``. As arrays they are written by
:func:`~genscale.io.images.save_npz`, and their frames as pictures by
:func:`~genscale.io.images.save_png`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from genscale.errors import require
from genscale.io.files import atomic_write
from genscale.io.images import grid_image, save_grid, save_png, to_pil, to_uint8

if TYPE_CHECKING:
    from PIL import Image

DEFAULT_RATE = 8.0  # frames a second of clips whose frame rate is not known
_SHEET_WIDEST, _SHEET_FRAMES = 2048, 16  # pixels and frames of a contact sheet's row
_ONE_COLUMN = 16  # more clips than this stand side by side where they fit
_CELL = 96  # frames of a contact sheet are enlarged to about this many pixels
_PLAYED_WIDEST, _PLAYED_FRAMES = 1024, 128  # of a grid that plays: it is looked at in reports
_PLAYED_QUALITY = 80


def is_clips(images: Tensor) -> bool:
    """Return whether a batch holds clips ``(n, C, T, H, W)`` rather than pictures."""
    return images.dim() == 5


def playback_rate(frame_rate: float | None) -> float:
    """Return at how many frames a second to show clips.

    Args:
        frame_rate: what is known; None is not known, and infinity is a still picture repeated.
    """
    known = frame_rate is not None and math.isfinite(frame_rate) and frame_rate > 0
    return float(frame_rate) if known and frame_rate is not None else DEFAULT_RATE


def save_webp(
    path: str | Path, clip: Tensor, frame_rate: float | None = None, *, quality: int | None = None
) -> None:
    """Write a clip as an animated WebP that plays for ever, atomically.

    Args:
        path: file to write.
        clip: ``(C, T, H, W)`` with 1 or 3 channels, uint8 or floating point in [-1, 1].
        frame_rate: frames a second; see :func:`playback_rate`.
        quality: 0 to 100, the file then shrinks; None keeps every pixel.
    """
    _write_webp(path, _frames(clip), playback_rate(frame_rate), quality)


def save_gif(path: str | Path, clip: Tensor, frame_rate: float | None = None) -> None:
    """Write a clip as a GIF that plays for ever, atomically; the arguments are of save_webp.

    A GIF has 256 colours a frame and counts time in hundredths of a second: frames last a whole
    number of them, and the clip as a whole as long as it should.
    """
    frames = _frames(clip)
    lasting = _durations(len(frames), playback_rate(frame_rate), unit=10)
    with atomic_write(path) as temporary:
        frames[0].save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=frames[1:],
            duration=lasting,
            loop=0,
        )


def save_mp4(path: str | Path, clip: Tensor, frame_rate: float | None = None) -> None:
    """Write a clip as H.264 in MP4, atomically; the arguments are of save_webp.

    The format wants even sides: an odd one grows by one line, the last one repeated.

    Raises:
        ImportError: PyAV is not installed.
    """
    av: Any = require_mp4()
    pixels = _uint8(clip).permute(1, 2, 3, 0)  # (T, H, W, C)
    array = pixels.expand(*pixels.shape[:3], 3).numpy()
    odd = [(0, side % 2) for side in array.shape[1:3]]
    array = np.ascontiguousarray(np.pad(array, ((0, 0), *odd, (0, 0)), mode="edge"))
    rate = Fraction(playback_rate(frame_rate)).limit_denominator(1001)
    with atomic_write(path) as temporary, av.open(str(temporary), "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=rate, options={"crf": "17"})
        stream.height, stream.width = array.shape[1:3]
        stream.pix_fmt = "yuv420p"  # what every player knows
        for frame in array:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)


def require_mp4() -> object:
    """Return PyAV, or raise an ``ImportError`` that says how to install it."""
    return require("av", what="format=mp4", extra="video")


PLAYERS: dict[str, Callable[[Path, Tensor, float | None], None]] = {
    "webp": save_webp,
    "gif": save_gif,
    "mp4": save_mp4,
}
"""What writes one clip a file, by the ending of the file."""


def save_frames(folder: str | Path, clip: Tensor) -> None:
    """Write the frames of a clip ``(C, T, H, W)`` as PNG files of a folder, counted from 0."""
    folder = Path(folder)
    width = max(len(str(clip.shape[1] - 1)), 3)
    for number, frame in enumerate(clip.unbind(1)):
        save_png(folder / f"{number:0{width}d}.png", frame)


def contact_sheet(clips: Tensor, *, captions: Sequence[str] | None = None) -> Image.Image:
    """Lay the frames of clips out on white paper: a row a clip, a column a frame.

    Of more frames than can be seen, some are drawn that lie evenly between the first and the
    last, and a line above says which.

    Args:
        clips: ``(n, C, T, H, W)`` with 1 or 3 channels, uint8 or floating point in [-1, 1].
        captions: one a clip, drawn below its frames and shortened to their width.

    Returns:
        RGB picture.

    Raises:
        ValueError: no clips, or not as many captions.
    """
    count, channels, length, height, width = _check(clips).shape
    most = max(min(_SHEET_FRAMES, _SHEET_WIDEST // (width + 1)), min(4, length))
    shown = torch.linspace(0, length - 1, min(length, most)).round().long()
    frames = _uint8(clips)[:, :, shown]
    # one column of white between frames, which grows with them
    row = frames.new_full((count, channels, height, len(shown) * (width + 1) - 1), 255)
    for number in range(len(shown)):
        start = number * (width + 1)
        row[..., start : start + width] = frames[:, :, number]
    scale = max(1, min(math.ceil(_CELL / max(height, width)), _SHEET_WIDEST // row.shape[-1]))
    columns = 1 if count <= _ONE_COLUMN else max(1, _SHEET_WIDEST // (row.shape[-1] * scale))
    numbers = ", ".join(str(number) for number in shown.tolist())
    title = None if len(shown) == length else f"frames {numbers} of {length}, counted from 0"
    return grid_image(row, columns=columns, captions=captions, scale=scale, title=title)


def save_animated_grid(
    clips: Tensor,
    path: str | Path,
    *,
    frame_rate: float | None = None,
    columns: int | None = None,
    captions: Sequence[str] | None = None,
    caption_lines: int = 1,
) -> None:
    """Write clips side by side as one WebP that plays, atomically.

    It is made to be looked at: compressed, at most 1024 pixels wide, and of a clip of more than
    128 frames only every second, third, ... is shown, at the clip's own pace.

    Args:
        clips: ``(n, C, T, H, W)`` with 1 or 3 channels, uint8 or floating point in [-1, 1].
        path: file to write.
        frame_rate: frames a second; see :func:`playback_rate`.
        columns: as of :func:`~genscale.io.images.grid_image`, as are the others.
        captions: one a clip.
        caption_lines: lines that a caption may take.
    """
    stride = math.ceil(_check(clips).shape[2] / _PLAYED_FRAMES)
    grids = []
    for frame in _uint8(clips)[:, :, ::stride].unbind(2):
        grid = grid_image(frame, columns=columns, captions=captions, caption_lines=caption_lines)
        grids.append(fit_width(grid, _PLAYED_WIDEST))
    _write_webp(path, grids, playback_rate(frame_rate) / stride, _PLAYED_QUALITY)


def fit_width(picture: Image.Image, widest: int) -> Image.Image:
    """Shrink a picture that is wider than ``widest`` pixels to that width, smoothly."""
    from PIL import Image

    if picture.width <= widest:
        return picture
    height = max(round(picture.height * widest / picture.width), 1)
    return picture.convert("RGB").resize((widest, height), Image.Resampling.LANCZOS)


def save_overview(
    images: Tensor,
    path: str | Path,
    *,
    frame_rate: float | None = None,
    columns: int | None = None,
    captions: Sequence[str] | None = None,
    caption_lines: int = 1,
) -> None:
    """Write what a set of samples looks like: a grid; of clips a contact sheet and one that plays.

    Args:
        images: ``(n, C, H, W)``, or clips ``(n, C, T, H, W)``, uint8 or in [-1, 1].
        path: PNG to write; the grid that plays has its name and ends in ``.webp``.
        frame_rate: frames a second; see :func:`playback_rate`.
        columns: samples a row of the grids.
        captions: one a sample.
        caption_lines: lines that a caption may take in the grids.
    """
    path = Path(path)
    if not is_clips(images):
        save_grid(images, path, columns=columns, captions=captions, caption_lines=caption_lines)
        return
    sheet = contact_sheet(images, captions=captions)
    with atomic_write(path) as temporary:
        sheet.save(temporary, format="PNG")
    save_animated_grid(
        images,
        path.with_suffix(".webp"),
        frame_rate=frame_rate,
        columns=columns,
        captions=captions,
        caption_lines=caption_lines,
    )


def _write_webp(
    path: str | Path, frames: Sequence[Image.Image], rate: float, quality: int | None
) -> None:
    with atomic_write(path) as temporary:
        frames[0].save(
            temporary,
            format="WEBP",
            save_all=True,
            append_images=frames[1:],
            duration=_durations(len(frames), rate, unit=1),
            loop=0,
            lossless=quality is None,
            quality=75 if quality is None else quality,  # lossless: effort, not loss
        )


def _durations(count: int, rate: float, *, unit: int) -> list[int]:
    """Return how many milliseconds each frame lasts, in whole units that do not drift."""
    ends = [round(number * 1000 / (rate * unit)) for number in range(count + 1)]
    return [max(end - start, 1) * unit for start, end in itertools.pairwise(ends)]


def _frames(clip: Tensor) -> list[Image.Image]:
    return [to_pil(frame) for frame in _uint8(_check(clip[None])[0]).unbind(1)]


def _uint8(clips: Tensor) -> Tensor:
    return (clips if clips.dtype == torch.uint8 else to_uint8(clips)).detach().cpu()


def _check(clips: Tensor) -> Tensor:
    if clips.dim() != 5 or clips.shape[1] not in (1, 3) or 0 in clips.shape:
        raise ValueError(
            f"Clips have shape (n, C, T, H, W) with 1 or 3 channels, but these have "
            f"{tuple(clips.shape)}."
        )
    return clips
