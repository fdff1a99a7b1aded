"""What trainings of upscalers share: patches, small pictures made of them, and the way back."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from genscale.autoencoders.base import Autoencoder
from genscale.errors import ConfigError
from genscale.flops import meta_twin
from genscale.rng import Purpose, StepRandom
from genscale.training.trainable import PictureBatch, Trainable, TrainableRecipe
from genscale.upscaling.base import Upscaler
from genscale.upscaling.loading import UpscalerFacts, facts_of
from genscale.upscaling.rescaling_losses import quantise


@dataclass(frozen=True, slots=True, kw_only=True)
class UpscalerRecipe(TrainableRecipe):
    """Settings that all trainings of upscalers share.

    Args:
        patch_size: side in pixels of the large patches that are cut from pictures, at a place
            drawn for every sample; None takes whole pictures.
        turned: turn and mirror every sample at random, in one of eight ways.

    Raises:
        ConfigError: a value out of range.
    """

    patch_size: int | None = None
    turned: bool = False

    def __post_init__(self) -> None:
        if self.patch_size is not None and self.patch_size < 1:
            raise ConfigError(
                f"objective.patch_size must be at least 1 pixel, but {self.patch_size} was given. "
                "Give e.g. 96, or null for whole pictures."
            )

    @abstractmethod
    def build(
        self, model: nn.Module, *, seed: int, autoencoder: Autoencoder | None = None
    ) -> UpscalerTraining:
        """Return the training of ``model``.

        Args:
            model: an upscaler.
            seed: of the run.
            autoencoder: whose latents a latent upscaler enlarges; others do without.

        Raises:
            ConfigError: a network that the recipe does not train.
        """

    def side(self, resolution: int) -> int:
        """Return the side of what is learned from, of pictures of ``resolution`` pixels."""
        return resolution if self.patch_size is None else self.patch_size


class UpscalerTraining(Trainable):
    """An upscaler, and the small pictures that it learns to make large.

    Pictures are in [-1, 1] here, as everywhere; what networks of pixels see is in [0, 1].

    Args:
        model: the upscaler.
        recipe: settings.
        seed: of the run.
    """

    def __init__(self, model: Upscaler, recipe: UpscalerRecipe, seed: int) -> None:
        super().__init__(model)
        self.settings = recipe
        self.seed = seed

    def patches(self, batch: PictureBatch, rng: StepRandom) -> Tensor:
        """Return what a batch is learned from: patches, turned, as the recipe has it."""
        images = batch.images
        if self.settings.patch_size is not None:
            images = cut(images, self.settings.patch_size, rng)
        return turned(images, rng) if self.settings.turned else images

    reduction: str = "bicubic, antialiased, 8 bits"
    """How :meth:`shrink` makes pictures small, as protocols name it."""

    def shrink(self, network: Any, images: Tensor, scale: int) -> Tensor:
        """Return the small pictures, in [-1, 1], that are made large again; see :meth:`enlarge`."""
        return reduced(images, scale)

    @abstractmethod
    def enlarge(self, network: Any, images: Tensor, scale: int) -> Tensor:
        """Return ``images`` made small and large again by a network of these weights.

        Args:
            network: :attr:`model`, or an average of it.
            images: ``(B, C, H, W)`` in [-1, 1].
            scale: one of the network's.

        Returns:
            the same shape, in [-1, 1].
        """

    def baselines(self, images: Tensor, scale: int) -> dict[str, Tensor]:
        """Return what else could have been made of the small pictures, by name."""
        return {"bicubic": interpolated(reduced(images, scale), scale)}

    def facts(self, **known: Any) -> UpscalerFacts:
        """Return what must be known of the upscaler once it is trained."""
        return facts_of(self.model, **known)

    def measure(self, images: Tensor) -> None:
        """Measure on training pictures ``(n, C, H, W)`` what :meth:`facts` tells of them."""

    def input_shape(self, resolution: int) -> tuple[int, ...]:
        """Return the shape of one input at the first scale, for counting operations."""
        side = self.settings.side(resolution) // self.model.scales[0]
        return (self.model.channels, side, side)


def reduced(images: Tensor, scale: int) -> Tensor:
    """Return pictures made small with the antialiased bicubic filter, in 8 bits as files are.

    Args:
        images: ``(B, C, H, W)`` in [-1, 1], with sides that ``scale`` divides.
        scale: how much smaller.

    Raises:
        ConfigError: sides that do not divide.
    """
    height, width = images.shape[2:]
    if height % scale or width % scale:
        raise ConfigError(
            f"Pictures of {height} x {width} cannot be made {scale} times smaller. Give "
            f"data.resolution (or objective.patch_size) as a multiple of {scale}."
        )
    small = F.interpolate(
        images.float(),
        size=(height // scale, width // scale),
        mode="bicubic",
        align_corners=False,
        antialias=True,
    )
    return quantise(small / 2 + 0.5) * 2 - 1


def interpolated(small: Tensor, scale: int) -> Tensor:
    """Return small pictures in [-1, 1] made large with the bicubic filter (a = -0.75)."""
    large = F.interpolate(small, scale_factor=scale, mode="bicubic", align_corners=False)
    return large.clamp(-1.0, 1.0)


def cut(images: Tensor, size: int, rng: StepRandom) -> Tensor:
    """Return a square patch of every picture, at a place that is a function of its position.

    Raises:
        ConfigError: pictures smaller than the patch.
    """
    height, width = images.shape[2:]
    down, right = height - size + 1, width - size + 1
    if min(down, right) < 1:
        raise ConfigError(
            f"objective.patch_size={size} is larger than the data's pictures of {height} x "
            f"{width}. Give at most {min(height, width)}."
        )
    place = rng.integers(Purpose.CROP, down * right).to(images.device)
    along = torch.arange(size, device=images.device)
    rows = (place // right)[:, None] + along
    columns = (place % right)[:, None] + along
    number = torch.arange(len(images), device=images.device)
    found = images[number[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return found.movedim(3, 1)  # indices around a slice put theirs first


def turned(images: Tensor, rng: StepRandom) -> Tensor:
    """Turn and mirror every square picture in one of eight ways, by its position."""
    way = rng.integers(Purpose.TURN, 8).to(images.device)[:, None, None, None]
    images = torch.where(way % 2 == 1, images.flip(3), images)
    images = torch.where(way // 2 % 2 == 1, images.flip(2), images)
    return torch.where(way >= 4, images.transpose(2, 3), images)


def count_upscaler_flops(network: Any, shape: tuple[int, ...]) -> dict[str, int]:
    """Count the forward operations of one input at the first scale, by part; total under ``""``."""
    twin: Any = meta_twin(network)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        twin(torch.empty(1, *shape, device="meta"), network.scales[0])
    prefix = f"{type(twin).__name__}."
    found = {"": counter.get_total_flops()}
    for name, operations in counter.get_flop_counts().items():
        if name.startswith(prefix):
            found[name.removeprefix(prefix)] = sum(operations.values())
    return found
