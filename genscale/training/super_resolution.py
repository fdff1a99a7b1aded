"""Training of upscalers of pictures: SwinIR and ESPCN, from bicubically reduced pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor, nn

from genscale.autoencoders.base import Autoencoder
from genscale.errors import ConfigError, did_you_mean
from genscale.rng import StepRandom
from genscale.training.reconstruction import psnr
from genscale.training.trainable import MODEL, GroupLosses, PictureBatch
from genscale.training.upscaling import UpscalerRecipe, UpscalerTraining, reduced
from genscale.upscaling.base import Upscaler
from genscale.upscaling.iarn import IARN
from genscale.upscaling.irn import IRN
from genscale.upscaling.losses import eagle_loss, fourier_loss, l1_loss

Distance = Literal["l1", "l2", "charbonnier"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SuperResolution(UpscalerRecipe):
    """A picture is guessed from its small version; every scale of a network learns in every step.

    Args:
        loss: mean absolute error (``l1``, SwinIR), mean squared error (``l2``, ESPCN), or the
            mean of sqrt(difference^2 + eps) (``charbonnier``).
        charbonnier_eps: of that.
        fourier_weight: of the mean absolute difference of the spectra's magnitudes.
        eagle_weight: of EAGLE's texture of edges (arXiv:2403.10695).

    Raises:
        ConfigError: a value out of range.
    """

    loss: Distance = "l1"
    charbonnier_eps: float = 1e-9
    fourier_weight: float = 0.0
    eagle_weight: float = 0.0

    def __post_init__(self) -> None:
        UpscalerRecipe.__post_init__(self)
        if self.loss not in get_args(Distance):
            raise ConfigError(
                f"objective.loss must be one of {', '.join(get_args(Distance))}, but "
                f"'{self.loss}' was given.{did_you_mean(str(self.loss), get_args(Distance))}"
            )
        for name in ("charbonnier_eps", "fourier_weight", "eagle_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"objective.{name} must be 0 or more, but {getattr(self, name)} was given."
                )

    def build(
        self, model: nn.Module, *, seed: int, autoencoder: Autoencoder | None = None
    ) -> SuperResolutionTraining:
        """Return the training of an upscaler of pictures; see :meth:`UpscalerRecipe.build`."""
        name = type(model).__name__
        rescales = isinstance(model, IRN | IARN)
        if not isinstance(model, Upscaler) or model.space != "pixel" or rescales:
            raise ConfigError(
                "objective=super_resolution trains upscalers of pictures, but the model is "
                f"{name}. Give model=swinir, espcn or wdsr, or another objective=..."
            )
        if min(model.scales) < 2:
            raise ConfigError(
                f"objective=super_resolution makes pictures larger, but {name} has the scale "
                f"{min(model.scales)}. Give model.scale=2 or more, with an upsampler."
            )
        return SuperResolutionTraining(model, self, seed)


class SuperResolutionTraining(UpscalerTraining):
    """An upscaler of pictures and its losses.

    Args:
        model: the upscaler.
        recipe: settings.
        seed: of the run.
    """

    def __init__(self, model: Upscaler, recipe: SuperResolution, seed: int) -> None:
        super().__init__(model, recipe, seed)
        self.recipe = recipe

    def losses(self, batch: PictureBatch, rng: StepRandom) -> GroupLosses:
        """Return the losses of one batch; see :meth:`Trainable.losses`."""
        images = self.patches(batch, rng)
        target = images / 2 + 0.5
        total = target.new_zeros(())
        terms: dict[str, Tensor] = {}
        for scale in self.model.scales:
            made = self.model(reduced(images, scale) / 2 + 0.5, scale).float()
            squared = (made - target).square()
            total = total + self._distance(made, target, squared)
            if self.recipe.fourier_weight:
                total = total + self.recipe.fourier_weight * fourier_loss(made, target)
            if self.recipe.eagle_weight:
                total = total + self.recipe.eagle_weight * eagle_loss(made, target)
            of = f"_x{scale}" if len(self.model.scales) > 1 else ""
            terms[f"psnr{of}"] = psnr(4 * squared.detach().mean())
        return GroupLosses({MODEL: total}, terms)

    def enlarge(self, network: Any, images: Tensor, scale: int) -> Tensor:
        """Return pictures made small and enlarged; see :meth:`UpscalerTraining.enlarge`."""
        large: Tensor = network(reduced(images, scale) / 2 + 0.5, scale).float()
        return large.clamp(0.0, 1.0) * 2 - 1

    def _distance(self, made: Tensor, target: Tensor, squared: Tensor) -> Tensor:
        if self.recipe.loss == "l1":
            return l1_loss(made, target)
        if self.recipe.loss == "l2":
            return squared.mean()
        return (squared + self.recipe.charbonnier_eps).sqrt().mean()
