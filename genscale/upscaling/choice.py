"""What a command line says of upscaling, until a pipeline is there to tell the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Literal

from genscale.autoencoders.base import Autoencoder
from genscale.errors import ConfigError
from genscale.run_weights import MAIN
from genscale.upscaling.interpolation import Interpolation
from genscale.upscaling.loading import load_upscaler
from genscale.upscaling.stage import Upscaling


class UpscalingChoice(ABC):
    """Settings of upscaling; weights are read when a pipeline is known."""

    @abstractmethod
    def placed(self, autoencoder: Autoencoder, channels: int) -> Upscaling | None:
        """Return what enlarges the samples of a pipeline; None enlarges nothing.

        Args:
            autoencoder: of the pipeline.
            channels: of its pictures.

        Raises:
            ConfigError: the upscaler does not fit, or nothing says where it is.
            CheckpointError: its weights cannot be read.
        """


class NoUpscaling(UpscalingChoice):
    """Samples keep their size."""

    def placed(self, autoencoder: Autoencoder, channels: int) -> None:
        """Return None."""


class InterpolatedUpscaling(UpscalingChoice):
    """Interpolation of latents or pictures: what trained upscalers are compared with.

    Args:
        space: ``latent``, before decoding, or ``pixel``, behind it.
        mode: ``bicubic``, ``bilinear`` or ``nearest``.
        scale: factor.
        decode_tile: see :class:`~genscale.upscaling.stage.Upscaling`.
    """

    def __init__(
        self,
        *,
        space: Literal["latent", "pixel"] = "pixel",
        mode: Literal["bicubic", "bilinear", "nearest"] = "bicubic",
        scale: int = 2,
        decode_tile: int | None = None,
    ) -> None:
        self.space, self.mode, self.scale, self.decode_tile = space, mode, scale, decode_tile

    def placed(self, autoencoder: Autoencoder, channels: int) -> Upscaling:
        """Interpolate whatever the pipeline has."""
        network = Interpolation(
            space=self.space,
            channels=autoencoder.latent_channels if self.space == "latent" else channels,
            mode=self.mode,
        )
        of = "_latent" if self.space == "latent" else ""
        upscaling = Upscaling(
            network, scale=self.scale, decode_tile=self.decode_tile, name=f"{self.mode}{of}"
        )
        upscaling.check(autoencoder, channels)
        return upscaling


class TrainedUpscaling(UpscalingChoice):
    """A network of a run, of an exported folder, or of another program's file.

    Args:
        kind: class that is expected there.
        run: a run, or an exported folder; or else
        file: weights of official layout.
        checkpoint: of a run: ``latest``, a step, or a file.
        weights: of a run: ``ema``, ``raw``, or another average.
        scale: factor; None for the least that is offered.
        tile: see :class:`~genscale.upscaling.stage.Upscaling`, as are the others.
        overlap: of tiles.
        batch: tiles a network call.
        decode_tile: of the decoder.
        clamp_sigma: of latents.
    """

    def __init__(
        self,
        *,
        kind: Literal["LUA", "SwinIR", "ESPCN", "WDSR", "IRN", "IARN"],
        run: str | None = None,
        file: str | None = None,
        checkpoint: str | int = "latest",
        weights: str = MAIN,
        scale: int | None = None,
        tile: int | None = None,
        overlap: int | None = None,
        batch: int = 1,
        decode_tile: int | None = None,
        clamp_sigma: float | None = None,
    ) -> None:
        self.kind, self.run, self.file = kind, run, file
        self.checkpoint, self.weights, self.scale = checkpoint, weights, scale
        self.tile, self.overlap, self.batch = tile, overlap, batch
        self.decode_tile, self.clamp_sigma = decode_tile, clamp_sigma

    def placed(self, autoencoder: Autoencoder, channels: int) -> Upscaling:
        """Read the network and see that it fits."""
        option = self.kind.lower()
        if (self.run is None) == (self.file is None):
            raise ConfigError(
                f"upscaling={option} reads one trained network, but upscaling.run={self.run} and "
                f"upscaling.file={self.file} were given. Give upscaling.run=<run of "
                f"model={option}, or its export> or upscaling.file=<weights of official layout>."
            )
        source = Path(str(self.run or self.file)).expanduser()
        if self.file is not None and source.is_dir():
            raise ConfigError(
                f"upscaling.file={self.file} is a folder, but a file of weights was expected. "
                f"Give upscaling.run={self.file}."
            )
        network, facts = load_upscaler(source, self.checkpoint, self.weights)
        found = type(network).__name__
        if found != self.kind:
            other = "bicubic" if found == "Interpolation" else found.lower()
            raise ConfigError(
                f"upscaling={option} expects a network {self.kind}, but {source} holds {found}. "
                f"Give upscaling={other}, or another place."
            )
        upscaling = Upscaling(
            network,
            scale=self.scale,
            facts=facts,
            tile=self.tile,
            overlap=self.overlap,
            batch=self.batch,
            decode_tile=self.decode_tile,
            clamp_sigma=self.clamp_sigma,
        )
        upscaling.check(autoencoder, channels)
        return upscaling
