"""Runs that trained an autoencoder: told apart from others, read back, exported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from genscale import rng
from genscale.assembly import build
from genscale.autoencoders.base import Autoencoder
from genscale.data.module import ImageDataModule
from genscale.flops import meta_twin
from genscale.io.images import from_uint8
from genscale.io.weights import assign_strictly, complete_from
from genscale.pipeline import choose_device
from genscale.rng import Purpose
from genscale.run_weights import MAIN, Origin, read_weights
from genscale.runs import RunFolder
from genscale.training.trainable import TrainableRecipe
from genscale.training.upscaling import UpscalerRecipe

_MEASURED_ON = 2048  # training pictures whose latents are standardised


def trains_autoencoder(config: Mapping[str, Any]) -> bool:
    """Return whether a run's config trains an autoencoder rather than a backbone."""
    node = config.get("objective")
    target = str(node.get("_target_", "")) if isinstance(node, Mapping) or node else ""
    if not target.startswith("genscale.training."):
        return False
    module, _, name = target.rpartition(".")
    try:
        recipe = getattr(import_module(module), name)
    except (ImportError, AttributeError):
        return False  # told where the objective is built
    trainable = isinstance(recipe, type) and issubclass(recipe, TrainableRecipe)
    return trainable and not issubclass(recipe, UpscalerRecipe)


def load_autoencoder(
    run: str | Path,
    *,
    checkpoint: str | int | Path = "latest",
    weights: str = MAIN,
    device: str | torch.device | None = None,
) -> tuple[Autoencoder, Origin]:
    """Load the network of a run that trained an autoencoder, in eval mode.

    Args:
        run: the run folder.
        checkpoint: ``latest``, a step, or a file.
        weights: ``ema``, ``raw``, or another average.
        device: default is CUDA where present.

    Raises:
        ConfigError: no run there.
        CheckpointError: no such checkpoint, damaged, or of another network.
    """
    folder = RunFolder.open(run)
    state, origin = read_weights(folder, checkpoint, weights)
    make = partial(build, folder.config().get("model"), path="model")
    with torch.device("meta"):
        network = make()
    assign_strictly(network, state, device=choose_device(device), source=origin.file)
    complete_from(network, make)
    return network.eval(), origin


def save_autoencoder(
    network: Any,
    folder: Path,
    datamodule: ImageDataModule,
    *,
    finish: Callable[[nn.Module, Tensor], None],
) -> None:
    """Export a network as diffusers' mixins write it; a KL autoencoder in diffusers' own layout.

    Args:
        network: with the weights to export.
        folder: where to.
        datamodule: what it was trained on.
        finish: see :meth:`~genscale.training.trainable.Trainable.finish`.
    """
    train = datamodule.train
    order = rng.permutation(rng.key(0, Purpose.SUBSET), len(train))
    finish(network, from_uint8(train.images(order[:_MEASURED_ON])))
    network.save_pretrained(folder)


@torch.no_grad()
def reconstruct(network: Autoencoder, images: Tensor) -> Tensor:
    """Return pictures ``(n, C, H, W)`` in [-1, 1] encoded and decoded; of a posterior, its mean."""
    return network.decode(network.encode(images)).float()


def count_flops(network: Any, channels: int, resolution: int) -> dict[str, int]:
    """Count the forward operations of one picture, by direct part; the total under ``""``."""
    both = _Both(meta_twin(network))
    counter = FlopCounterMode(display=False)
    with counter:
        both(torch.empty(1, channels, resolution, resolution, device="meta"))
    found = {"": counter.get_total_flops()}
    for name, operations in counter.get_flop_counts().items():
        found[name.removeprefix("_Both.network.")] = sum(operations.values())
    return found


class _Both(nn.Module):
    """Encoding and decoding as one module, for what counts operations by module."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return reconstruct(self.network, images)
