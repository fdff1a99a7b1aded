"""Training of multi-scale tokenizers (arXiv:2404.02905, sec. 3.2; the program was not released)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.autoencoders.msvq import MSVQ
from genscale.autoencoders.quantizer import QuantizeOutput
from genscale.errors import ConfigError
from genscale.layers.scales import features_at
from genscale.rng import StepRandom
from genscale.training.codebook import CodebookKeeper, CodebookSettings
from genscale.training.reconstruction import ReconstructionLoss, ReconstructionRecipe
from genscale.training.trainable import MODEL, GroupLosses, PictureBatch, Trainable, all_mean


@dataclass(frozen=True, slots=True, kw_only=True)
class VQReconstruction(ReconstructionRecipe):
    """Reconstruction through a codebook: the shared losses, and the quantiser's own.

    The first ``warmup_steps`` train encoder and decoder without a quantiser. Then the codes start
    at the centres of what the scales see, and keep from dying.

    Args:
        vq_weight: of beta mse(sg(f_hat), f) + mse(f_hat, sg(f)), averaged over the scales.
        warmup_steps: optimizer steps without quantiser; 0 starts with the codes as drawn.
        codebook: how codes are learned; see :class:`~genscale.training.codebook.CodebookSettings`.
        size_weight: of the squared logarithm of the latents' root mean square. Nothing else says
            how large latents are; held near 1, the other weights mean the same for any data.
        entropy_weight: of log V minus the entropy of the mean soft choice of codes, averaged over
            the scales; 0 leaves it out.
        entropy_temperature: of the soft choice, in units of the mean squared distance to a code.

    Raises:
        ConfigError: a value out of range.
    """

    vq_weight: float = 1.0
    warmup_steps: int = 60
    codebook: CodebookSettings = field(default_factory=CodebookSettings)
    size_weight: float = 0.1
    entropy_weight: float = 0.0
    entropy_temperature: float = 0.1

    def __post_init__(self) -> None:
        ReconstructionRecipe.__post_init__(self)
        for name in ("vq_weight", "warmup_steps", "size_weight", "entropy_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"objective.{name} must be 0 or more, but {getattr(self, name)} was given."
                )
        if not self.entropy_temperature > 0:
            raise ConfigError(
                "objective.entropy_temperature must be positive, but "
                f"{self.entropy_temperature} was given. Give e.g. 0.1."
            )

    def build(self, model: nn.Module, *, seed: int) -> TokenizerTraining:
        """Return the training of a tokenizer; see :meth:`TrainableRecipe.build`."""
        if not isinstance(model, MSVQ):
            raise ConfigError(
                f"objective=reconstruction trains a multi-scale tokenizer, but the model is "
                f"{type(model).__name__}. Give model=msvq, or another objective=..."
            )
        return TokenizerTraining(model, self, seed=seed)


class TokenizerTraining(Trainable):
    """A tokenizer, the keeper of its codes, and its losses.

    Args:
        model: the tokenizer.
        recipe: settings.
        seed: of everything drawn here.
    """

    def __init__(self, model: MSVQ, recipe: VQReconstruction, *, seed: int) -> None:
        super().__init__(model)
        self.recipe = recipe
        self.reconstruction = ReconstructionLoss(recipe, model.image_channels or 3)
        self.keeper = CodebookKeeper(model.quantizer, recipe.codebook, seed=seed)
        self._size = 0  # pictures of a step, told by the batches
        if recipe.codebook.learned_by == "average":
            model.quantizer.embedding.requires_grad_(False)

    def groups(self) -> dict[str, nn.Module]:
        """Return the tokenizer and, where it has a rival, the discriminator."""
        return {MODEL: self.model, **self.reconstruction.groups()}

    def losses(self, batch: PictureBatch, rng: StepRandom) -> GroupLosses:
        """Return the losses of one batch; see :meth:`Trainable.losses`."""
        model: MSVQ = self.model
        self._size = batch.size
        features = model.encode_features(batch.images)
        quantized: QuantizeOutput | None = None
        if batch.step >= self.recipe.warmup_steps:
            quantized = model.quantize(features)
            self.keeper.observe(quantized, batch)
        elif self._starts_after(batch.step):
            self.keeper.collect(features, batch.position)
        latents = features if quantized is None else quantized.latent
        reconstructed = model.decode(latents).float()
        out: GroupLosses = self.reconstruction(
            batch.images, reconstructed, batch.step, model.decoder.conv_out.weight
        )
        deviation, size = size_deviation(features)
        terms: dict[str, Any] = {**out.terms, "latent_size": size}
        loss = out.by_group[MODEL] + self.recipe.size_weight * deviation
        if quantized is None:
            return GroupLosses({**out.by_group, MODEL: loss}, terms)
        vq = quantized.losses.mean()
        terms["loss_vq"] = vq.detach()
        loss = loss + self.recipe.vq_weight * vq
        if self.recipe.entropy_weight > 0:
            missing = self._missing_entropy(features, quantized)
            loss = loss + self.recipe.entropy_weight * missing
            terms["missing_entropy"] = missing.detach()
        return GroupLosses({**out.by_group, MODEL: loss}, terms)

    def _starts_after(self, step: int) -> bool:
        """Return whether the codes start at the end of this step."""
        wanted = self.recipe.codebook.kmeans_iterations > 0
        return wanted and step == self.recipe.warmup_steps - 1

    def _missing_entropy(self, features: Tensor, quantized: QuantizeOutput) -> Tensor:
        """Return log V minus the entropy of the mean soft choice, averaged over the scales.

        Rows carry the gradient of the features as each scale sees them; nothing flows through what
        the scales before have taken away.
        """
        table = self.model.quantizer.embedding.weight
        missing = []
        for size, rows in zip(self.model.scales, quantized.residuals, strict=True):
            seen = features_at(features, size).flatten(0, 1)
            distances = torch.cdist(rows + (seen - seen.detach()), table).square()
            spread = self.recipe.entropy_temperature * distances.detach().mean()
            mean = F.softmax(-distances / spread.clamp(min=1e-12), dim=1).mean(0)
            missing.append(math.log(len(table)) + (mean * mean.clamp(min=1e-12).log()).sum())
        return torch.stack(missing).mean()

    def end_step(self, step: int, finite: Tensor) -> None:
        """Update the codes; see :meth:`Trainable.end_step`."""
        if self._starts_after(step):
            self.keeper.start()
        else:
            self.keeper.end_step(finite, self._size)

    def counts(self) -> dict[str, Tensor]:
        """Return the share of codes in use, scale by scale."""
        usage = self.keeper.usage(max(self._size, 1))
        names = [f"usage/{h}x{w}" for h, w in self.model.scales]
        return dict(zip(names, usage.unbind(), strict=True))


def size_deviation(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squared logarithm of the root mean square of latents, and that root.

    The mean square is that of all processes. So is the gradient, once it is averaged over them:
    the logarithm of each process's own would give another one.
    """
    own = latents.float().square().mean()
    square = all_mean(own.detach().clone())
    slope = 0.5 * square.log() / square  # of 0.25 log(square)^2
    return 0.25 * square.log().square() + slope * (own - own.detach()), square.sqrt()
