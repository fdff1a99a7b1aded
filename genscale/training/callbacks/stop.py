"""SIGTERM, SIGUSR1 and Ctrl-C end a run after the current step, with a checkpoint."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch

from genscale.training.callbacks.base import StepCallback
from genscale.training.step_module import StepModule


class GracefulStop(StepCallback):
    """Turns the first SIGTERM or SIGINT into a stop at the end of the step; a second one kills.

    SIGUSR1, which SLURM sends before a job's time is over, stops too, however often it comes.
    Processes agree on stopping every ``every`` steps, so that all save the same step.

    Args:
        every: steps between agreements where there are several processes.
    """

    def __init__(self, *, every: int) -> None:
        self.every = max(every, 1)
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over the signals."""
        super().on_train_start(trainer, pl_module)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = number
        elif number != signal.SIGUSR1:
            raise KeyboardInterrupt

    def on_step(self, trainer: pl.Trainer, module: StepModule) -> None:
        """Ask the trainer to stop when a signal came, on any process."""
        wanted = self.received
        if trainer.world_size > 1:
            if module.step % self.every:
                return
            flag = torch.tensor(wanted or 0, device=module.device)
            wanted = int(trainer.strategy.reduce(flag, reduce_op="max")) or None
        if wanted is not None:
            self.received = wanted
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the signals back before Lightning does: what it gives back was there before us."""
        self._give_back()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Give the signals back."""
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
