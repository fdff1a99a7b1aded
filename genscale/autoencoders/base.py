"""The contract of an autoencoder: pixels <-> what the backbone models."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn


class Autoencoder(nn.Module):
    """Owns scale and shift; never trained with the backbone.

    Attributes:
        latent_channels: channels of the latents.
        downsample: pixels a latent cell covers along one side.
    """

    latent_channels: int
    downsample: int

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Encode images ``(B, 3 or C, H, W)`` in [-1, 1] to latents of about unit variance."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to images in [-1, 1]; values are not clipped."""
