"""How restored pictures are scored in papers: PSNR and SSIM of luma or RGB, edges left out."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from genscale.errors import ConfigError, DataError, did_you_mean
from genscale.layers.ycbcr import rgb_to_ycbcr
from genscale.metrics.features import check_images
from genscale.metrics.reconstruction import (
    WINDOW,
    multiscale_similarity,
    structural_similarity,
)

Channel = Literal["y", "rgb"]

_NUM_SCALES = 5


def restoration_psnr(
    images: Tensor, made: Tensor, *, channel: Channel = "y", border: int = 0
) -> Tensor:
    """Return every picture's peak signal-to-noise ratio in dB: float64 ``(n,)``.

    10 log10(255^2 / mean squared error), infinite for equal pictures.

    Args:
        images: uint8 ``(n, 1 or 3, H, W)``.
        made: the same shape; rounding to 8 bits comes before any score.
        channel: ``y``: BT.601 luma in [16, 235], not rounded, as tables on super-resolution have
            it (of a grey picture its own values); ``rgb``: all channels together.
        border: rows and columns left out at every edge; papers take the scale.

    Raises:
        ConfigError: an unknown channel.
        DataError: other types or shapes, or pictures that are all border.
    """
    x, y = _prepare(images, made, channel, border)
    return 10.0 * torch.log10(255.0**2 / (x - y).square().flatten(1).mean(1))


def restoration_ssim(
    images: Tensor, made: Tensor, *, channel: Channel = "y", border: int = 0
) -> Tensor:
    """Return every picture's structural similarity: float64 ``(n,)``.

    The arguments are :func:`restoration_psnr`'s, the law that of
    :func:`genscale.metrics.reconstruction.picture_ssim`.
    """
    return structural_similarity(*_prepare(images, made, channel, border))[0]


def restoration_ms_ssim(
    images: Tensor, made: Tensor, *, channel: Channel = "rgb", border: int = 0
) -> Tensor:
    """Return every picture's structural similarity over five scales: float64 ``(n,)``.

    The law is that of :func:`genscale.metrics.reconstruction.multiscale_similarity`; a term below
    0 counts as 0. The arguments are :func:`restoration_psnr`'s.

    Raises:
        DataError: pictures below 176 pixels, which the window does not fit into at the last scale.
    """
    x, y = _prepare(images, made, channel, border)
    least = WINDOW * 2 ** (_NUM_SCALES - 1)
    if min(x.shape[2:]) < least:
        raise DataError(
            f"MS-SSIM needs pictures of {least}x{least} or more behind the border, but got "
            f"{x.shape[2]}x{x.shape[3]}; use SSIM."
        )
    return multiscale_similarity(x, y, num_scales=_NUM_SCALES)


def _prepare(images: Tensor, made: Tensor, channel: str, border: int) -> tuple[Tensor, Tensor]:
    """Return both in grey levels, float64, of the channel asked for and without the border."""
    if channel not in get_args(Channel):
        raise ConfigError(
            f"channel is '{channel}', expected y or rgb.{did_you_mean(channel, ('y', 'rgb'))}"
        )
    if check_images(images).shape != check_images(made).shape:
        raise DataError(
            f"Pictures of shape {tuple(images.shape)} were given restored ones of shape "
            f"{tuple(made.shape)}. Give one for each, of the same size."
        )
    height, width = images.shape[2:]
    if not 0 <= border < (min(height, width) + 1) // 2:
        raise DataError(
            f"A border of {border} leaves nothing of pictures of {height}x{width}; give less."
        )
    inside = (..., slice(border, height - border), slice(border, width - border))
    x, y = images[inside].double(), made[inside].double()
    if channel == "y" and x.shape[1] == 3:
        x, y = (255.0 * rgb_to_ycbcr(z / 255.0)[:, :1] for z in (x, y))
    return x, y
