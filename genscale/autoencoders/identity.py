"""The autoencoder of pixel-space models."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from genscale.autoencoders.base import Autoencoder


class Identity(Autoencoder):
    """Pixels are the latents.

    Args:
        latent_channels: channels of the images.
        downsample: always 1; stated in the config so that sizes are derived in one way.
    """

    def __init__(self, *, latent_channels: int, downsample: Literal[1] = 1) -> None:
        super().__init__()
        if downsample != 1:
            raise ValueError(
                f"autoencoder.downsample must be 1 for the identity, but {downsample} was given. "
                "Choose another autoencoder to work on smaller latents."
            )
        self.latent_channels = latent_channels
        self.downsample = downsample

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the images themselves; there is no posterior to draw from."""
        return images

    def decode(self, latents: Tensor) -> Tensor:
        """Return the latents themselves."""
        return latents
