"""The autoencoders of video models, through diffusers: causal in time, normalised by channel."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from genscale.autoencoders.base import LOG_VARIANCE, weights_digest
from genscale.autoencoders.diffusers_folder import WEIGHTS, Source, load_as, locate, read_config
from genscale.autoencoders.kl import KL
from genscale.autoencoders.video_kinds import VideoSizes, assumed, kind_of, statistics
from genscale.errors import CheckpointError, ConfigError

_BUFFERS = ("latents_mean", "latents_std")  # LTX keeps them among its weights


class VideoAutoencoder(KL):
    """One of diffusers' video autoencoders, whose weights are read when they are first needed.

    Latents are (z - shift) * scale with shift and scale as the pipelines of the published models
    have them, from ``config.json`` (of LTX, from the weights): one number, one a channel, or, of
    Cosmos, one a channel and latent frame. Clips are encoded and decoded one at a time, so that
    memory does not grow with the batch and a clip's latents do not depend on its neighbours. The
    encoder computes in float32.

    Args:
        kind: ``wan``, ``cogvideox``, ``ltx``, ``hunyuan``, ``mochi``, ``allegro`` or ``cosmos``.
        source: folder or hub id; see :class:`~genscale.autoencoders.kl.KL`. Without one, shift and
            scale are those that diffusers' class assumes.
        subfolder: where the autoencoder lies inside ``source``, e.g. ``vae``.
        decoder_source: folder or hub id of the one to decode with; None decodes with ``source``.
        decoder_subfolder: where it lies inside ``decoder_source``.
        latent_channels: channels of the latents, C; checked against the config, as are the next.
        downsample: pixels a latent cell covers along one side.
        temporal_downsample: frames it covers.
        tiling: encode and decode large clips in overlapping tiles, which takes less memory and
            changes the result a little.
        decode_dtype: ``float32``, or ``bfloat16`` to decode under autocast; float16 overflows in
            several of them.

    Raises:
        ConfigError: an argument is none of those above.
    """

    temporal_downsample: int  # never None: it knows clips alone

    def __init__(
        self,
        *,
        kind: str = "wan",
        source: str | None = None,
        subfolder: str | None = None,
        decoder_source: str | None = None,
        decoder_subfolder: str | None = None,
        latent_channels: int = 16,
        downsample: int = 8,
        temporal_downsample: int = 4,
        tiling: bool = False,
        decode_dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        super().__init__(
            source=source,
            subfolder=subfolder,
            decoder_source=decoder_source,
            decoder_subfolder=decoder_subfolder,
            latent_channels=latent_channels,
            downsample=downsample,
            scale=1.0,
        )
        if decode_dtype not in ("float32", "bfloat16"):
            raise ConfigError(
                f"autoencoder.decode_dtype='{decode_dtype}' is neither float32 nor bfloat16, and "
                "others overflow. Choose one."
            )
        self.kind = kind_of(kind)
        self.temporal_downsample = temporal_downsample
        self.tiling = tiling
        self.decode_dtype = decode_dtype

    @property
    def causal(self) -> bool:
        """Whether a latent frame knows no later frames; the first frame then has its own."""
        return self.kind.causal

    @property
    def moment_channels(self) -> int:
        """Channels of the moments."""
        return (2 if self.kind.variational else 1) * self.latent_channels

    def frames_to_latent(self, frames: int) -> int:
        """Return the latent frames of a clip of so many frames.

        Raises:
            ConfigError: clips cannot have so many; the sentence gives the nearest that can.
        """
        return self.kind.latent_frames(frames, self.temporal_downsample)

    def latent_to_frames(self, latent_frames: int) -> int:
        """Return the frames of so many latent frames."""
        return self.kind.frames(latent_frames, self.temporal_downsample)

    def moments(self, images: Tensor) -> Tensor:
        """Encode clips to means and log variances; see :meth:`Variational.moments`.

        Args:
            images: ``(B, 3, T, H, W)`` in [-1, 1].

        Returns:
            float32 ``(B, 2C, t, h, w)``; of an autoencoder without a variance ``(B, C, t, h, w)``.

        Raises:
            ConfigError: no source, or clips of other channels, frames or sizes than it takes.
            CheckpointError: the weights cannot be loaded.
        """
        self.check_pictures(images)
        vae = self._loaded("encode").to(images.device)
        self._tile(vae, images.shape[2:])
        with torch.autocast(images.device.type, enabled=False):
            return torch.cat([_parameters(vae.encode(c.float())) for c in images.split(1)])

    def from_moments(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Draw latents with standard normal noise; None, or moments without variances, take means.

        Args:
            moments: ``(B, 2C, t, h, w)``, or means alone ``(B, C, t, h, w)``.
            noise: ``(B, C, t, h, w)``.
        """
        mean = moments[:, : self.latent_channels]
        if noise is not None and moments.shape[1] > self.latent_channels:
            log_variance = moments[:, self.latent_channels :].clamp(*LOG_VARIANCE)
            mean = mean + torch.exp(0.5 * log_variance) * noise
        shift, scale = self._affine(mean)
        return (mean - shift) * scale

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents ``(B, C, t, h, w)`` to clips ``(B, 3, T, H, W)`` in about [-1, 1].

        Raises:
            ConfigError: no source.
            CheckpointError: the weights cannot be loaded.
        """
        vae = self._loaded("decode").to(latents.device)
        shift, scale = self._affine(latents)
        frames, height, width = latents.shape[2:]
        pixels = (self.latent_to_frames(frames), height * self.downsample, width * self.downsample)
        self._tile(vae, pixels)
        # LTX's later decoders take the noise level of their latents: there is none
        clean = vae.config.get("timestep_conditioning", False)
        further = (torch.zeros(1, device=latents.device),) if clean else ()
        half = self.decode_dtype == "bfloat16"
        z = (latents / scale + shift).float()
        with torch.autocast(latents.device.type, dtype=torch.bfloat16, enabled=half):
            clips = torch.cat([vae.decode(row, *further).sample for row in z.split(1)])
        # diffusers' Allegro puts frames before channels
        return clips.transpose(1, 2) if self.kind.name == "allegro" else clips

    def settings(self) -> dict[str, Any]:
        """Return the numbers that two autoencoders of the same latents have in common."""
        shift, scale = self._statistics
        return {
            "kind": self.kind.name,
            "latent_channels": self.latent_channels,
            "downsample": self.downsample,
            "temporal_downsample": self.temporal_downsample,
            "shift": shift,
            "scale": scale,
        }

    def check_pictures(self, images: Tensor) -> None:
        """Check that clips ``(B, C, T, H, W)`` can be encoded.

        Raises:
            ConfigError: pictures, or other channels, frames or sizes than it takes.
        """
        if images.dim() != 5:
            raise ConfigError(
                f"autoencoder.kind={self.kind.name} encodes clips (B, C, T, H, W), but these are "
                f"of shape {tuple(images.shape)}. Give data of videos, e.g. data=video_folder."
            )
        super().check_pictures(images[:, :, 0])
        self.frames_to_latent(images.shape[2])

    @property
    def protocol_name(self) -> str:
        """Return the kind and the first digits of the decoder's digest: decoders change FVDs."""
        decoder = weights_digest(self._loaded("decode"), ("decoder.", "post_quant_conv."))
        return f"{self.kind.name}:{decoder[:8]}"

    @cached_property
    def _statistics(self) -> tuple[list[float], list[float]]:
        """Shift and scale; of the source where there is one, else what diffusers assumes."""
        if self.source is None:
            if self.kind.name == "ltx":
                raise ConfigError(
                    "autoencoder.kind=ltx keeps the mean and deviation of its latents among its "
                    "weights, and autoencoder.source is not set. Give it."
                )
            config = assumed(self.kind)
            return statistics(self.kind, config, *(config.get(name) for name in _BUFFERS))
        folder = locate(self.source)
        config = self._config(folder)
        mean, std = (config.get(name) for name in _BUFFERS)
        if self.kind.name == "ltx":
            mean, std = _buffers(folder, self.source)
        return statistics(self.kind, config, mean, std)

    def _affine(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return shift and scale, to be broadcast over latents ``(B, C, t, h, w)``."""
        frames = like.shape[2]
        parts = []
        for values in self._statistics:
            table = torch.tensor(values, device=like.device)
            if len(values) > 1:
                table = table.view(self.latent_channels, -1)
                if 1 < table.shape[1] < frames:
                    raise ConfigError(
                        f"autoencoder.kind={self.kind.name} knows the mean and deviation of "
                        f"{table.shape[1]} latent frames, but there are {frames}. Give at most "
                        f"data.num_frames={self.latent_to_frames(table.shape[1])}."
                    )
                table = table[:, :frames, None, None]
            parts.append(table)
        return parts[0], parts[1]

    def _config(self, folder: Path) -> dict[str, Any]:
        """Read a folder's config; what it does not say, diffusers' class does."""
        return assumed(self.kind) | read_config(folder, self.kind.class_name)

    def _compare(self, folder: Path, source: Source) -> None:
        config = self._config(folder)
        found = self.kind.sizes(config)
        own = VideoSizes(self.latent_channels, self.downsample, self.temporal_downsample)
        for name in VideoSizes.__dataclass_fields__:
            if getattr(found, name) != getattr(own, name):
                raise ConfigError(
                    f"autoencoder.{name}={getattr(own, name)}, but the config.json of {source} "
                    f"says {getattr(found, name)}. Give autoencoder.{name}={getattr(found, name)}, "
                    "or another source."
                )

    def _open(self, folder: Path, source: Source) -> Any:
        return load_as(self.kind.load_class(), folder, source)

    def _tile(self, vae: Any, shape: tuple[int, ...] | torch.Size) -> None:
        """Choose whether clips of a shape (T, H, W) are cut into tiles."""
        if self.kind.name != "allegro":
            if self.tiling:
                vae.enable_tiling()
            return
        # diffusers' Allegro knows tiles only; one that is the whole clip is none
        vae.enable_tiling()
        if not self.tiling:
            vae.kernel = vae.stride = tuple(shape)
            return
        for side, kernel, stride in zip(shape, vae.kernel, vae.stride, strict=True):
            if side < kernel or (side - kernel) % stride:
                raise ConfigError(
                    f"Clips of {tuple(shape)} (frames, height, width) do not divide into "
                    f"Allegro's tiles of {vae.kernel} every {vae.stride}. Set "
                    "autoencoder.tiling=false, or give another size."
                )


def _parameters(encoded: Any) -> Tensor:
    """Return means and log variances, or, where there is no variance, the latents themselves."""
    posterior = encoded.latent_dist
    parameters: Tensor | None = getattr(posterior, "parameters", None)
    return posterior.mode() if parameters is None else parameters


def _buffers(folder: Path, source: Source) -> tuple[list[float], list[float]]:
    """Read mean and deviation from a file of weights, and nothing else of it."""
    from safetensors import SafetensorError, safe_open

    file = folder / WEIGHTS[0]
    if not file.is_file():
        raise CheckpointError(
            f"{source} has no {WEIGHTS[0]}, from which autoencoder.kind=ltx reads the mean and "
            "deviation of its latents. Save it again with safe_serialization=True."
        )
    try:
        with safe_open(file, framework="pt") as weights:
            mean, std = (weights.get_tensor(name).tolist() for name in _BUFFERS)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"The weights of {source} do not give {' and '.join(_BUFFERS)} ({error}). Copy the "
            "file again."
        ) from error
    return mean, std
