"""The three resizings behind published Inception numbers; they differ by whole FID points."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ResizeMode = Literal["tf1", "pytorch_fid", "clean"]
RESIZE_MODES: tuple[ResizeMode, ...] = ("tf1", "pytorch_fid", "clean")
RESIZE_NAMES = {  # how an evaluation protocol calls them
    "tf1": "tf1_bilinear",
    "pytorch_fid": "torch_bilinear",
    "clean": "pil_bicubic_antialias",
}


def resize_tf1_bilinear(images: Tensor, size: int) -> Tensor:
    """Resize as the 2015 TensorFlow graph does: no half-pixel centres, no antialiasing.

    Destination pixel i reads source position i * (in / out), in float32; horizontally first.

    Args:
        images: float32 ``(B, C, H, W)``.
        size: height and width of the result.
    """
    columns, next_columns, column_weight = _tf1_taps(images.shape[3], size, images.device)
    left = images[..., columns]
    images = left + (images[..., next_columns] - left) * column_weight
    rows, next_rows, row_weight = _tf1_taps(images.shape[2], size, images.device)
    top = images[:, :, rows]
    return top + (images[:, :, next_rows] - top) * row_weight[:, None]


def _tf1_taps(source: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    scale = torch.tensor(source, dtype=torch.float32) / torch.tensor(size, dtype=torch.float32)
    position = torch.arange(size, dtype=torch.float32) * scale
    low = position.floor()
    lower = low.long().clamp(max=source - 1)
    upper = (lower + 1).clamp(max=source - 1)
    return lower.to(device), upper.to(device), (position - low).to(device)


def resize_pil_bicubic(images: Tensor, size: int) -> Tensor:
    """Resize with Pillow's antialiased bicubic filter in float, clipped to 0..255, not rounded.

    Args:
        images: uint8 ``(B, C, H, W)``.
        size: height and width of the result.

    Returns:
        float32 ``(B, C, size, size)`` in 0..255 on the images' device.
    """
    from PIL import Image

    planes = images.detach().cpu().flatten(0, 1).to(torch.float32).numpy()
    resized = [
        np.asarray(Image.fromarray(plane).resize((size, size), Image.Resampling.BICUBIC))
        for plane in planes
    ]
    result = torch.from_numpy(np.stack(resized)).clamp_(0, 255)
    return result.view(*images.shape[:2], size, size).to(images.device)


def inception_input(images: Tensor, mode: ResizeMode, size: int = 299) -> Tensor:
    """Bring 8-bit pictures to the input of the FID Inception network, float32 in about [-1, 1].

    Args:
        images: uint8 ``(B, 3, H, W)``.
        mode: ``tf1``: the graph's own resizing and (x - 128) / 128 (ADM, most published numbers);
            ``pytorch_fid``: x / 255, half-pixel bilinear without antialiasing, 2 x - 1;
            ``clean``: Pillow's antialiased bicubic, then (x - 128) / 128 (arXiv:2104.11222).
        size: height and width of the result.
    """
    if mode == "clean":
        return (resize_pil_bicubic(images, size) - 128.0) / 128.0
    if mode == "tf1":
        return (resize_tf1_bilinear(images.to(torch.float32), size) - 128.0) / 128.0
    unit = images.to(torch.float32) / 255.0
    return 2.0 * F.interpolate(unit, (size, size), mode="bilinear", align_corners=False) - 1.0
