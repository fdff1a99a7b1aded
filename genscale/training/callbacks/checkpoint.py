"""Writes checkpoints: complete files only, newest few kept."""

from __future__ import annotations

import os
import time
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from genscale.runs import RunFolder
from genscale.training.callbacks.base import StepCallback, due
from genscale.training.callbacks.log import TrainLog
from genscale.training.step_module import StepModule


class RunCheckpoint(StepCallback, Checkpoint):
    """Saves every ``every`` steps, at the last step, and when the run is asked to stop.

    A checkpoint is written under a temporary name, flushed to disk and renamed, so a file named
    ``step-*.ckpt`` is always whole. Lightning moves subclasses of its ``Checkpoint`` behind all
    other callbacks: what is saved is what the average and the counters are after this step.

    Args:
        run: the run folder.
        every: optimizer steps between checkpoints; 0 saves the end only.
        keep: newest checkpoints kept.
        keep_every: checkpoints at multiples of this step are never removed; 0 for none.
        log: whose clock leaves out the time spent here.
    """

    def __init__(
        self, run: RunFolder, *, every: int, keep: int, keep_every: int, log: TrainLog
    ) -> None:
        self.run = run
        self.every = every
        self.keep = max(keep, 1)
        self.keep_every = keep_every
        self.train_log = log

    def on_step(self, trainer: pl.Trainer, module: StepModule) -> None:
        """Save when due."""
        last = module.step >= trainer.max_steps or trainer.should_stop
        if last or due(module.step, self.every, trainer.max_steps):
            started = time.perf_counter()
            self.save(trainer, module.step)
            self.train_log.exclude(time.perf_counter() - started)

    def save(self, trainer: pl.Trainer, step: int) -> Path:
        """Write the checkpoint of ``step`` on all processes together."""
        folder = self.run.checkpoints_dir
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step-{step:08d}.ckpt"
        temporary = folder / f".{path.name}.tmp"
        trainer.save_checkpoint(temporary, weights_only=False)  # optimizer state too
        if trainer.is_global_zero:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            self.train_log.run_log.write_csv()
            self._remove_old()
        trainer.strategy.barrier("checkpoint")
        return path

    def _remove_old(self) -> None:
        known = list(self.run.checkpoints().items())
        for step, path in known[: -self.keep]:
            if not (self.keep_every and step % self.keep_every == 0):
                path.unlink()
