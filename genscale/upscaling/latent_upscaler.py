"""A latent upscaler as an object: weights, the latent space they are for, and a pipeline around."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genscale.errors import CheckpointError, ConfigError
from genscale.upscaling.base import Upscaler
from genscale.upscaling.latent_conventions import decode, family_of, to_vae_space, vae_channels
from genscale.upscaling.loading import (
    WEIGHTS,
    facts_of,
    load_upscaler,
    read_file,
    save_upscaler,
)

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FAR = 3.0  # deviations, or the ratio of deviations, from which on latents are out of range


class LatentUpscaler:
    """Upscales latents of one space, and tells where others are given.

    Args:
        network: an upscaler of latents.
        family: the latent space it was trained in, as of
            :func:`~genscale.upscaling.latent_conventions.family_of`; None where nobody knows.
        latent_stats: ``mean`` and ``std`` of every channel of the latents it was trained on; None
            where nobody knows.
        clamp_sigma: inputs are clamped to so many deviations around the mean; None for never.

    Raises:
        ConfigError: an upscaler of pictures, or statistics that do not fit.
    """

    def __init__(
        self,
        network: Upscaler,
        *,
        family: str | None = None,
        latent_stats: Mapping[str, Sequence[float]] | None = None,
        clamp_sigma: float | None = None,
    ) -> None:
        if network.space != "latent":
            raise ConfigError(
                f"A latent upscaler was expected, but {type(network).__name__} upscales pictures. "
                "Apply it after decoding."
            )
        if clamp_sigma is not None and (latent_stats is None or not clamp_sigma > 0):
            raise ConfigError(
                f"upscaling.clamp_sigma={clamp_sigma} must be positive and needs latent_stats, "
                f"of which {'some' if latent_stats else 'none'} are known. Leave it out."
            )
        self.network = network
        self.family = family
        self.clamp_sigma = clamp_sigma
        self.latent_stats = _checked_stats(latent_stats, network.channels)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        family: str | None = None,
        clamp_sigma: float | None = None,
        input_size: int | None = None,
        weight_name: str = "lua_flux.pth",
    ) -> LatentUpscaler:
        """Read weights.

        Args:
            source: a folder as of :meth:`save_pretrained`, or of a run of ``model=lua``; a
                ``.safetensors``, ``.pth`` or ``.pt`` file of official layout; or a hub id.
            family: the latent space; None for what the folder says, or what is known of the file.
            clamp_sigma: see the class.
            input_size: side that a network of official layout is made for; None for what the
                file tells.
            weight_name: the file in a hub repository.

        Returns:
            in eval mode, on the CPU, without gradients.

        Raises:
            CheckpointError: nothing there, or files that are damaged or of another network.
        """
        path = _locate(source, weight_name)
        if path.is_file():
            network, facts = read_file(path, input_size)
            network.requires_grad_(False).eval()
        else:
            network, facts = load_upscaler(path)
        return cls(
            network,
            family=family or facts.family,
            latent_stats=facts.latent_stats,
            clamp_sigma=clamp_sigma,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights, config, and what is known of the latents."""
        facts = facts_of(self.network, family=self.family, latent_stats=self.latent_stats)
        save_upscaler(self.network, folder, facts)

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return self.network.channels

    @property
    def scales(self) -> tuple[int, ...]:
        """Factors it offers."""
        return self.network.scales

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Any:
        """Move the network; returns itself."""
        nn.Module.to(self.network, device, dtype)  # diffusers' own method warns of every cast
        return self

    @torch.no_grad()
    def __call__(
        self,
        latents: Tensor,
        scale: int = 2,
        *,
        tile: int | None = None,
        overlap: int | None = None,
        batch: int = 1,
    ) -> Tensor:
        """Upscale latents of VAE space, which are computed in the network's type.

        Args:
            latents: ``(B, C, h, w)``, see
                :func:`~genscale.upscaling.latent_conventions.to_vae_space`.
            scale: one of :attr:`scales`.
            tile: see :meth:`Upscaler.upscale`, as are the others.
            overlap: of tiles.
            batch: tiles a network call.

        Returns:
            float32 ``(B, C, h * scale, w * scale)``.

        Raises:
            ConfigError: other channels, or a scale that is not offered.
        """
        self.network.check(latents, scale)
        self.look_at(latents)
        return self.enlarge(latents, scale, tile=tile, overlap=overlap, batch=batch)

    def enlarge(
        self,
        latents: Tensor,
        scale: int = 2,
        *,
        tile: int | None = None,
        overlap: int | None = None,
        batch: int = 1,
    ) -> Tensor:
        """Upscale as a call does, but with gradients to the latents, and without a look at them."""
        x = self._clamped(latents.float())
        like = next(self.network.parameters(), x)
        x = x.to(like.device, like.dtype)
        upscaled = self.network.upscale(x, scale, tile=tile, overlap=overlap, batch=batch)
        return upscaled.float()

    def check(self, pipe: Any, scale: int) -> None:
        """Check that a pipeline's latents are of the network's space.

        Raises:
            ConfigError: other channels, another space, or a scale that is not offered.
        """
        name, channels, family = type(pipe).__name__, vae_channels(pipe), family_of(pipe)
        if channels != self.channels:
            raise ConfigError(
                f"The upscaler is for latents of {self.channels} channels, but those of {name} "
                f"have {channels}. Give one of that many, or adapt this one with adapt_channels."
            )
        if None not in (family, self.family) and family != self.family:
            raise ConfigError(
                f"The upscaler is for latents of the space '{self.family}', but those of {name} "
                f"are of '{family}'. Give one of that space, or fine-tune this one."
            )
        if scale not in self.scales:
            raise ConfigError(
                f"upscaling.scale={scale} is not offered: the upscaler has the scales "
                f"{', '.join(map(str, self.scales))}. Give one of them."
            )

    def look_at(self, latents: Tensor) -> None:
        """Warn of latents ``(B, C, h, w)`` unlike those of training; the device is waited for."""
        if self.latent_stats is None:
            return
        x = latents.detach().float()
        mean = torch.tensor(self.latent_stats["mean"], device=x.device)
        std = torch.tensor(self.latent_stats["std"], device=x.device)
        off = ((x.mean((0, 2, 3)) - mean).abs() / std).max().item()
        ratio = x.std((0, 2, 3), correction=0) / std
        spread = max(ratio.max().item(), 1 / max(ratio.min().item(), 1e-12))
        if off > _FAR or spread > _FAR:
            warnings.warn(
                "The latents are unlike those that the upscaler was trained on: the mean of a "
                f"channel is {off:.3g} deviations away, and a deviation differs {spread:.3g} "
                f"times; up to {_FAR:g} was expected. Give what the VAE decodes, see to_vae_space.",
                stacklevel=4,  # beyond torch's decorator of the caller
            )

    def _clamped(self, x: Tensor) -> Tensor:
        """Clamp latents where that is asked for."""
        if self.clamp_sigma is None or self.latent_stats is None:
            return x
        mean = torch.tensor(self.latent_stats["mean"], device=x.device).view(1, -1, 1, 1)
        std = torch.tensor(self.latent_stats["std"], device=x.device).view(1, -1, 1, 1)
        reach = self.clamp_sigma * std
        return x.clamp(mean - reach, mean + reach)


class UpscaledPipeline:
    """A diffusers pipeline whose pictures are upscaled as latents; called as the pipeline is.

    Everything but the call is the pipeline's own.

    Args:
        pipe: the pipeline.
        upscaler: for its latents.
        scale: factor.
        tile: side of a tile in latent cells before upscaling; None upscales the whole at once.
        decode_tile: side of a tile in latent cells for the decoder; None for its default.
    """

    def __init__(
        self,
        pipe: Any,
        upscaler: LatentUpscaler,
        *,
        scale: int = 2,
        tile: int | None = None,
        decode_tile: int | None = None,
    ) -> None:
        upscaler.check(pipe, scale)
        self.pipe, self.upscaler, self.scale = pipe, upscaler, scale
        self.tile, self.decode_tile = tile, decode_tile

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the pipeline, upscale, decode.

        ``output_type="latent"`` gives upscaled latents of VAE space. ``height`` and ``width`` are
        those before upscaling, and given by name.
        """
        output_type = kwargs.pop("output_type", "pil")
        return_dict = kwargs.pop("return_dict", True)
        result = self.pipe(*args, **kwargs, output_type="latent")
        latents = result.images
        height, width = self._size(latents, kwargs.get("height"), kwargs.get("width"))
        u = to_vae_space(self.pipe, latents, height, width)
        u = self.upscaler(u, self.scale, tile=self.tile)
        images = (
            u
            if output_type == "latent"
            else decode(self.pipe, u, tile=self.decode_tile, output_type=output_type)
        )
        if not return_dict:
            return (images,)
        result.images = images
        return result

    def to(self, *args: Any, **kwargs: Any) -> UpscaledPipeline:
        """Move the pipeline as its own method does, and the upscaler to its device."""
        self.pipe.to(*args, **kwargs)
        self.upscaler.to(self.pipe.device)
        return self

    def __getattr__(self, name: str) -> Any:
        if name == "pipe":  # not yet set, as in a copy being made
            raise AttributeError(name)
        return getattr(self.pipe, name)

    def _size(self, latents: Tensor, height: int | None, width: int | None) -> tuple[int, int]:
        """Return the size of the pictures: as given, as latents tell, or the pipeline's own."""
        stride = int(self.pipe.vae_scale_factor)
        if latents.dim() > 3:
            return latents.shape[-2] * stride, latents.shape[-1] * stride
        usual = getattr(self.pipe, "default_sample_size", 128) * stride
        return height or usual, width or usual


def with_latent_upscaler(
    pipe: Any,
    upscaler: LatentUpscaler,
    scale: int = 2,
    *,
    tile: int | None = None,
    decode_tile: int | None = None,
) -> UpscaledPipeline:
    """Put an upscaler between a pipeline and its decoder; see :class:`UpscaledPipeline`.

    Raises:
        ConfigError: the latents of the pipeline are not those of the upscaler, or a scale that is
            not offered.
    """
    return UpscaledPipeline(pipe, upscaler, scale=scale, tile=tile, decode_tile=decode_tile)


def _locate(source: str | Path, weight_name: str) -> Path:
    """Return a local folder or file; a hub id is fetched or found cached."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    if not _HUB_ID.fullmatch(str(source)):
        raise CheckpointError(
            f"{source} is no folder, no file and no hub id. Give a folder with config.json and "
            f"{WEIGHTS}, a file such as lua_flux.pth, or an id such as vaskers5/LUA-FLUX."
        )
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(str(source), weight_name))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{source} is no folder or file here, and the hub does not give its {weight_name} "
            f"({type(error).__name__}). Give the path of a copy, or fetch it first with: "
            f"hf download {source}"
        ) from error


def _checked_stats(
    stats: Mapping[str, Sequence[float]] | None, channels: int
) -> dict[str, list[float]] | None:
    if stats is None:
        return None
    found = {name: [float(v) for v in stats.get(name, ())] for name in ("mean", "std")}
    if any(len(v) != channels for v in found.values()) or min(found["std"]) <= 0:
        raise ConfigError(
            f"latent_stats must give mean and std (positive) of {channels} channels, but "
            f"{dict(stats)} was given. Measure them on the latents of training."
        )
    return found
