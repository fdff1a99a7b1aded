"""How far a reconstruction is from its picture: pixels, features, and a discriminator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.autoencoders.discriminator import (
    PatchDiscriminator,
    discriminator_hinge,
    generator_hinge,
)
from genscale.errors import ConfigError, did_you_mean
from genscale.metrics.features import FeatureNetwork
from genscale.metrics.lpips import map_distances
from genscale.metrics.reconstruction import fitting_scales, multiscale_similarity
from genscale.training.trainable import MODEL, GroupLosses, TrainableRecipe, all_reduce

Pixel = Literal["l1", "l2", "both"]
DISCRIMINATOR = "discriminator"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconstructionRecipe(TrainableRecipe):
    """The losses that all autoencoders share; the ones that are off cost nothing.

    Args:
        pixel: mean absolute error (``l1``), mean squared error (``l2``), or their sum.
        perceptual: a feature network that gives maps with gradients, or None.
        perceptual_weight: of the distance of its maps.
        structural_weight: of 1 - MS-SSIM, at as many scales as the pictures have room for.
        adversarial_weight: of the discriminator's judgement; 0 builds no discriminator.
        adversarial_start: optimizer steps before the discriminator learns and judges.
        adversarial_adaptive: bring both gradients at the decoder's last layer to one length first
            (arXiv:2012.09841, eq. 7); ``adversarial_weight`` multiplies that.
        discriminator_size: width of the discriminator's first layer.
        discriminator_layers: its layers of stride 2.

    Raises:
        ConfigError: a value out of range.
    """

    pixel: Pixel = "l2"
    perceptual: FeatureNetwork | None = None
    perceptual_weight: float = 1.0
    structural_weight: float = 0.0
    adversarial_weight: float = 0.0
    adversarial_start: int = 0
    adversarial_adaptive: bool = False
    discriminator_size: int = 64
    discriminator_layers: int = 3

    def __post_init__(self) -> None:
        if self.pixel not in get_args(Pixel):
            raise ConfigError(
                f"objective.pixel must be one of {', '.join(get_args(Pixel))}, but '{self.pixel}' "
                f"was given.{did_you_mean(str(self.pixel), get_args(Pixel))}"
            )
        weights = ("perceptual_weight", "structural_weight", "adversarial_weight")
        for name in (*weights, "adversarial_start"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"objective.{name} must be 0 or more, but {getattr(self, name)} was given."
                )
        if self.discriminator_size < 1 or self.discriminator_layers < 1:
            raise ConfigError(
                "objective.discriminator_size and discriminator_layers must be at least 1, but "
                f"{self.discriminator_size} and {self.discriminator_layers} were given. "
                "Give e.g. 64 and 3."
            )

    def check(self) -> list[str]:
        """Return a sentence for what the feature network lacks."""
        return lacking(self.perceptual)


def lacking(perceptual: FeatureNetwork | None) -> list[str]:
    """Return a sentence for everything that a network lacks whose maps are to be learned from."""
    if perceptual is None:
        return []
    if not perceptual.gives_maps:
        return [
            f"objective.perceptual={perceptual.description} gives no maps with gradients to learn "
            "from. Give genscale.metrics.efficientnet.EfficientNetLite0, or leave it out."
        ]
    return perceptual.check()


class ReconstructionLoss(nn.Module):
    """The recipe's losses of reconstructions, and the discriminator that some of them need.

    Args:
        recipe: which losses.
        image_channels: channels of the pictures.
    """

    def __init__(self, recipe: ReconstructionRecipe, image_channels: int) -> None:
        super().__init__()
        self.recipe = recipe
        # held in a tuple: its weights stay out of checkpoints
        self._features = () if recipe.perceptual is None else (recipe.perceptual,)
        self.discriminator: PatchDiscriminator | None = None
        if recipe.adversarial_weight > 0:
            self.discriminator = PatchDiscriminator(
                image_channels=image_channels,
                hidden_size=recipe.discriminator_size,
                num_layers=recipe.discriminator_layers,
            )

    def groups(self) -> dict[str, nn.Module]:
        """Return what learns here, by the group's name."""
        return {} if self.discriminator is None else {DISCRIMINATOR: self.discriminator}

    def forward(
        self,
        images: Tensor,
        reconstructed: Tensor,
        step: int,
        last_layer: nn.Parameter,
    ) -> GroupLosses:
        """Return the losses of the model and, once it plays, of the discriminator.

        Args:
            images: ``(B, C, H, W)`` in [-1, 1].
            reconstructed: the same shape, with gradient.
            step: optimizer steps taken before this one.
            last_layer: the decoder's last weights, at which gradients are compared.
        """
        squared = F.mse_loss(reconstructed, images)
        terms: dict[str, Any] = {"psnr": psnr(squared.detach())}
        loss = torch.zeros_like(squared)
        if self.recipe.pixel != "l1":
            loss = loss + squared
        if self.recipe.pixel != "l2":
            loss = loss + F.l1_loss(reconstructed, images)
        terms["loss_pixel"] = loss.detach()
        for network in self._features:
            distance = map_distance(network.to(images.device), images, reconstructed)
            loss = loss + self.recipe.perceptual_weight * distance
            terms["loss_perceptual"] = distance.detach()
        if self.recipe.structural_weight > 0:
            unlike = structural_loss(reconstructed, images)
            loss = loss + self.recipe.structural_weight * unlike
            terms["loss_structural"] = unlike.detach()
        by_group = {MODEL: loss}
        if self.discriminator is not None and step >= self.recipe.adversarial_start:
            fooled = generator_hinge(self.discriminator(reconstructed))
            weight: float | Tensor = self.recipe.adversarial_weight
            if self.recipe.adversarial_adaptive:
                balance = _balance(loss, fooled, last_layer)
                weight, terms["adversarial_balance"] = weight * balance, balance
            by_group[MODEL] = loss + weight * fooled
            by_group[DISCRIMINATOR] = discriminator_hinge(
                self.discriminator(images), self.discriminator(reconstructed.detach())
            )
            terms["loss_generator"] = fooled.detach()
            terms["loss_discriminator"] = by_group[DISCRIMINATOR].detach()
        return GroupLosses(by_group, terms)


def psnr(squared_error: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of a mean squared error on [-1, 1]."""
    return 10.0 * torch.log10(4.0 / squared_error.clamp(min=1e-12))


def map_distance(network: FeatureNetwork, images: Tensor, reconstructed: Tensor) -> Tensor:
    """Return the mean squared distance of two pictures' feature maps, of unit length per cell.

    The distance of LPIPS (arXiv:1801.03924) without its learned weights, which belong to networks
    of their own.

    Args:
        network: one with ``gives_maps``.
        images: ``(B, 1 or 3, H, W)`` in [-1, 1], without gradient.
        reconstructed: the same shape.
    """
    network.prepare()
    with torch.no_grad():
        real = network.maps((images + 1) / 2)
    made = network.maps((reconstructed + 1) / 2)
    return map_distances(real, made).mean()


def structural_loss(reconstructed: Tensor, images: Tensor) -> Tensor:
    """Return the mean of 1 - MS-SSIM (SSIM where pictures are below 22 pixels), in float32.

    Args:
        reconstructed: ``(B, C, H, W)`` in [-1, 1], with gradient.
        images: the same shape.
    """
    num_scales = fitting_scales(images.shape[2], images.shape[3])
    with torch.autocast(images.device.type, enabled=False):
        x, y = ((z.float() + 1.0) * 127.5 for z in (reconstructed, images))
        return 1.0 - multiscale_similarity(x, y, num_scales=num_scales, least=1e-6).mean()


def _balance(loss: Tensor, fooled: Tensor, last_layer: nn.Parameter) -> Tensor:
    """Return the ratio of both losses' gradients at the last layer, within [0, 10^4].

    Gradients are summed over the processes first: all of them weigh alike.
    """
    lengths = [
        all_reduce(torch.autograd.grad(part, last_layer, retain_graph=True)[0]).norm()
        for part in (loss, fooled)
    ]
    ratio: Tensor = lengths[0] / (lengths[1] + 1e-4)
    return ratio.clamp(0.0, 1e4).detach()
