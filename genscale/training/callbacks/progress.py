"""A live progress bar with loss, rate and time left; plain lines where there is no terminal."""

from __future__ import annotations

import sys
import time

import lightning.pytorch as pl
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from genscale.training.callbacks.base import StepCallback, due
from genscale.training.callbacks.log import TrainLog
from genscale.training.step_module import StepModule


class TrainProgress(StepCallback):
    """Shows step, loss, samples a second and time left on the first process.

    It reads the last row of the log and never asks the device for a number.

    Args:
        log: where loss and rate come from.
        every_seconds: pause between lines where standard error is no terminal.
    """

    def __init__(self, log: TrainLog, *, every_seconds: float = 10.0) -> None:
        self.train_log = log
        self.every_seconds = every_seconds
        self._bar: Progress | None = None
        self._last_line = 0.0
        self._started = 0.0
        self._first_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar at the step the run (re)starts from."""
        super().on_train_start(trainer, pl_module)
        self._first_step = self._seen
        self._started = self._last_line = time.perf_counter()
        if not trainer.is_global_zero or not sys.stderr.isatty():
            return
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=False,
        )
        self._task = self._bar.add_task(
            "training", total=trainer.max_steps, completed=self._seen, loss="-", rate=""
        )
        self._bar.start()

    def on_step(self, trainer: pl.Trainer, module: StepModule) -> None:
        """Move the bar, or print a line when it is time."""
        if not trainer.is_global_zero:
            return
        row = self.train_log.latest
        loss = f"{row['train/loss']:.4f}" if "train/loss" in row else "-"
        rate = (
            f"{row['train/samples_per_second']:.0f} samples/s"
            if "train/samples_per_second" in row
            else ""
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=module.step, loss=loss, rate=rate)
            return
        now = time.perf_counter()
        last = due(module.step, trainer.max_steps, trainer.max_steps)
        if now - self._last_line >= self.every_seconds or last:
            self._last_line = now
            done = max(module.step - self._first_step, 1)
            left = (trainer.max_steps - module.step) * (now - self._started) / done
            sys.stderr.write(
                f"step {module.step}/{trainer.max_steps}  loss {loss}  {rate}  "
                f"{left / 60:.1f} min left\n"
            )
            sys.stderr.flush()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
