"""Autoencoders at work on clips: those of pictures take one frame after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from genscale.autoencoders.base import Autoencoder


def by_frame(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Apply a function of pictures to pictures or to every frame of clips.

    Frames are taken one position at a time, so that no more pictures are in memory than there
    are clips.

    Args:
        function: of ``(B, C, H, W)``, to ``(B, C', H', W')``.
        images: ``(B, C, H, W)``, or clips ``(B, C, T, H, W)``.

    Returns:
        ``(B, C', H', W')``, of clips ``(B, C', T, H', W')``.
    """
    if images.dim() == 4:
        return function(images)
    return torch.stack([function(frame) for frame in images.unbind(2)], dim=2)


def on_clips(
    autoencoder: Autoencoder, function: Callable[[Tensor], Tensor], images: Tensor
) -> Tensor:
    """Apply a function of an autoencoder to pictures, or to clips as the autoencoder knows them.

    Args:
        autoencoder: whose ``temporal_downsample`` says whether it takes clips as a whole.
        function: its ``encode``, ``moments`` or ``decode``.
        images: ``(B, C, H, W)``, or clips ``(B, C, T, H, W)``; pictures or latents.
    """
    if autoencoder.temporal_downsample is not None:
        return function(images)
    return by_frame(function, images)
