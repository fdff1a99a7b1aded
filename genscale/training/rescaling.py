"""Training of invertible rescalers: the small picture is learned, too (arXiv:2005.05650)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from genscale.autoencoders.base import Autoencoder
from genscale.errors import ConfigError
from genscale.layers.norm import no_autocast
from genscale.rng import Purpose, StepRandom
from genscale.training.reconstruction import psnr
from genscale.training.trainable import MODEL, GroupLosses, PictureBatch
from genscale.training.upscaling import UpscalerRecipe, UpscalerTraining, reduced
from genscale.upscaling.irn import IRN
from genscale.upscaling.rescaling_losses import quantise, rescaling_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescaling(UpscalerRecipe):
    """IRN's loss: small pictures that look right, survive 8 bits, and can be made large again.

    Args:
        fit_weight: of the squared distance from the bicubically reduced picture; None for the
            square of the scale, as published.
        reconstruction_weight: of the distance of the picture made again.
        latent_weight: of what is lost having the law of standard normal numbers.
        extra_weight: of a second latent being zero again, where the model has
            ``extra_latent_channels``.

    Raises:
        ConfigError: a value out of range.
    """

    fit_weight: float | None = None
    reconstruction_weight: float = 1.0
    latent_weight: float = 1.0
    extra_weight: float = 1.0

    def __post_init__(self) -> None:
        UpscalerRecipe.__post_init__(self)
        for name in ("fit_weight", "reconstruction_weight", "latent_weight", "extra_weight"):
            if (getattr(self, name) or 0.0) < 0:
                raise ConfigError(
                    f"objective.{name} must be 0 or more, but {getattr(self, name)} was given."
                )

    def build(
        self, model: nn.Module, *, seed: int, autoencoder: Autoencoder | None = None
    ) -> RescalingTraining:
        """Return the training of an IRN; see :meth:`UpscalerRecipe.build`."""
        if not isinstance(model, IRN):
            raise ConfigError(
                "objective=rescaling trains an invertible rescaler, but the model is "
                f"{type(model).__name__}. Give model=irn, or another objective=..."
            )
        if model.small_channels != model.image_channels:
            raise ConfigError(
                "objective=rescaling compares small pictures with reduced ones, but model."
                f"small_channels={model.small_channels} and channels={model.image_channels} "
                "differ. Leave model.small_channels out."
            )
        return RescalingTraining(model, self, seed)


class RescalingTraining(UpscalerTraining):
    """An IRN and its losses, which are sums over a picture in [0, 1].

    Args:
        model: the network; always computed in float32.
        recipe: settings.
        seed: of the run.
    """

    reduction = "the network, 8 bits"

    def __init__(self, model: IRN, recipe: Rescaling, seed: int) -> None:
        super().__init__(model, recipe, seed)
        self.recipe = recipe

    def losses(self, batch: PictureBatch, rng: StepRandom) -> GroupLosses:
        """Return the losses of one batch; see :meth:`Trainable.losses`."""
        model: IRN = self.model
        images = self.patches(batch, rng)
        x = images / 2 + 0.5
        with no_autocast(x.device):
            small, lost = model.downscale(x)
            kept = quantise(small)
            drawn = rng.normal(Purpose.LOST, model.latent_shape(kept))
            rebuilt, extra = model.invert(kept, drawn.to(kept.device))
            reference = reduced(images, model.scale) / 2 + 0.5
            loss = rescaling_loss(
                small=small,
                reference=reference,
                rebuilt=rebuilt,
                original=x,
                latent=lost,
                scale=model.scale,
                extra=extra,
                fit_weight=self.recipe.fit_weight,
                reconstruction_weight=self.recipe.reconstruction_weight,
                latent_weight=self.recipe.latent_weight,
                extra_weight=self.recipe.extra_weight,
            )
        terms = {
            "loss_fit": loss.fit.detach(),
            "loss_reconstruction": loss.reconstruction.detach(),
            "loss_latent": loss.latent.detach(),
            "loss_extra": loss.extra.detach(),
            "psnr": psnr(4 * (rebuilt - x).square().mean().detach()),
            "psnr_small": psnr(4 * (small - reference).square().mean().detach()),
        }
        return GroupLosses({MODEL: loss.total}, terms)

    def shrink(self, network: Any, images: Tensor, scale: int) -> Tensor:
        """Return the network's own small pictures; see :meth:`UpscalerTraining.shrink`."""
        return quantise(network.downscale(images.float() / 2 + 0.5)[0]) * 2 - 1

    def enlarge(self, network: Any, images: Tensor, scale: int) -> Tensor:
        """Return pictures rescaled there and back, with z = 0; see :class:`UpscalerTraining`."""
        large: Tensor = network(self.shrink(network, images, scale) / 2 + 0.5, scale)
        return large.clamp(0.0, 1.0) * 2 - 1
