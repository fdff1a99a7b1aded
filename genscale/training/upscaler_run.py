"""Runs that trained an upscaler: told apart from others, read back to be judged, exported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from genscale import rng
from genscale.assembly import build
from genscale.data.module import ImageDataModule
from genscale.io.images import from_uint8
from genscale.loading import choose_device
from genscale.rng import Purpose
from genscale.run_weights import MAIN
from genscale.runs import RunFolder
from genscale.training.latent_upscaling import LatentUpscalingTraining
from genscale.training.upscaling import UpscalerRecipe, UpscalerTraining
from genscale.upscaling.loading import (
    UpscalerFacts,
    load_upscaler,
    save_upscaler,
    write_facts,
)

_MEASURED_ON = 512  # training pictures whose latents are measured
_OF_A_START = ("start", "adapt", "frozen_steps")  # keys of recipes that go on from other weights


class WriteFacts(pl.Callback):
    """Writes ``upscaler.json`` as training starts: any checkpoint of the run can then be used.

    Args:
        folder: of the run.
        facts: what is known of the upscaler.
    """

    def __init__(self, folder: RunFolder, facts: UpscalerFacts) -> None:
        self.folder = folder
        self.facts = facts

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write them, on the first process."""
        if trainer.is_global_zero:
            write_facts(self.folder.path, self.facts)


def build_training(config: Mapping[str, Any], network: Any) -> UpscalerTraining:
    """Return the training of a run's config around a network, for what it knows to make.

    Raises:
        ConfigError: the config is of no such run.
    """
    recipe: UpscalerRecipe = build(config.get("objective"), path="objective")
    autoencoder = build(config.get("autoencoder"), path="autoencoder")
    return recipe.build(network, seed=0, autoencoder=autoencoder)


def load_training(
    run: str | Path,
    *,
    checkpoint: str | int | Path = "latest",
    weights: str = MAIN,
    device: str | torch.device | None = None,
) -> tuple[UpscalerTraining, UpscalerFacts]:
    """Load the upscaler of a run with all that its training knows to make of pictures.

    Args:
        run: the run folder.
        checkpoint: ``latest``, a step, or a file.
        weights: ``ema``, ``raw``, or another average.
        device: default is CUDA where present.

    Raises:
        ConfigError: no run there, or one that trained something else.
        CheckpointError: no such checkpoint, damaged, or of another network.
    """
    network, facts = load_upscaler(run, checkpoint, weights)
    torch.nn.Module.to(network, choose_device(device))
    config = RunFolder.open(run).config()
    # the weights are here already: what the run started from need not be there any more
    objective = {k: v for k, v in config["objective"].items() if k not in _OF_A_START}
    return build_training({**config, "objective": objective}, network), facts


def prepare(training: UpscalerTraining, datamodule: ImageDataModule) -> None:
    """Measure what the facts tell of the inputs, on a keyed draw; encode once what is to be."""
    pictures = datamodule.train
    order = rng.permutation(rng.key(0, Purpose.SUBSET), len(pictures))
    training.measure(from_uint8(pictures.images(order[:_MEASURED_ON])))
    if isinstance(training, LatentUpscalingTraining):
        training.keep(pictures, datamodule.seed)


def export_upscaler(run: RunFolder, folder: Path) -> UpscalerFacts:
    """Write the averaged weights of a run's last checkpoint as a folder; see ``load_upscaler``."""
    network, facts = load_upscaler(run.path)
    save_upscaler(network, folder, facts)
    return facts


@torch.no_grad()
def enlarge_first(training: UpscalerTraining, network: Any, images: Tensor) -> Tensor:
    """Return what a network of these weights makes at the first of its scales."""
    return training.enlarge(network, images, training.model.scales[0])


@torch.no_grad()
def enlarged(training: UpscalerTraining, images: Tensor, scale: int) -> dict[str, Tensor]:
    """Return what is made of pictures that were made small, by what made it.

    Args:
        training: with the network.
        images: ``(B, C, H, W)`` in [-1, 1].
        scale: one of the network's.

    Returns:
        under ``""`` what the network makes, then what it is compared with; all in [-1, 1].
    """
    own = training.enlarge(training.model, images, scale)
    return {"": own, **training.baselines(images, scale)}


@torch.no_grad()
def shown_small(training: UpscalerTraining, images: Tensor, scale: int) -> Tensor:
    """Return the small pictures that a network is given, every pixel as a square of that many."""
    small = training.shrink(training.model, images, scale)
    return small.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
