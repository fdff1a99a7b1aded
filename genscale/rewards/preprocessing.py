"""From pictures of any size to what CLIP and its kin were trained on, by one of two routes.

The official programs write pictures with 8 bits, resize them with Pillow (bicubic, antialiased,
rounded to 8 bits again) and normalise. That has no gradient, so a second route does the same on
tensors. Scores of the two differ by about 1e-3 to 1e-2 and never belong into one table, so the
route is a part of a reward's label.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.errors import DataError
from genscale.io.images import to_uint8

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """Resize, make square, normalise.

    Args:
        size: height and width of the result.
        exact: the official route, without gradient; else the differentiable one.
        fit: ``crop``: the shorter side becomes ``size`` and the centre is kept; ``pad``: the
            longer side does, and the rest is black.
        rounding: of a crop's half pixel: ``even`` as torchvision does, ``down`` as transformers.
        mean: of every channel, subtracted.
        std: of every channel, divided by.
    """

    size: int = 224
    exact: bool = False
    fit: Literal["crop", "pad"] = "crop"
    rounding: Literal["even", "down"] = "even"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    @property
    def label(self) -> str:
        """The route, as reports name it."""
        return "pil" if self.exact else "tensor"

    def __call__(self, images: Tensor) -> Tensor:
        """Prepare pictures.

        Args:
            images: ``(B, 1 or 3, H, W)`` in [0, 1]; grey ones are repeated to three channels.

        Returns:
            ``(B, 3, size, size)`` float32 on the pictures' device.

        Raises:
            DataError: another number of axes or channels.
        """
        images = as_unit_rgb(images)
        height, width = self._resized(*images.shape[2:])
        if self.exact:
            resized = _resize_pil(images, height, width)
        else:
            resized = resize_bicubic(images, height, width)
        square = self._cropped(resized) if self.fit == "crop" else self._padded(resized)
        mean, std = (square.new_tensor(each)[:, None, None] for each in (self.mean, self.std))
        return (square - mean) / std

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.fit == "crop":
            short = min(height, width)  # whole pixels are cut off, as torchvision does
            return self.size * height // short, self.size * width // short
        scale = self.size / max(height, width)
        return max(1, round(height * scale)), max(1, round(width * scale))

    def _cropped(self, images: Tensor) -> Tensor:
        top, left = (
            round((side - self.size) / 2) if self.rounding == "even" else (side - self.size) // 2
            for side in images.shape[2:]
        )
        return images[:, :, top : top + self.size, left : left + self.size]

    def _padded(self, images: Tensor) -> Tensor:
        rows, columns = (self.size - side for side in images.shape[2:])
        top, left = rows // 2, columns // 2
        return F.pad(images, (left, columns - left, top, rows - top))


def as_unit_rgb(images: Tensor) -> Tensor:
    """Return pictures as float32 with three channels.

    Raises:
        DataError: another number of axes or channels.
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise DataError(
            "Rewards of networks judge pictures of shape (B, 1 or 3, H, W), but got "
            f"{tuple(images.shape)}. Choose a reward for such data."
        )
    return images.float().expand(-1, 3, -1, -1)


def resize_bicubic(images: Tensor, height: int, width: int) -> Tensor:
    """Resize with the antialiased bicubic filter, differentiably.

    Values may overshoot [0, 1] a little: clipping would stop the gradient of white and black.
    """
    if images.shape[2:] == (height, width):
        return images
    return F.interpolate(
        images, (height, width), mode="bicubic", antialias=True, align_corners=False
    )


def to_pictures(images: Tensor) -> np.ndarray:
    """Return pictures ``(B, 3, H, W)`` in [0, 1] as 8-bit ``(B, H, W, 3)``, rounded half up."""
    return to_uint8(2.0 * images.detach() - 1.0).permute(0, 2, 3, 1).cpu().contiguous().numpy()


def _resize_pil(images: Tensor, height: int, width: int) -> Tensor:
    """Write pictures with 8 bits and resize them with Pillow, which rounds to 8 bits."""
    from PIL import Image

    resized = [
        np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))
        for picture in to_pictures(images)
    ]
    pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)
    return pixels.to(images.device).float() / 255.0
