"""From what a network samples to pictures: decoding, and enlarging on the way."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from genscale.autoencoders.base import Autoencoder
from genscale.autoencoders.frames import on_clips
from genscale.autoencoders.offload import OffloadedDecoder
from genscale.resolution.sampling import bicubic
from genscale.sizes import Size
from genscale.upscaling.stage import Upscaling


@dataclass(frozen=True, slots=True)
class Decoding:
    """How latents become pictures.

    Attributes:
        autoencoder: latents -> pixels.
        upscaling: what enlarges finished samples; None keeps their size.
        offloaded: decodes in the place of an autoencoder that lies in the memory of the CPU.
    """

    autoencoder: Autoencoder
    upscaling: Upscaling | None = None
    offloaded: OffloadedDecoder | None = None

    def pictures(self, latents: Tensor) -> Tensor:
        """Decode ``(B, C, [T,] h, w)`` to about [-1, 1], without upscaling."""
        decode = (self.offloaded or self.autoencoder).decode
        return on_clips(self.autoencoder, decode, latents.float())

    def finished(self, latents: Tensor) -> Tensor:
        """Decode, and enlarge where that is asked for."""
        if self.upscaling is None:
            return self.pictures(latents)
        decode = (self.offloaded or self.autoencoder).decode
        return self.upscaling.decode(self.autoencoder, decode, latents.float())

    def enlarged(self, latents: Tensor, sides: Size) -> Tensor:
        """Enlarge the pictures of latents and encode them again.

        Args:
            latents: ``(B, C, [T,] h, w)``.
            sides: height and width of the latents wanted.
        """
        return self.autoencoder.encode(self.enlarged_pictures(latents, sides)).to(latents.dtype)

    def enlarged_pictures(self, latents: Tensor, sides: Size) -> Tensor:
        """Return pictures in [-1, 1] of the size that latents of ``sides`` have."""
        factor = self.autoencoder.downsample
        larger = bicubic(self.pictures(latents), (sides[0] * factor, sides[1] * factor))
        return larger.clamp(-1.0, 1.0)
