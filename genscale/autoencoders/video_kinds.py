"""The video autoencoders that diffusers knows: sizes and normalisation, read from their configs.

Nothing here imports torch or diffusers, but for :func:`assumed`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module, reload
from types import ModuleType
from typing import Any

from genscale.errors import ConfigError, did_you_mean


@dataclass(frozen=True, slots=True)
class VideoSizes:
    """How a clip's size and that of its latents go together.

    Args:
        latent_channels: channels of the latents, C.
        downsample: pixels a latent cell covers along one side.
        temporal_downsample: frames it covers.
    """

    latent_channels: int
    downsample: int
    temporal_downsample: int


@dataclass(frozen=True, slots=True)
class VideoKind:
    """One class of diffusers.

    Args:
        name: as configs call it.
        class_name: of diffusers, and of ``config.json``.
        module: where it is, below ``diffusers.models.autoencoders``.
        sizes: reads sizes from a config.
        causal: a latent frame knows no later frames, and the first frame has one of its own:
            F = 1 + r n frames have 1 + n latent frames; else F = r n have n.
        together: latent frames after the first come in groups of so many: others are encoded, but
            not decoded to as many frames.
        variational: its encoder gives a variance, too.
    """

    name: str
    class_name: str
    module: str
    sizes: Callable[[Mapping[str, Any]], VideoSizes]
    causal: bool = True
    together: int = 1
    variational: bool = True

    def latent_frames(self, frames: int, ratio: int) -> int:
        """Return the latent frames of a clip.

        Raises:
            ConfigError: a clip cannot have so many frames; the sentence gives the nearest.
        """
        first, step = (1 if self.causal else 0), ratio * self.together
        if frames < 1 or (frames - first) % step:
            below = max(frames - first, 0) // step * step + first
            near = [str(count) for count in (below, below + step) if count > 0]
            raise ConfigError(
                f"data.num_frames={frames} does not suit autoencoder.kind={self.name}: clips have "
                f"{'1 + ' if first else ''}{step}n frames. Give {' or '.join(near)}."
            )
        return (frames - first) // ratio + first

    def frames(self, latent_frames: int, ratio: int) -> int:
        """Return the frames of so many latent frames."""
        return 1 + (latent_frames - 1) * ratio if self.causal else latent_frames * ratio

    def load_class(self) -> Any:
        """Import the class of diffusers.

        Raises:
            ImportError: it cannot be imported; the sentence says what is most likely wrong.
        """
        try:
            module = import_module(f"diffusers.models.autoencoders.{self.module}")
            return getattr(_on_cpu(module), self.class_name)
        except (ImportError, RuntimeError, AttributeError) as error:
            cause = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
            raise ImportError(
                f"autoencoder.kind={self.name} needs diffusers' {self.class_name}, which cannot be "
                f"imported ({cause}). Most often a torchvision or transformers that does not fit "
                "this torch is installed: remove it (pip uninstall torchvision), or update "
                "diffusers and transformers together."
            ) from error


def _on_cpu(module: ModuleType) -> ModuleType:
    """Import a module again whose own tensors were made on the meta device.

    diffusers imports all its autoencoders at once, some of which keep tensors (Cosmos' wavelets);
    where that first happens while a model is built on the meta device, they have no data.
    """
    import torch

    values = [
        v for table in vars(module).values() if isinstance(table, dict) for v in table.values()
    ]
    if any(isinstance(value, torch.Tensor) and value.is_meta for value in values):
        with torch.device("cpu"):
            return reload(module)
    return module


def _power(flags: Any) -> int:
    return int(2 ** sum(map(bool, flags)))


def _wan(config: Mapping[str, Any]) -> VideoSizes:
    steps = config["temperal_downsample"]  # diffusers spells it so
    patch = config.get("patch_size") or 1
    return VideoSizes(config["z_dim"], 2 ** len(steps) * patch, _power(steps))


def _cogvideox(config: Mapping[str, Any]) -> VideoSizes:
    spatial = 2 ** (len(config["block_out_channels"]) - 1)
    temporal = int(config["temporal_compression_ratio"])
    return VideoSizes(config["latent_channels"], spatial, temporal)


def _ltx(config: Mapping[str, Any]) -> VideoSizes:
    scaling = _power(config["spatio_temporal_scaling"])
    spatial = config.get("spatial_compression_ratio") or config["patch_size"] * scaling
    temporal = config.get("temporal_compression_ratio") or config["patch_size_t"] * scaling
    return VideoSizes(config["latent_channels"], spatial, temporal)


def _stated(config: Mapping[str, Any]) -> VideoSizes:
    return VideoSizes(
        config["latent_channels"],
        config["spatial_compression_ratio"],
        config["temporal_compression_ratio"],
    )


def _mochi(config: Mapping[str, Any]) -> VideoSizes:
    spatial, temporal = config["spatial_expansions"], config["temporal_expansions"]
    return VideoSizes(config["latent_channels"], math.prod(spatial), math.prod(temporal))


KINDS = {
    kind.name: kind
    for kind in (
        VideoKind("wan", "AutoencoderKLWan", "autoencoder_kl_wan", _wan),
        VideoKind(
            *("cogvideox", "AutoencoderKLCogVideoX", "autoencoder_kl_cogvideox", _cogvideox),
            together=2,
        ),
        VideoKind("ltx", "AutoencoderKLLTXVideo", "autoencoder_kl_ltx", _ltx),
        VideoKind("hunyuan", "AutoencoderKLHunyuanVideo", "autoencoder_kl_hunyuan_video", _stated),
        VideoKind("mochi", "AutoencoderKLMochi", "autoencoder_kl_mochi", _mochi),
        VideoKind(
            *("allegro", "AutoencoderKLAllegro", "autoencoder_kl_allegro", _cogvideox),
            causal=False,
        ),
        VideoKind(
            *("cosmos", "AutoencoderKLCosmos", "autoencoder_kl_cosmos", _stated),
            variational=False,
        ),
    )
}


def kind_of(name: str) -> VideoKind:
    """Return a kind by the name that configs use.

    Raises:
        ConfigError: there is none.
    """
    if name not in KINDS:
        raise ConfigError(
            f"autoencoder.kind='{name}' is unknown.{did_you_mean(str(name), list(KINDS))} Choose "
            f"one of {', '.join(KINDS)}."
        )
    return KINDS[name]


def assumed(kind: VideoKind) -> dict[str, Any]:
    """Return what diffusers takes where a config does not say; imports its class."""
    parameters = inspect.signature(kind.load_class().__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def statistics(
    kind: VideoKind, config: Mapping[str, Any], mean: list[float] | None, std: list[float] | None
) -> tuple[list[float], list[float]]:
    """Return what latents are shifted by and scaled with: latents = (z - shift) * scale.

    Args:
        kind: of the autoencoder.
        config: complete.
        mean: one a channel (Cosmos: one a channel and latent frame), or None for zeros.
        std: likewise, or None for ones.

    Returns:
        shift and scale: one number for all channels, one a channel, or, row by row, one a channel
        and latent frame.
    """
    factor = float(config.get("scaling_factor") or 1.0)
    if kind.name == "wan":
        factor = 1.0  # its configs have none
    shift = [0.0] if mean is None else [float(value) for value in mean]
    scale = [factor] if std is None else [factor / float(value) for value in std]
    return shift, scale
