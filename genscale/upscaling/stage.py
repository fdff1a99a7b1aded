"""An upscaler at its place in a pipeline: before the decoder, or behind it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from genscale.autoencoders.base import Autoencoder, Variational, weights_digest
from genscale.autoencoders.frames import by_frame, on_clips
from genscale.errors import ConfigError
from genscale.run_weights import MAIN
from genscale.upscaling.base import Upscaler
from genscale.upscaling.latent_conventions import DECODE_LIMIT, DECODE_TILE
from genscale.upscaling.latent_space import decoder_affine, space_of
from genscale.upscaling.latent_upscaler import LatentUpscaler
from genscale.upscaling.loading import UpscalerFacts, facts_of, load_upscaler
from genscale.upscaling.tiling import check_tiles, in_tiles

Decode = Callable[[Tensor], Tensor]

_DECODE_OVERLAP = 16  # latent cells that tiles of the decoder share at most


class Upscaling:
    """Enlarges what a pipeline samples: latents before they are decoded, or the pictures made.

    ``pipeline.upscaling = Upscaling(network, scale=2)`` is all that is needed; clips are enlarged
    frame by frame. Gradients pass, so that searches that follow them see enlarged pictures too.

    Args:
        network: of latents as a decoder takes them, or of pictures in [0, 1].
        scale: factor; None for the least that the network offers.
        facts: what is known of it; None for what it tells itself.
        tile: side of a tile of the network, in cells of what it reads; None: the whole at once.
        overlap: cells that neighbouring tiles share; None for what suits the network.
        batch: tiles a network call.
        decode_tile: side of a tile of the decoder, in latent cells; None decodes at once, and in
            tiles of 128 from 256 x 256 cells on. Norms and attention of a decoder see a tile
            alone, so that tiling is approximate.
        clamp_sigma: latents are clamped to so many deviations around the mean of those of
            training; None for never.
        name: what records call it; None for the network's class.

    Raises:
        ConfigError: a scale that is not offered, or tiles that make no sense.
    """

    def __init__(
        self,
        network: Upscaler,
        *,
        scale: int | None = None,
        facts: UpscalerFacts | None = None,
        tile: int | None = None,
        overlap: int | None = None,
        batch: int = 1,
        decode_tile: int | None = None,
        clamp_sigma: float | None = None,
        name: str | None = None,
    ) -> None:
        self.network = network.requires_grad_(False).eval()
        self.scale = min(network.scales) if scale is None else scale
        self.facts = facts or facts_of(network)
        self.tile, self.overlap, self.batch = tile, overlap, batch
        self.decode_tile, self.clamp_sigma = decode_tile, clamp_sigma
        self.name = name or type(network).__name__
        self._check_numbers()
        self._latents: LatentUpscaler | None = None
        self._looked = False
        if network.space == "latent":
            self._latents = LatentUpscaler(
                network,
                family=self.facts.family,
                latent_stats=self.facts.latent_stats,
                clamp_sigma=clamp_sigma,
            )
        elif clamp_sigma is not None:
            raise ConfigError(
                f"upscaling.clamp_sigma={clamp_sigma} is for latents, but {self.name} enlarges "
                "pictures. Leave it out."
            )

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        checkpoint: str | int | Path = "latest",
        weights: str = MAIN,
        scale: int | None = None,
        tile: int | None = None,
        overlap: int | None = None,
        batch: int = 1,
        decode_tile: int | None = None,
        clamp_sigma: float | None = None,
    ) -> Upscaling:
        """Read an upscaler; see :func:`~genscale.upscaling.loading.load_upscaler` and the class."""
        network, facts = load_upscaler(source, checkpoint, weights)
        return cls(
            network,
            scale=scale,
            facts=facts,
            tile=tile,
            overlap=overlap,
            batch=batch,
            decode_tile=decode_tile,
            clamp_sigma=clamp_sigma,
        )

    @property
    def label(self) -> str:
        """What protocols call it: its kind, the first digits of its weights' digest, settings."""
        known = ""
        if self.network.state_dict():
            known = f":{weights_digest(self.network, ('',))[:8]}"
        words = [f"upscaled x{self.scale} by {self.name}{known}"]
        if self.tile is not None:
            words.append(f"tiles of {self.tile} overlapping {self._overlap}")
        if self.decode_tile is not None:
            words.append(f"decoded in tiles of {self.decode_tile}")
        if self.clamp_sigma is not None:
            words.append(f"clamped to {self.clamp_sigma:g} sigma")
        return ", ".join(words)

    def record(self) -> dict[str, Any]:
        """Return what is written beside samples."""
        return {"upscaling": self.label, "upscaler": self.facts.origin or self.name}

    def enlarged(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape ``(C, [T,] H, W)`` of enlarged pictures, from that of decoded ones."""
        *first, height, width = shape
        return (*first, height * self.scale, width * self.scale)

    def check(self, autoencoder: Autoencoder, channels: int) -> None:
        """Check that a pipeline's latents or pictures are what the network was trained for.

        Args:
            autoencoder: of the pipeline.
            channels: of its pictures.

        Raises:
            ConfigError: other channels, another latent space, or a decoder that is not tiled.
        """
        if self.decode_tile is not None and autoencoder.temporal_downsample is not None:
            raise ConfigError(
                f"upscaling.decode_tile={self.decode_tile} was given, but "
                f"{type(autoencoder).__name__} decodes clips and tiles them itself. Leave it out."
            )
        if self._latents is None:
            if channels != self.network.channels:
                raise ConfigError(
                    f"upscaling={self.name} enlarges pictures of {self.network.channels} "
                    f"channel(s), but those of this pipeline have {channels}. Give an upscaler "
                    "trained on such pictures, or upscaling=bicubic."
                )
            return
        own = autoencoder.latent_channels
        if own != self.network.channels:
            raise ConfigError(
                f"upscaling={self.name} is for latents of {self.network.channels} channels, but "
                f"those of {type(autoencoder).__name__} have {own}. Give an upscaler trained on "
                "latents of this autoencoder, or upscaling=bicubic_latent."
            )
        self._check_space(autoencoder)

    def decode(self, autoencoder: Autoencoder, decode: Decode, latents: Tensor) -> Tensor:
        """Make enlarged pictures of latents.

        Args:
            autoencoder: of the pipeline: its shift and scale, and whether it knows clips.
            decode: its ``decode``, wherever it runs.
            latents: float32 ``(B, C, [T,] h, w)`` as samplers finish with.

        Returns:
            ``(B, C, [T,] H, W)`` in about [-1, 1].

        Raises:
            ConfigError: latents or pictures of other channels than the network's.
        """
        # diffusers' own method warns of casts
        nn.Module.to(self.network, latents.device)
        if self._latents is None:
            return by_frame(self._enlarge_pictures, self._decoded(autoencoder, decode, latents))
        larger = by_frame(partial(self._enlarge_latents, autoencoder), latents)
        return self._decoded(autoencoder, decode, larger)

    def _enlarge_latents(self, autoencoder: Autoencoder, latents: Tensor) -> Tensor:
        """Enlarge latents ``(B, C, h, w)`` of a sampler, in the space of the decoder."""
        assert self._latents is not None
        shift, scale = decoder_affine(autoencoder, latents)
        u = latents / scale + shift
        if not self._looked:  # at the first batch: looking waits for the device
            self._latents.look_at(u)
            self._looked = True
        larger = self._latents.enlarge(
            u, self.scale, tile=self.tile, overlap=self.overlap, batch=self.batch
        )
        return (larger - shift) * scale

    def _enlarge_pictures(self, images: Tensor) -> Tensor:
        """Enlarge pictures ``(B, C, H, W)``, as they would be read from a file."""
        x = (images.float() * 0.5 + 0.5).clamp(0.0, 1.0)
        larger = self.network.upscale(
            x, self.scale, tile=self.tile, overlap=self.overlap, batch=self.batch
        )
        return larger.float() * 2 - 1

    def _decoded(self, autoencoder: Autoencoder, decode: Decode, latents: Tensor) -> Tensor:
        """Decode latents, tile by tile where that is asked for or they are many."""
        tile = self.decode_tile
        large = math.prod(latents.shape[-2:]) > DECODE_LIMIT
        if tile is None and large and autoencoder.downsample > 1:
            tile = DECODE_TILE
        if tile is None or autoencoder.temporal_downsample is not None:
            return on_clips(autoencoder, decode, latents)
        tiled = partial(
            in_tiles,
            decode,
            scale=autoencoder.downsample,
            tile=tile,
            overlap=min(_DECODE_OVERLAP, tile // 2),
        )
        return on_clips(autoencoder, tiled, latents)

    @property
    def _overlap(self) -> int:
        """Cells that tiles share, as :meth:`Upscaler.upscale` has them where nothing is said."""
        if self.overlap is not None or self.tile is None:
            return self.overlap or 0
        return min(self.network.tile_overlap, self.tile // 2)

    def _check_numbers(self) -> None:
        if self.scale not in self.network.scales:
            raise ConfigError(
                f"upscaling.scale={self.scale} is not offered: {self.name} has the scales "
                f"{', '.join(map(str, self.network.scales))}. Give one of them."
            )
        if self.tile is not None:
            check_tiles(self.tile, self._overlap, self.batch)
        elif self.overlap is not None or self.batch != 1:
            raise ConfigError(
                f"upscaling.overlap={self.overlap} and batch={self.batch} are of tiles, but no "
                "tile was given. Give upscaling.tile=64, say, or leave them out."
            )
        if self.decode_tile is not None and self.decode_tile < 1:
            raise ConfigError(
                f"upscaling.decode_tile must be at least 1 latent cell, but {self.decode_tile} was "
                "given. Give e.g. 64, or null."
            )

    def _check_space(self, autoencoder: Autoencoder) -> None:
        """Refuse latents of another autoencoder than that of training, where both are known."""
        trained: dict[str, Any] = self.facts.autoencoder or {}
        name = type(autoencoder).__name__
        stride = trained.get("downsample")
        digest = trained.get("encoder")
        if digest is not None and isinstance(autoencoder, Variational):
            own = autoencoder.encoder_digest()
            if own is None or own == digest:
                return
            raise ConfigError(
                f"upscaling={self.name} was trained on latents of the encoder {digest[:8]}, but "
                f"{name} of this pipeline has the encoder {own[:8]}: another latent space. Give "
                "an upscaler trained on its latents, or fine-tune this one."
            )
        if stride is not None and stride != autoencoder.downsample:
            raise ConfigError(
                f"upscaling={self.name} was trained on latents of {stride} pixels a cell, but "
                f"those of {name} have {autoencoder.downsample}: another latent space. Give an "
                "upscaler trained on its latents."
            )
        family, own = self.facts.family, space_of(autoencoder)
        if None not in (family, own) and family != own:
            raise ConfigError(
                f"upscaling={self.name} is for latents of the space '{family}', but those of "
                f"{name} are of '{own}'. Give one of that space, or fine-tune this one."
            )
