"""Pictures inside the page, as data URIs."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from genscale.report.markup import Markup, element, void

MAX_PLAYED = 4_000_000  # bytes of a grid that plays; larger ones are left to their file
MAX_WIDTH = 1400  # pixels; wider grids are shrunk, or a page of them would weigh a hundred MB
_SMALL = 700  # pixels; narrower grids are enlarged with sharp pixels
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def picture(path: Path, caption: str, *, alt: str) -> Markup:
    """Return a PNG file as a figure; a damaged file becomes a plain sentence.

    Where the file is the contact sheet of clips, a WebP of its name lies beside it: what plays is
    shown before the sheet.

    Args:
        path: the file.
        caption: below it.
        alt: what it shows, for those who cannot see it.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        return element("p", f"{path.name} could not be read: {error.strerror}.", class_="missing")
    if not data.startswith(_SIGNATURE) or len(data) < 24:
        return element("p", f"{path.name} is no complete PNG file.", class_="missing")
    width = int.from_bytes(data[16:20], "big")  # of the IHDR chunk, always the first
    height = int.from_bytes(data[20:24], "big")
    if width > MAX_WIDTH:
        try:
            data, height = _shrink(data)
        except Exception as error:  # Pillow has many words for a damaged file
            return element("p", f"{path.name} is damaged: {error}.", class_="missing")
        caption = f"{caption} (shrunk from {width} pixels width)"
        width = MAX_WIDTH
    image = _image(data, "png", width, height, alt)
    parts = [*_played(path.with_suffix(".webp"), alt), image, element("figcaption", caption)]
    return element("figure", *parts, class_="picture")


def _played(path: Path, alt: str) -> list[Markup]:
    """Return the WebP of a path as an image, a sentence in its place, or nothing without one."""
    from PIL import Image

    if not path.is_file():
        return []
    size = path.stat().st_size
    if size > MAX_PLAYED:
        words = f"{path.name} plays the clips; its {size / 1e6:.0f} MB are not part of this page."
        return [element("p", words, class_="missing")]
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=["WEBP"]) as image:
            width, height = image.size
    except Exception as error:  # Pillow has many words for a damaged file
        return [element("p", f"{path.name} is damaged: {error}.", class_="missing")]
    return [_image(data, "webp", width, height, f"{alt}, playing")]


def _image(data: bytes, kind: str, width: int, height: int, alt: str) -> Markup:
    return void(
        "img",
        src=f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}",
        width=width,
        height=height,
        alt=alt,
        class_="sharp" if width < _SMALL else None,
    )


def _shrink(data: bytes) -> tuple[bytes, int]:
    """Shrink to :data:`MAX_WIDTH`; returns the PNG and its height."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        height = max(round(image.height * MAX_WIDTH / image.width), 1)
        small = image.convert("RGB").resize((MAX_WIDTH, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue(), height
