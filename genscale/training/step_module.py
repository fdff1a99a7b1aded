"""What every training run has: a network, its frozen averages, and counts of steps and samples."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from genscale import rng
from genscale.rng import Purpose
from genscale.run_weights import key_of
from genscale.training.ema import EMA
from genscale.training.lr_schedule import Schedule
from genscale.training.optim import OptimizerFactory


class StepModule(pl.LightningModule):
    """A network and its frozen averages, trained by optimizer steps that are counted here.

    Progress is counted in optimizer steps and samples seen. All randomness is keyed by the run's
    seed and each sample's global stream position, so neither the number of processes nor an
    interruption changes the training run.

    Args:
        model: the network that is trained, averaged and exported.
        optimizer: factory of the optimizer.
        lr_schedule: factor of the learning rate by step.
        ema: law of the weight average, or of several.
        batch_size: samples of one optimizer step over all processes.
        seed: seed of everything random.

    Attributes:
        step: optimizer steps taken, skipped ones included.
        flops: forward operations of one sample by module; the total under ``""``.
        terms: of the last batch: detached, on the device.
        counts: running totals beside the terms.
        gradient_norm: of the last step, before clipping.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: OptimizerFactory,
        lr_schedule: Schedule,
        ema: EMA,
        batch_size: int,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.ema: Any = copy.deepcopy(model).requires_grad_(False).eval()
        self.further_averages = nn.ModuleDict(
            {key_of(law.name): copy.deepcopy(self.ema) for law in ema.laws()[1:]}
        )
        self.optimizer_factory = optimizer
        self.lr_schedule = lr_schedule
        self.ema_law = ema
        self.batch_size = batch_size
        self.seed = seed
        self.flops: dict[str, int] = {"": 0}
        self.step = 0
        self.terms: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.gradient_norm: Tensor | None = None

    @property
    def samples_seen(self) -> int:
        """Training samples consumed so far, over all processes."""
        return self.step * self.batch_size

    def count_step(self) -> None:
        """Count a finished optimizer step; callbacks of its last batch see the new count."""
        self.step += 1
        self.trainer.datamodule.samples_seen = self.samples_seen  # type: ignore[attr-defined]

    def averages(self) -> dict[str, Any]:
        """Return all averaged networks by public name: ``ema``, then e.g. ``ema_0.9999``."""
        further = [law.name for law in self.ema_law.laws()[1:]]
        networks = {name: self.further_averages[key_of(name)] for name in further}
        return {"ema": self.ema, **networks}

    def update_averages(self) -> None:
        """Move every average towards the model, after optimizer step ``step``."""
        for law, average in zip(self.ema_law.laws(), self.averages().values(), strict=True):
            law.update(average, self.model, self.step)

    def train(self, mode: bool = True) -> StepModule:
        """Switch modes; averages always stay in eval mode."""
        super().train(mode)
        self.ema.eval()
        self.further_averages.eval()
        return self

    def on_train_start(self) -> None:
        """Enter training mode whatever mode the model was built in."""
        self.train()

    def seed_network(self, micro_step: int) -> None:
        """Seed torch's own generator by step: drop-out inside a network is then resumable too."""
        seed = rng.key(self.seed, self.step, micro_step, self.global_rank, Purpose.NETWORK)
        torch.manual_seed(int(seed) & 0x7FFFFFFFFFFFFFFF)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store progress and the seed beside the weights."""
        checkpoint["genscale"] = {
            "step": self.step,
            "samples_seen": self.samples_seen,
            "seed": self.seed,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue counting where the checkpoint stopped."""
        self.step = int(checkpoint["genscale"]["step"])
