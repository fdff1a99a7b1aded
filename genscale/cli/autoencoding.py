"""What an autoencoder has to do in a training run, and whether it can."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from genscale.cli.app import instantiate

if TYPE_CHECKING:
    from genscale.autoencoders.base import Autoencoder


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
        problems += channel_problems(autoencoder, datamodule.channels)
    return problems


def channel_problems(autoencoder: Autoencoder, channels: int) -> list[str]:
    """Return a sentence where pictures have other channels than the autoencoder takes."""
    taken = autoencoder.image_channels
    if taken in (None, channels):
        return []
    return [
        f"data.channels={channels}, but the autoencoder takes pictures of {taken} channels. Give "
        f"data.channels={taken}, or another autoencoder=..."
    ]
