"""Callbacks that act once an optimizer step, whatever the gradient accumulation."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from genscale.training.step_module import StepModule


class StepCallback(pl.Callback):
    """Calls :meth:`on_step` after every optimizer step."""

    _seen = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note where the run starts."""
        self._seen = _own(pl_module).step

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Pass on batches that ended an optimizer step."""
        module = _own(pl_module)
        if module.step != self._seen:
            self._seen = module.step
            self.on_step(trainer, module)

    def on_step(self, trainer: pl.Trainer, module: StepModule) -> None:
        """Act on the finished optimizer step ``module.step`` (counted from 1)."""


def _own(module: pl.LightningModule) -> StepModule:
    if not isinstance(module, StepModule):
        raise TypeError(f"A StepModule was expected, but {type(module).__name__} was given.")
    return module


def due(step: int, every: int, last: int) -> bool:
    """Return whether a thing done ``every`` so many steps is due; 0 turns it off."""
    return every > 0 and (step % every == 0 or step == last)
