"""What an autoencoder has to do in a training run, and whether it can."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, open_dict

from genscale.cli.app import instantiate
from genscale.cli.trained_autoencoders import trained_node
from genscale.errors import ConfigError

if TYPE_CHECKING:
    from genscale.autoencoders.base import Autoencoder


def settle_autoencoder(cfg: DictConfig) -> None:
    """Let ``autoencoder=run autoencoder.run=<folder>`` mean whatever that run trained, in place.

    Raises:
        ConfigError: no folder is given, or the run there trained no autoencoder; or other places
            are given besides.
    """
    node = cfg.autoencoder
    if node.get("_target_"):
        return
    if node.get("run") is None:
        raise ConfigError(
            "autoencoder=run needs the folder of a run that trained one. Give autoencoder.run=<run "
            "of model=kl_small or model=msvq>."
        )
    sizes = ("latent_channels", "downsample", "image_channels")  # the run's own
    others = [k for k, value in node.items() if k not in ("run", *sizes) and value is not None]
    if others:
        raise ConfigError(
            f"autoencoder.{others[0]} was given, but autoencoder=run takes what a run trained as "
            "it is. Leave it out, or give another autoencoder=..."
        )
    with open_dict(cfg):
        cfg.autoencoder = trained_node(str(node.run))


def autoencoder_problems(cfg: DictConfig, datamodule: Any) -> list[str]:
    """Return a sentence for everything that would stop a run at its first batch or grid.

    Pictures are encoded at every step, cached latents are not; samples are decoded where grids or
    metrics are made of them.

    Args:
        cfg: the composed config.
        datamodule: built from it.

    Raises:
        GenscaleError: the autoencoder cannot be built, or its weights cannot be read.
    """
    from genscale.data.latents import LatentDataModule

    autoencoder = instantiate(cfg.autoencoder, "autoencoder")
    cached = isinstance(datamodule, LatentDataModule)
    measures = cfg.callbacks.metrics_every > 0
    decodes = measures or cfg.callbacks.sample_every > 0
    problems: list[str] = autoencoder.check(encodes=not cached, decodes=decodes)
    if isinstance(datamodule, LatentDataModule):
        if not problems:
            problems += datamodule.train.problems_with(autoencoder)
        if measures:
            datamodule.pictures()  # what samples are compared with
    else:
        if not problems:  # else the sizes are not known yet
            problems += size_problems(autoencoder, datamodule.resolution)
            problems += token_problems(cfg.model, autoencoder)
        problems += channel_problems(autoencoder, datamodule.channels)
        problems += clip_problems(autoencoder, datamodule.num_frames)
    return problems


def token_problems(model: DictConfig, autoencoder: Autoencoder) -> list[str]:
    """Return a sentence for every number of tokens in which model and tokenizer differ.

    Args:
        model: the model's node; it is not built.
        autoencoder: of any kind.
    """
    from genscale.autoencoders.base import ScaleTokenizer
    from genscale.layers.scales import as_scales

    if not isinstance(autoencoder, ScaleTokenizer) or model.get("scales") is None:
        return []
    scales = as_scales([s if isinstance(s, int) else tuple(s) for s in model.scales])
    pairs = {
        "scales": (scales, autoencoder.scales),
        "vocab_size": (model.vocab_size, autoencoder.vocab_size),
        "latent_channels": (model.latent_channels, autoencoder.latent_channels),
    }
    return [
        f"model.{name} is {own}, but the tokenizer has {other}. Leave model.{name} out, so that it "
        "follows the tokenizer, or give the autoencoder.run it was made for."
        for name, (own, other) in pairs.items()
        if own != other
    ]


def size_problems(autoencoder: Autoencoder, resolution: int) -> list[str]:
    """Return a sentence where pictures are not of the size that a tokenizer's scales are for."""
    from genscale.autoencoders.base import ScaleTokenizer

    if not isinstance(autoencoder, ScaleTokenizer):
        return []
    sizes = tuple(side * autoencoder.downsample for side in autoencoder.scales[-1])
    if sizes == (resolution, resolution):
        return []
    return [
        f"data.resolution={resolution}, but the tokenizer's scales end with "
        f"{list(autoencoder.scales[-1])}, for pictures of {sizes[0]} x {sizes[1]}. Give pictures "
        f"of this size, or autoencoder.scales=[...] that end with the size of their latents."
    ]


def clip_problems(autoencoder: Autoencoder, num_frames: int) -> list[str]:
    """Return a sentence where a video autoencoder meets pictures, or clips of other lengths.

    Args:
        autoencoder: of any kind.
        num_frames: of the clips; 0 for pictures.
    """
    if autoencoder.temporal_downsample is None:
        return []
    if not num_frames:
        return [
            "The autoencoder takes clips, but the data are pictures. Give data=video_folder, say, "
            "or an autoencoder=... of pictures."
        ]
    try:
        autoencoder.frames_to_latent(num_frames)
    except ConfigError as error:
        return [str(error)]
    return []


def channel_problems(autoencoder: Autoencoder, channels: int) -> list[str]:
    """Return a sentence where pictures have other channels than the autoencoder takes."""
    taken = autoencoder.image_channels
    if taken in (None, channels):
        return []
    return [
        f"data.channels={channels}, but the autoencoder takes pictures of {taken} channels. Give "
        f"data.channels={taken}, or another autoencoder=..."
    ]
