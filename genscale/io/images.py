"""Pictures at the edge of the program: 8-bit conversion, PNG, grids to look at, ADM's npz."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from genscale.errors import DataError
from genscale.io.files import atomic_write

if TYPE_CHECKING:
    from PIL import Image, ImageFont

_CELL = 96  # a tiny picture is enlarged by whole factors to about this many pixels,
_WIDEST = 2048  # unless the grid would grow wider than this
_GUTTER = 4
_TEXT_SIZE = 13
_TITLE_SIZE = 17
_PAPER, _INK = (255, 255, 255), (40, 40, 40)


def to_uint8(images: Tensor, *, quantize: Literal["round", "truncate"] = "round") -> Tensor:
    """Quantise images in [-1, 1] to 8 bits; values outside are clipped.

    ``"round"`` computes floor(127.5 (x + 1) + 0.5), round half up. ``"truncate"`` drops the last
    half as ADM's sampler does (arXiv:2105.05233); the two differ by half a grey level on average,
    which a Frechet distance can see, so evaluation protocols name the rule.

    Args:
        images: floating point, any shape.
        quantize: the rule.

    Returns:
        uint8, same shape and device.

    Raises:
        DataError: if a value is NaN or infinite (this waits for the device).
        ValueError: if the rule is unknown or ``images`` is not floating point.
    """
    if quantize not in ("round", "truncate"):
        raise ValueError(f"quantize='{quantize}' is unknown. Choose 'round' or 'truncate'.")
    if not images.is_floating_point():
        raise ValueError(f"Images in [-1, 1] are floating point, but these are {images.dtype}.")
    finite = torch.isfinite(images)
    if not bool(finite.all()):
        raise DataError(
            f"{int((~finite).sum())} of {images.numel()} pixel values are NaN or infinite, and "
            "numbers in [-1, 1] were expected. The model diverged, or a dtype overflowed: try "
            "float32."
        )
    levels = (images.float() + 1) * 127.5
    if quantize == "round":
        levels = (levels + 0.5).floor()
    return levels.clamp(0, 255).to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """Map 8-bit images to float32 in [-1, 1]: x / 127.5 - 1; :func:`to_uint8` inverts it exactly.

    Raises:
        ValueError: if ``images`` is not uint8.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"8-bit images are uint8, but these are {images.dtype}.")
    return images.float() / 127.5 - 1


def save_png(path: str | Path, image: Tensor) -> None:
    """Write one picture as PNG, atomically.

    Args:
        path: file to write.
        image: ``(C, H, W)`` or ``(1, C, H, W)`` with 1 or 3 channels, uint8 or floating point in
            [-1, 1].
    """
    picture = to_pil(_as_batch(image)[0])
    with atomic_write(path) as temporary:
        picture.save(temporary, format="PNG")


def grid_image(
    images: Tensor,
    *,
    columns: int | None = None,
    captions: Sequence[str] | None = None,
    caption_lines: int = 1,
    row_labels: Sequence[str] | None = None,
    scale: int | None = None,
    title: str | None = None,
) -> Image.Image:
    """Lay pictures out on white paper, row by row.

    Args:
        images: ``(n, C, H, W)`` with 1 or 3 channels, uint8 or floating point in [-1, 1].
        columns: pictures a row; by default a count near the square root that fills all rows.
        captions: one a picture, drawn below it and shortened to its width.
        caption_lines: lines that a caption may take before it is shortened.
        row_labels: one a row, drawn to its left.
        scale: whole factor by which pictures are enlarged without smoothing; by default tiny
            pictures are brought to about 96 pixels.
        title: a line above the grid.

    Returns:
        RGB picture.

    Raises:
        ValueError: if there are no images, or captions or row labels do not match in number.
    """
    from PIL import Image, ImageDraw

    pictures = _as_batch(images)
    count, _, height, width = pictures.shape
    columns = columns or _columns(count)
    rows = math.ceil(count / columns)
    for words, expected, what in ((captions, count, "picture"), (row_labels, rows, "row")):
        if words is not None and len(words) != expected:
            raise ValueError(f"{len(words)} texts were given for {expected}. Give one a {what}.")
    scale = scale or _scale(max(height, width), width, columns)
    cell_width, cell_height = width * scale, height * scale

    text, heading = _font(_TEXT_SIZE), _font(_TITLE_SIZE)
    line = _TEXT_SIZE + 5
    below = [_in_lines(caption, cell_width, caption_lines, text) for caption in captions or ()]
    lines = max((len(each) for each in below), default=0)
    left = _GUTTER
    if row_labels is not None:
        left += max(math.ceil(text.getlength(word)) for word in row_labels) + 2 * _GUTTER
    top = _GUTTER + (_TITLE_SIZE + 12 if title else 0)
    step_x = cell_width + _GUTTER
    step_y = cell_height + _GUTTER + lines * line
    total_width = left + columns * step_x
    if title:
        total_width = max(total_width, math.ceil(heading.getlength(title)) + 4 * _GUTTER)

    paper = Image.new("RGB", (total_width, top + rows * step_y), _PAPER)
    draw = ImageDraw.Draw(paper)
    if title:
        draw.text((2 * _GUTTER, _GUTTER + 2), title, fill=_INK, font=heading)
    for index in range(count):
        row, column = divmod(index, columns)
        x, y = left + column * step_x, top + row * step_y
        picture = to_pil(pictures[index]).resize(
            (cell_width, cell_height), Image.Resampling.NEAREST
        )
        paper.paste(picture, (x, y))
        for number, words in enumerate(below[index] if below else ()):
            place = (x + cell_width // 2, y + cell_height + 2 + number * line)
            draw.text(place, words, fill=_INK, font=text, anchor="ma")
    for row, word in enumerate(row_labels or ()):
        middle = top + row * step_y + cell_height // 2
        draw.text((left - 2 * _GUTTER, middle), word, fill=_INK, font=text, anchor="rm")
    return paper


def save_grid(
    images: Tensor,
    path: str | Path,
    *,
    columns: int | None = None,
    captions: Sequence[str] | None = None,
    caption_lines: int = 1,
    row_labels: Sequence[str] | None = None,
    scale: int | None = None,
    title: str | None = None,
) -> None:
    """Write a grid of pictures as PNG, atomically; the arguments are :func:`grid_image`'s."""
    grid = grid_image(
        images,
        columns=columns,
        captions=captions,
        caption_lines=caption_lines,
        row_labels=row_labels,
        scale=scale,
        title=title,
    )
    with atomic_write(path) as temporary:
        grid.save(temporary, format="PNG")


def channels_last(images: Tensor) -> Tensor:
    """Return pictures ``(n, C, H, W)`` or clips ``(n, C, T, H, W)`` as files hold them: C last."""
    return images.movedim(1, -1).contiguous()


def channels_first(images: Tensor) -> Tensor:
    """Undo :func:`channels_last`."""
    return images.movedim(-1, 1).contiguous()


def save_npz(
    path: str | Path,
    images: Tensor | np.ndarray,
    labels: Tensor | np.ndarray | None = None,
) -> None:
    """Write samples as ADM's evaluation suite reads them (arXiv:2105.05233), atomically.

    ``arr_0`` is uint8 ``(n, H, W, 3)``, of clips ``(n, T, H, W, 3)`` (grey is repeated),
    ``arr_1``, where labels are given, int64 ``(n,)``. Not compressed, as ADM's own files are not.

    Args:
        path: file to write; its name should end in ``.npz``.
        images: uint8 ``(n, H, W, C)``, or clips ``(n, T, H, W, C)``, with 1 or 3 channels, which
            come last; see :func:`channels_last`.
        labels: ``(n,)`` integers, or None.

    Raises:
        DataError: if images or labels have another layout.
    """
    pixels = _numpy(images)
    _check_pixels(pixels, Path(path), channels=(1, 3))
    if pixels.shape[-1] == 1:
        pixels = np.repeat(pixels, 3, axis=-1)
    arrays = {"arr_0": pixels}
    if labels is not None:
        classes = _numpy(labels)
        _check_labels(classes, len(pixels), Path(path))
        arrays["arr_1"] = classes.astype(np.int64)
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def load_npz(path: str | Path) -> tuple[Tensor, Tensor | None]:
    """Read samples in ADM's layout; nothing in the file is executed.

    Args:
        path: an npz with ``arr_0`` and optionally ``arr_1``; other arrays (``mu``, ``sigma`` of a
            reference file) are not read.

    Returns:
        Images uint8 ``(n, H, W, 3)``, or clips ``(n, T, H, W, 3)``, channels last, and labels
        int64 ``(n,)`` or None.

    Raises:
        FileNotFoundError: if there is no such file.
        DataError: if it is damaged or has another layout; the sentence says which.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file {path}. Give an npz with arr_0 (uint8, n x H x W x 3)."
        )
    pixels, classes = _read_npz(path)
    _check_pixels(pixels, path, channels=(3,))
    if classes is None:
        return torch.from_numpy(pixels), None
    _check_labels(classes, len(pixels), path)
    return torch.from_numpy(pixels), torch.from_numpy(classes.astype(np.int64))


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Read ``arr_0`` and ``arr_1``, whatever they hold, or say what is wrong with the file."""
    with open(path, "rb") as file:
        magic = file.read(6)
    if magic == b"\x93NUMPY":
        raise DataError(
            f"{path} holds a single array, and an npz archive with arr_0 was expected. "
            "Write it with numpy.savez."
        )
    damaged = f"{path} is damaged or not an npz ({{}}). Copy it again, or write it anew."
    if magic[:2] != b"PK":  # numpy would take anything else for a pickle
        raise DataError(damaged.format("it does not begin as a zip archive"))
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = archive.files
            read = {name: archive[name] for name in ("arr_0", "arr_1") if name in found}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
        if "Object arrays" in str(error):
            raise DataError(
                f"{path} holds Python objects, which would have to be executed to be read, and "
                "plain arrays were expected. Write arr_0 as uint8 and arr_1 as integers."
            ) from error
        raise DataError(damaged.format(error)) from error
    if "arr_0" not in read:
        raise DataError(
            f"{path} has no arr_0 (found: {', '.join(found) or 'nothing'}). "
            "Samples are uint8 images n x H x W x 3 under the name arr_0, clips n x T x H x W x 3."
        )
    for name, value in read.items():
        if not isinstance(value, np.ndarray):  # numpy hands a member that is no .npy out as bytes
            raise DataError(damaged.format(f"{name} is no array"))
    return read["arr_0"], read.get("arr_1")


def _check_pixels(pixels: np.ndarray, path: Path, channels: tuple[int, ...]) -> None:
    wanted = "uint8 of shape (n, H, W, 3) or, of clips, (n, T, H, W, 3), channels last"
    given = f"{pixels.dtype} of shape {pixels.shape}"
    if pixels.dtype != np.uint8:
        hint = "Quantise images in [-1, 1] with genscale.io.images.to_uint8."
    elif pixels.ndim not in (4, 5) or pixels.shape[-1] not in channels:
        is_first = pixels.ndim in (4, 5) and pixels.shape[1] in (1, 3)
        order = (0, *range(2, pixels.ndim), 1)
        hint = (
            f"The channels come first: transpose with array.transpose{order}."
            if is_first
            else "Repeat grey three times and lay transparency on white."
        )
    elif 0 in pixels.shape:
        hint = "It holds no pixels: write at least one image."
    else:
        return
    raise DataError(f"arr_0 of {path} must be {wanted}, but is {given}. {hint}")


def _check_labels(classes: np.ndarray, count: int, path: Path) -> None:
    if classes.dtype.kind not in "iu" or classes.shape != (count,):
        raise DataError(
            f"arr_1 of {path} must be {count} integers, one label an image, but is "
            f"{classes.dtype} of shape {classes.shape}. Write one label an image or leave it out."
        )


def _numpy(values: Tensor | np.ndarray) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else values


def _as_batch(images: Tensor) -> Tensor:
    """Return ``(n, C, H, W)`` uint8 on the CPU from one picture or several."""
    batch = images.detach().unsqueeze(0) if images.dim() == 3 else images.detach()
    if batch.dim() != 4 or batch.shape[1] not in (1, 3) or len(batch) == 0:
        raise ValueError(
            f"Pictures have shape (n, C, H, W) with 1 or 3 channels, but these have "
            f"{tuple(images.shape)}."
        )
    return (batch if batch.dtype == torch.uint8 else to_uint8(batch)).cpu()


def to_pil(image: Tensor) -> Image.Image:
    """Return a uint8 ``(C, H, W)`` tensor on the CPU as a Pillow picture."""
    from PIL import Image

    array = image.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def _columns(count: int) -> int:
    """Return the smallest count from the square root to twice it that fills all rows."""
    root = math.ceil(math.sqrt(count))
    full = [c for c in range(root, min(count, 2 * root) + 1) if count % c == 0]
    return full[0] if full else root


def _scale(side: int, width: int, columns: int) -> int:
    fitting = (_WIDEST // columns - _GUTTER) // width
    return max(1, min(math.ceil(_CELL / side), fitting))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _in_lines(
    caption: str, width: int, most: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> list[str]:
    """Break a caption between words into ``most`` lines at most, the last one shortened.

    Words that are wider than the cell are shortened, too.
    """
    lines: list[str] = []
    words = caption.split(" ")
    while words and len(lines) < most - 1:
        taken = 1
        while taken < len(words) and font.getlength(" ".join(words[: taken + 1])) <= width:
            taken += 1
        lines.append(_shortened(" ".join(words[:taken]), width, font))
        words = words[taken:]
    return [*lines, _shortened(" ".join(words), width, font)] if words else lines


def _shortened(words: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Shorten words with dots until they fit."""
    shown = words
    while font.getlength(shown) > width and len(words) > 1:
        words = words[:-1]
        shown = words.rstrip() + ".."
    return shown
