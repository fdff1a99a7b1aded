"""Training of KL autoencoders, the first stage of latent diffusion (arXiv:2112.10752)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from genscale.autoencoders.base import LOG_VARIANCE
from genscale.autoencoders.kl_network import KLNetwork
from genscale.errors import ConfigError
from genscale.rng import Purpose, StepRandom
from genscale.training.reconstruction import ReconstructionLoss, ReconstructionRecipe
from genscale.training.trainable import MODEL, GroupLosses, PictureBatch, Trainable


@dataclass(frozen=True, slots=True, kw_only=True)
class KLReconstruction(ReconstructionRecipe):
    """Reconstruction from a draw of the posterior, which is held near a standard normal.

    Args:
        kl_weight: of the divergence from the standard normal: nats a picture, divided by the
            numbers in a picture, as the pixel loss is a mean over them.

    Raises:
        ConfigError: a value out of range.
    """

    kl_weight: float = 1e-6

    def __post_init__(self) -> None:
        ReconstructionRecipe.__post_init__(self)
        if self.kl_weight < 0:
            raise ConfigError(
                f"objective.kl_weight must be 0 or more, but {self.kl_weight} was given."
            )

    def build(self, model: nn.Module, *, seed: int) -> KLTraining:
        """Return the training of a KL autoencoder; see :meth:`TrainableRecipe.build`."""
        if not isinstance(model, KLNetwork):
            raise ConfigError(
                "objective=reconstruction_kl trains a KL autoencoder, but the model is "
                f"{type(model).__name__}. Give model=kl_small, or another objective=..."
            )
        return KLTraining(model, self)


class KLTraining(Trainable):
    """A KL autoencoder and its losses.

    Args:
        model: the autoencoder.
        recipe: settings.
    """

    def __init__(self, model: KLNetwork, recipe: KLReconstruction) -> None:
        super().__init__(model)
        self.recipe = recipe
        self.reconstruction = ReconstructionLoss(recipe, model.image_channels or 3)

    def groups(self) -> dict[str, nn.Module]:
        """Return the autoencoder and, where it has a rival, the discriminator."""
        return {MODEL: self.model, **self.reconstruction.groups()}

    def losses(self, batch: PictureBatch, rng: StepRandom) -> GroupLosses:
        """Return the losses of one batch; see :meth:`Trainable.losses`."""
        model: KLNetwork = self.model
        mean, log_variance = model.moments(batch.images).float().chunk(2, dim=1)
        log_variance = log_variance.clamp(*LOG_VARIANCE)
        noise = rng.normal(Purpose.POSTERIOR, tuple(mean.shape[1:]))
        latents = mean + torch.exp(0.5 * log_variance) * noise
        reconstructed = model.decode(latents).float()
        out = self.reconstruction(batch.images, reconstructed, batch.step, model.last_layer)
        divergence = kl_from_normal(mean, log_variance) / batch.images[0].numel()
        loss = out.by_group[MODEL] + self.recipe.kl_weight * divergence
        terms = {**out.terms, "loss_kl": divergence.detach()}
        return GroupLosses({**out.by_group, MODEL: loss}, terms)

    def finish(self, network: nn.Module, images: Tensor) -> None:
        """Measure the scale and shift of the latents; see :meth:`Trainable.finish`."""
        assert isinstance(network, KLNetwork)
        network.standardise(images)


def kl_from_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return the divergence of N(mean, variance) from N(0, 1): nats a picture, batch mean."""
    terms = mean.square() + log_variance.exp() - 1.0 - log_variance
    return 0.5 * terms.flatten(1).sum(1).mean()
