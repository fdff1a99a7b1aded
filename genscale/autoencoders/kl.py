"""The KL autoencoders of latent diffusion, through diffusers (arXiv:2112.10752)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from genscale.autoencoders.base import Variational, weights_digest
from genscale.autoencoders.diffusers_folder import Source, check_config, load, locate, read_config
from genscale.errors import CheckpointError, ConfigError


class KL(Variational):
    """A diffusers AutoencoderKL, whose weights are read when they are first needed.

    So training from cached moments without sample grids needs no weights at all. The encoder
    computes in float32 whatever the precision of training, as for a cache; the decoder follows
    autocast.

    Args:
        source: folder or hub id (``owner/name``); None where nothing is encoded or decoded.
        subfolder: where the autoencoder lies inside ``source``, e.g. ``vae``.
        decoder_source: folder or hub id of the one to decode with; None decodes with ``source``.
        decoder_subfolder: where it lies inside ``decoder_source``.
        latent_channels: channels of the latents, C.
        downsample: pixels a latent cell covers along one side.
        scale: latents = (z - shift) * scale.
        shift: see ``scale``.
        image_channels: channels of the pictures.

    Raises:
        ConfigError: ``scale`` is not positive, or a subfolder is given without its source.
    """

    def __init__(
        self,
        *,
        source: str | None = None,
        subfolder: str | None = None,
        decoder_source: str | None = None,
        decoder_subfolder: str | None = None,
        latent_channels: int = 4,
        downsample: int = 8,
        scale: float = 0.18215,
        shift: float = 0.0,
        image_channels: int = 3,
    ) -> None:
        super().__init__()
        if not scale > 0:
            raise ConfigError(
                f"autoencoder.scale must be positive, but {scale} was given. Give e.g. 0.18215."
            )
        self.latent_channels = latent_channels
        self.image_channels = image_channels
        self.downsample = downsample
        self.scale = scale
        self.shift = shift
        self.source = _source("", source, subfolder)
        self.decoder_source = _source("decoder_", decoder_source, decoder_subfolder)
        self._encoding: Any = None  # diffusers' module, once loaded
        self._decoding: Any = None

    def moments(self, images: Tensor) -> Tensor:
        """Encode images to moments; see :meth:`Variational.moments`.

        Raises:
            ConfigError: no source, pictures of other channels, or sizes that do not divide.
            CheckpointError: the weights cannot be loaded.
        """
        self.check_pictures(images)
        vae = self._loaded("encode").to(images.device)
        with torch.autocast(images.device.type, enabled=False):
            moments: Tensor = vae.encode(images.float()).latent_dist.parameters
        return moments

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents; see :meth:`Autoencoder.decode`.

        Raises:
            ConfigError: no source.
            CheckpointError: the weights cannot be loaded.
        """
        vae = self._loaded("decode").to(latents.device)
        images: Tensor = vae.decode(latents / self.scale + self.shift).sample
        return images

    def check(self, *, encodes: bool, decodes: bool) -> list[str]:
        """Return a sentence for a source that is lacking, not there, or contradicts the settings.

        Sources that are given are looked at even where they are not needed; weights are not read.
        """
        problems = []
        for role, needed in (("encode", encodes), ("decode", decodes)):
            if needed and self._source_of(role) is None:
                problems.append(_lacking(role))
        for source in (self.source, self.decoder_source):
            if source is not None:
                try:
                    self._compare(locate(source), source)
                except (CheckpointError, ConfigError) as error:
                    problems.append(str(error))
        return problems

    def encoder_digest(self) -> str | None:
        """Return the SHA-256 over names and values of encoder and quantisation layer.

        The decoder has no part in it: tuned decoders share the encoder, and so the latents.
        """
        if self.source is None:
            return None
        return weights_digest(self._loaded("encode"), ("encoder.", "quant_conv."))

    @property
    def protocol_name(self) -> str:
        """Return ``kl`` and the first digits of the decoder's digest: decoders change FIDs."""
        return f"kl:{weights_digest(self._loaded('decode'), ('decoder.', 'post_quant_conv.'))[:8]}"

    def _compare(self, folder: Path, source: Source) -> None:
        """Hold a folder's config against the settings; see :func:`check_config`."""
        check_config(read_config(folder), self.settings(), source)

    def _open(self, folder: Path, source: Source) -> Any:
        """Load diffusers' module from a folder."""
        return load(folder, source)

    def _source_of(self, role: str) -> Source | None:
        return (self.decoder_source if role == "decode" else None) or self.source

    def _loaded(self, role: Literal["encode", "decode"]) -> Any:
        """Return diffusers' module for a role; both roles share one unless their sources differ."""
        source = self._source_of(role)
        if source is None:
            raise ConfigError(_lacking(role))
        apart = source is self.decoder_source
        vae = self._decoding if apart else self._encoding
        if vae is None:
            folder = locate(source)
            self._compare(folder, source)
            vae = self._open(folder, source)
            if apart:
                self._decoding = vae
            else:
                self._encoding = vae
        return vae


def _source(prefix: str, place: str | None, subfolder: str | None) -> Source | None:
    key = f"autoencoder.{prefix}source"
    if place is None and subfolder is not None:
        raise ConfigError(
            f"autoencoder.{prefix}subfolder={subfolder} was given without {key}. Give both."
        )
    return None if place is None else Source(key, place, subfolder)


def _lacking(role: str) -> str:
    what = "pictures" if role == "encode" else "samples"
    return (
        f"autoencoder.source is not set, and its weights are needed to {role} {what}. "
        "Give autoencoder.source=<folder or hub id of a diffusers AutoencoderKL>, e.g. "
        "autoencoder.source=stabilityai/sd-vae-ft-ema."
    )
