"""Training of rescalers for any factors: every step draws how much smaller pictures become."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from genscale import rng as keyed
from genscale.autoencoders.base import Autoencoder
from genscale.errors import ConfigError
from genscale.layers.norm import no_autocast
from genscale.rng import Purpose, StepRandom
from genscale.training.reconstruction import psnr
from genscale.training.trainable import MODEL, GroupLosses, PictureBatch
from genscale.training.upscaling import UpscalerRecipe, UpscalerTraining
from genscale.upscaling.iarn import IARN, resized
from genscale.upscaling.rescaling_losses import quantise, rescaling_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class ArbitraryRescaling(UpscalerRecipe):
    """IRN's loss without a latent, at factors uniform in an interval (arXiv:2209.13055).

    Args:
        least_scale: the smallest factor.
        largest_scale: the largest one.
        asymmetric: how often both axes have a factor of their own, from 0 to 1 (ours).
        fit_weight: of the squared distance from the bicubically reduced picture; None for the
            large pixels of a small one.
        reconstruction_weight: of the distance of the picture made again.

    Raises:
        ConfigError: a value out of range.
    """

    least_scale: float = 1.0
    largest_scale: float = 4.0
    asymmetric: float = 0.5
    fit_weight: float | None = None
    reconstruction_weight: float = 1.0

    def __post_init__(self) -> None:
        UpscalerRecipe.__post_init__(self)
        if not 1.0 <= self.least_scale <= self.largest_scale:
            raise ConfigError(
                "objective.least_scale must be at least 1 and at most largest_scale, but "
                f"{self.least_scale} and {self.largest_scale} were given. Give e.g. 1 and 4."
            )
        if not 0.0 <= self.asymmetric <= 1.0:
            raise ConfigError(
                f"objective.asymmetric is how often, from 0 to 1, but {self.asymmetric} was given."
            )
        for name in ("fit_weight", "reconstruction_weight"):
            if (getattr(self, name) or 0.0) < 0:
                raise ConfigError(
                    f"objective.{name} must be 0 or more, but {getattr(self, name)} was given."
                )

    def build(
        self, model: nn.Module, *, seed: int, autoencoder: Autoencoder | None = None
    ) -> ArbitraryRescalingTraining:
        """Return the training of an IARN; see :meth:`UpscalerRecipe.build`."""
        if not isinstance(model, IARN):
            raise ConfigError(
                "objective=arbitrary_rescaling trains a rescaler for any factor, but the model is "
                f"{type(model).__name__}. Give model=iarn, or another objective=..."
            )
        return ArbitraryRescalingTraining(model, self, seed)


class ArbitraryRescalingTraining(UpscalerTraining):
    """An IARN and its losses, which are sums over a picture in [0, 1].

    Args:
        model: the network; always computed in float32.
        recipe: settings.
        seed: of the run.
    """

    reduction = "the network, 8 bits"

    def __init__(self, model: IARN, recipe: ArbitraryRescaling, seed: int) -> None:
        super().__init__(model, recipe, seed)
        self.recipe = recipe

    def small_size(self, large: tuple[int, int], step: int) -> tuple[int, int]:
        """Return the size of a step's small pictures, the same on all processes."""
        recipe = self.recipe
        down, right, apart = keyed.uniform(keyed.key(self.seed, step, Purpose.HEAD), (3,)).tolist()
        if apart >= recipe.asymmetric:
            right = down
        span = recipe.largest_scale - recipe.least_scale
        height, width = (
            max(1, round(side / (recipe.least_scale + span * part)))
            for side, part in zip(large, (down, right), strict=True)
        )
        return height, width

    def losses(self, batch: PictureBatch, rng: StepRandom) -> GroupLosses:
        """Return the losses of one batch; see :meth:`Trainable.losses`."""
        model: IARN = self.model
        x = self.patches(batch, rng) / 2 + 0.5
        large = (x.shape[2], x.shape[3])
        size = self.small_size(large, batch.step)
        with no_autocast(x.device):
            small = model.downscale(x, size)
            rebuilt = model.enlarge(quantise(small), large)
            reference = quantise(resized(x, size))
            ratio = large[0] * large[1] / (size[0] * size[1])
            weight = self.recipe.fit_weight
            loss = rescaling_loss(
                small=small,
                reference=reference,
                rebuilt=rebuilt,
                original=x,
                fit_weight=ratio if weight is None else weight,
                reconstruction_weight=self.recipe.reconstruction_weight,
            )
        terms = {
            "loss_fit": loss.fit.detach(),
            "loss_reconstruction": loss.reconstruction.detach(),
            "psnr": psnr(4 * (rebuilt - x).square().mean().detach()),
            "psnr_small": psnr(4 * (small - reference).square().mean().detach()),
        }
        return GroupLosses({MODEL: loss.total}, terms)

    def enlarge(self, network: Any, images: Tensor, scale: int) -> Tensor:
        """Return pictures rescaled there and back, through 8 bits; see UpscalerTraining."""
        size = (images.shape[2] // scale, images.shape[3] // scale)
        small = quantise(network.downscale(images.float() / 2 + 0.5, size))
        large: Tensor = network.enlarge(small, (images.shape[2], images.shape[3]))
        return large.clamp(0.0, 1.0) * 2 - 1
