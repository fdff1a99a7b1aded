"""From pictures as they are stored to uint8 tensors of one size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from genscale.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL import Image

_CHUNK_VALUES = 1 << 24  # float64 values a resize works on at once: 128 MiB
_LARGEST = 4 << 30  # bytes of a data set that is held in memory


def resize(pixels: Tensor, resolution: int) -> Tensor:
    """Resize grey levels 0..255 with a bicubic filter, anti-aliased when they shrink.

    Computed in float64, clipped to 0..255 and rounded half up, so that the result does not
    depend on how many pictures are resized together.

    Args:
        pixels: ``(n, C, H, W)``, uint8 or floating point in 0..255.
        resolution: height and width of the result.

    Returns:
        uint8 ``(n, C, resolution, resolution)``; ``pixels`` itself where nothing is to be done.

    Raises:
        ConfigError: if the result would not fit into 4 GiB.
    """
    count, channels, height, width = pixels.shape
    if pixels.dtype == torch.uint8 and (height, width) == (resolution, resolution):
        return pixels
    values = channels * resolution * resolution
    if count * values > _LARGEST:
        fitting = int((_LARGEST / (count * channels)) ** 0.5)
        raise ConfigError(
            f"{count} pictures at data.resolution={resolution} would take "
            f"{count * values / 2**30:.1f} GiB of memory, and 4 are allowed. Choose at most "
            f"{fitting} pixels, or write the pictures to files and read them with "
            "data=image_folder."
        )
    result = torch.empty(count, channels, resolution, resolution, dtype=torch.uint8)
    step = max(1, _CHUNK_VALUES // max(values, channels * height * width))
    for start in range(0, count, step):
        part = F.interpolate(
            pixels[start : start + step].double(),
            size=(resolution, resolution),
            mode="bicubic",
            align_corners=False,
            antialias=resolution < min(height, width),
        )
        result[start : start + step] = (part + 0.5).floor_().clamp_(0, 255).to(torch.uint8)
    return result


def with_channels(grey: Tensor, channels: int) -> Tensor:
    """Show grey pictures ``(n, 1, H, W)`` with 1 or 3 channels, without copying."""
    return grey.expand(-1, channels, -1, -1)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture of any Pillow mode to 8-bit RGB, upright.

    The orientation noted in EXIF is applied. Transparency (RGBA, LA, a transparent palette
    colour) is laid on white. 16-bit grey is scaled by 255 / 65535 and rounded half up (Pillow
    itself reads 16-bit RGB as the high byte). CMYK, YCbCr and Lab take Pillow's conversion. Of an
    animation the first frame counts.

    Raises:
        DataError: if the picture holds floating point or 32-bit integer values, for which no
            range is known.
    """
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        # an RGB or grey PNG may name one colour as transparent: it then has no alpha channel
        if "transparency" not in image.info:
            return image
    elif image.mode.startswith("I"):
        return _from_deep_grey(image)
    elif image.mode == "F":
        raise DataError(
            "The picture holds floating point values, and 8 or 16 bits a channel were expected. "
            "Convert it to PNG."
        )
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """Bring 16-bit grey (mode ``I;16`` or, from some files, ``I``) to 8-bit RGB."""
    from PIL import Image

    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise DataError(
            f"The picture holds integers from {values.min()} to {values.max()}, and at most 16 "
            "bits (0 to 65535) were expected. Convert it to PNG."
        )
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")


def center_crop(image: Image.Image, size: int | tuple[int, int]) -> Image.Image:
    """Crop the centre as ADM's ImageNet pipeline does with squares (arXiv:2105.05233).

    Halve with a BOX filter while both sides are at least twice what is wanted; resize with BICUBIC
    so that the picture just covers it; cut out the centre. Halving first keeps the filter of
    the last resize small, and the reference statistics of ADM depend on it.

    Args:
        image: any size, larger or smaller than ``size``.
        size: height and width of the result, or one number for both.
    """
    from PIL import Image

    high, wide = (size, size) if isinstance(size, int) else size
    while image.size[0] >= 2 * wide and image.size[1] >= 2 * high:
        image = image.resize(
            (image.size[0] // 2, image.size[1] // 2), resample=Image.Resampling.BOX
        )
    scale = max(wide / image.size[0], high / image.size[1])
    # parity: round() is to even at a half, as in the official crop
    width, height = (round(side * scale) for side in image.size)
    image = image.resize((width, height), resample=Image.Resampling.BICUBIC)
    left, top = (width - wide) // 2, (height - high) // 2
    return image.crop((left, top, left + wide, top + high))


def to_tensor(image: Image.Image, channels: int) -> Tensor:
    """Return an RGB picture as uint8 ``(channels, H, W)``; 1 channel is Pillow's luma (BT.601)."""
    array = np.array(image.convert("L" if channels == 1 else "RGB"))
    return torch.from_numpy(array).reshape(*array.shape[:2], channels).permute(2, 0, 1).contiguous()
