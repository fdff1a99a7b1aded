"""Stores snapshots of averages during training, from which others are made afterwards."""

from __future__ import annotations

import time

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint

from genscale.runs import RunFolder
from genscale.training.callbacks.base import StepCallback, due
from genscale.training.callbacks.log import TrainLog
from genscale.training.ema import PosthocEMA
from genscale.training.posthoc import Profile, drop_later, save_snapshot
from genscale.training.step_module import StepModule


class EMASnapshots(StepCallback, Checkpoint):
    """Writes ``ema_snapshots/ema_<width>_step-<step>.safetensors`` when due and at the last step.

    Snapshots past the step a run resumes from are removed: it makes them again. Must stand before
    what writes checkpoints, so that no checkpoint is ahead of the snapshots.

    Args:
        run: the run folder.
        law: which profiles, how often, in which type.
        log: whose clock leaves out the time spent here.
    """

    def __init__(self, run: RunFolder, law: PosthocEMA, *, log: TrainLog) -> None:
        self.run = run
        self.law = law
        self.train_log = log

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove what a resumed run will write again."""
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero:
            drop_later(self.run.ema_snapshots_dir, self._seen)
        trainer.strategy.barrier("snapshots")

    def on_step(self, trainer: pl.Trainer, module: StepModule) -> None:
        """Write snapshots when due."""
        if not due(module.step, self.law.snapshot_every, trainer.max_steps):
            return
        started = time.perf_counter()
        dtype = torch.float16 if self.law.snapshot_dtype == "float16" else torch.float32
        averages = module.averages().values()
        for profile, average in zip(self.law.profiles(), averages, strict=True):
            save_snapshot(
                average,
                Profile(module.step, profile.sigma_rel),
                self.run.ema_snapshots_dir,
                dtype=dtype,
                write=trainer.is_global_zero,
            )
        trainer.strategy.barrier("snapshots")
        self.train_log.exclude(time.perf_counter() - started)
