"""The contract of an autoencoder: pixels <-> what the backbone models."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from genscale.errors import ConfigError

LOG_VARIANCE = (-30.0, 20.0)  # the bounds that latent diffusion clamps to (arXiv:2112.10752)


class Autoencoder(nn.Module):
    """Owns scale and shift; never trained with the backbone.

    Attributes:
        latent_channels: channels of the latents.
        downsample: pixels a latent cell covers along one side.
        image_channels: channels of its pictures; None where they are those of the latents.
        temporal_downsample: frames of a clip that a latent cell covers; None where it knows
            pictures alone, which then takes clips frame by frame, see
            :func:`~genscale.autoencoders.frames.on_clips`.
    """

    latent_channels: int
    downsample: int
    image_channels: int | None = None
    temporal_downsample: int | None = None

    def frames_to_latent(self, frames: int) -> int:
        """Return the latent frames of a clip of so many frames: as many, unless it knows clips."""
        return frames

    def latent_to_frames(self, latent_frames: int) -> int:
        """Return the frames of a clip of so many latent frames: as many, unless it knows clips."""
        return latent_frames

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

    def check_pictures(self, images: Tensor) -> None:
        """Check that images ``(B, C, H, W)`` can be encoded.

        Raises:
            ConfigError: other channels than it takes, or sizes that do not divide.
        """
        channels, height, width = images.shape[1:]
        if channels != self.image_channels:
            raise ConfigError(
                f"autoencoder={type(self).__name__} encodes pictures of {self.image_channels} "
                f"channel(s), but these have {channels}. Give data.channels={self.image_channels}."
            )
        if height % self.downsample or width % self.downsample:
            raise ConfigError(
                f"Pictures of {height} x {width} do not divide by autoencoder.downsample="
                f"{self.downsample}. Give data.resolution as a multiple of it."
            )

    @property
    def protocol_name(self) -> str:
        """Name what decodes, as the protocol of an evaluation states it."""
        return type(self).__name__.lower()


def weights_digest(module: nn.Module, prefixes: tuple[str, ...]) -> str:
    """Return a SHA-256 over names and values of the tensors whose names start with a prefix."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if name.startswith(prefixes):
            digest.update(f"{name} {tuple(value.shape)}\n".encode())
            digest.update(value.cpu().contiguous().numpy().data)
    return digest.hexdigest()


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

    @property
    def moment_channels(self) -> int:
        """Channels of the moments."""
        return 2 * self.latent_channels

    @abstractmethod
    def encoder_digest(self) -> str | None:
        """Return a SHA-256 over the encoder's weights; None where they are not given."""

    def from_moments(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Draw latents ``(B, C, h, w)`` with standard normal noise; None takes the mean.

        Moments may be means alone, of which nothing is drawn.
        """
        mean = moments[:, : self.latent_channels]
        log_variance = moments[:, self.latent_channels :]
        if noise is not None and log_variance.shape[1]:
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


class ScaleTokenizer(Autoencoder):
    """An autoencoder whose latents are sums of token maps, one map a scale, coarse first.

    Scale k holds h_k x w_k tokens; all L of them lie in one row, scale after scale, row-major
    within a scale. The *running latent* is the sum of the scales so far, at the size of the last
    one. All but decoding is float32, with autocast off (arXiv:2404.02905).

    Attributes:
        vocab_size: entries V of the codebook, one for all scales.
        scales: (h_k, w_k) of every scale; the last is the latent size at the trained resolution.
    """

    vocab_size: int
    scales: tuple[tuple[int, int], ...]

    @property
    def num_tokens(self) -> int:
        """Return L, the tokens of one picture."""
        return sum(height * width for height, width in self.scales)

    @abstractmethod
    def at_scales(self, scales: Sequence[int | Sequence[int]]) -> ScaleTokenizer:
        """Return this tokenizer for other scales; weights are shared, this one stays as it is.

        Raises:
            ConfigError: scales that do not grow.
        """

    @abstractmethod
    def tokens(self, images: Tensor) -> Tensor:
        """Encode images ``(B, C, H, W)`` in [-1, 1] to token ids ``(B, L)`` int64 of all scales."""

    @abstractmethod
    def features(self, tokens: Tensor) -> Tensor:
        """Return what a scale-wise network reads while it is trained, for all scales.

        Args:
            tokens: ``(B, L)``.

        Returns:
            float32 ``(B, L, Cv)``: for every scale the running latent before it, area-resized to
            it; the rows of scale 0 are zeros.
        """

    @abstractmethod
    def codes(self, tokens: Tensor) -> Tensor:
        """Look token ids ``(B, n)`` up: rows ``(B, n, Cv)`` of the codebook."""

    @abstractmethod
    def add_scale(self, running: Tensor, codes: Tensor, scale: int) -> tuple[Tensor, Tensor | None]:
        """Add one scale to the running latent.

        Args:
            running: ``(B, Cv, H, W)`` of the scales before; zeros at scale 0. Not changed.
            codes: ``(B, l_k, Cv)`` of this scale.
            scale: k, counted from 0.

        Returns:
            the running latent, and the features ``(B, l_(k+1), Cv)`` of the next scale, which are
            None after the last.
        """

    @abstractmethod
    def latent(self, tokens: Tensor) -> Tensor:
        """Return the running latent ``(B, Cv, H, W)`` after all scales of ``tokens (B, L)``."""

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Encode images to the latents of their tokens; there is no posterior to draw from."""
        return self.latent(self.tokens(images))
