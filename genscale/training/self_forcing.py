"""Self-forcing as a training of two networks: the generator, and the critic of its videos."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch

from genscale.backbones.base import Backbone
from genscale.conditioning.base import Conditioning
from genscale.objectives.base import Batch
from genscale.objectives.self_forcing import SelfForcing
from genscale.rng import StepRandom
from genscale.training.trainable import MODEL, GroupLosses, PictureBatch, Trainable

CRITIC = "critic"


class SelfForcingTraining(Trainable):
    """A few-step generator and a critic, one optimizer each (arXiv:2506.08009).

    The critic learns in every step, the generator in one of ``objective.critic_steps``. Videos are
    made without conditions, of the shape of the batch's clips; what these show is not read.

    Args:
        model: the generator, block-causal.
        teacher: a network trained on the data, by diffusion or teacher forcing; it is frozen. The
            critic starts as a copy of it.
        objective: settings, and the losses.
        seed: of the run.
    """

    def __init__(
        self, model: Backbone, *, teacher: Backbone, objective: SelfForcing, seed: int
    ) -> None:
        super().__init__(model)
        self.critic: Backbone = copy.deepcopy(teacher).requires_grad_(True).train()
        # held in a tuple: not a submodule, so that its weights stay out of checkpoints
        self._judge = (teacher.requires_grad_(False).eval(),)
        self.objective = objective
        self.seed = seed

    def groups(self) -> dict[str, torch.nn.Module]:
        """Return generator and critic."""
        return {MODEL: self.model, CRITIC: self.critic}

    def losses(self, batch: PictureBatch, rng: StepRandom) -> GroupLosses:
        """Return the critic's loss, and the generator's where it is its turn."""
        objective, judge = self.objective, cast(Any, self._judge[0])
        teacher: Backbone = judge.to(batch.images.device)
        clips = Batch(batch.images, Conditioning(), batch.position)
        stop = objective.stop_step(self.seed, batch.step)
        judged = objective.critic_loss(self.model, self.critic, clips, rng, stop=stop)
        found = {CRITIC: judged.loss}
        if batch.step % objective.critic_steps == 0:
            made = objective.generator_loss(self.model, teacher, self.critic, clips, rng, stop=stop)
            found = {MODEL: made.loss, **found}
        return GroupLosses(found, {f"loss_{name}": loss.detach() for name, loss in found.items()})
