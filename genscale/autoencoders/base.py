"""The contract of an autoencoder: pixels <-> what the backbone models."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

LOG_VARIANCE = (-30.0, 20.0)  # the bounds that latent diffusion clamps to (arXiv:2112.10752)


class Autoencoder(nn.Module):
    """Owns scale and shift; never trained with the backbone.

    Attributes:
        latent_channels: channels of the latents.
        downsample: pixels a latent cell covers along one side.
        image_channels: channels of its pictures; None where they are those of the latents.
    """

    latent_channels: int
    downsample: int
    image_channels: int | None = None

    @abstractmethod
    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Encode images ``(B, 3 or C, H, W)`` in [-1, 1] to latents of about unit variance.

        Args:
            images: the pictures.
            noise: standard normal numbers in the shape of the latents, to draw from the posterior
                with; None takes its mean. An autoencoder without a posterior ignores it.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to images in [-1, 1]; values are not clipped."""

    def check(self, *, encodes: bool, decodes: bool) -> list[str]:
        """Return a sentence for everything that would be missing once it is used.

        Args:
            encodes: pictures will be encoded.
            decodes: latents will be decoded.
        """
        return []

    @property
    def protocol_name(self) -> str:
        """Name what decodes, as the protocol of an evaluation states it."""
        return type(self).__name__.lower()


class Variational(Autoencoder):
    """An autoencoder that gives a Gaussian for every latent number: its *moments*.

    The moments of a picture never change, so they can be computed once and kept; a training step
    then draws latents = (mean + std * noise - shift) * scale.

    Attributes:
        scale: factor that brings latents to about unit variance.
        shift: subtracted before scaling.
    """

    scale: float
    shift: float

    @abstractmethod
    def moments(self, images: Tensor) -> Tensor:
        """Encode images ``(B, 3, H, W)`` in [-1, 1] to means and log variances.

        Returns:
            float32 ``(B, 2C, h, w)``: C channels of means, then C of log variances (not clamped),
            both before shift and scale.
        """

    @abstractmethod
    def encoder_digest(self) -> str | None:
        """Return a SHA-256 over the encoder's weights; None where they are not given."""

    def from_moments(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Draw latents ``(B, C, h, w)`` with standard normal noise; None takes the mean."""
        mean, log_variance = moments.chunk(2, dim=1)
        if noise is not None:
            mean = mean + torch.exp(0.5 * log_variance.clamp(*LOG_VARIANCE)) * noise
        return (mean - self.shift) * self.scale

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Encode images to latents; see :meth:`Autoencoder.encode`."""
        return self.from_moments(self.moments(images), noise)

    def settings(self) -> dict[str, Any]:
        """Return the numbers that two autoencoders of the same latents have in common."""
        return {
            "latent_channels": self.latent_channels,
            "downsample": self.downsample,
            "scale": self.scale,
            "shift": self.shift,
        }
