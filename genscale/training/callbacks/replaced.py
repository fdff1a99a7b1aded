"""Counts the samples whose file was damaged and whose place another took."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from genscale import dist
from genscale.training.step_module import StepModule


class ReplacedSamples(pl.Callback):
    """Adds ``replaced_samples`` to the counts of runs whose data replace damaged files.

    It is the number over all processes and earlier parts of a resumed run, kept on the device.
    """

    def __init__(self) -> None:
        self._before = 0  # of earlier parts, over all processes
        self._own: Tensor | None = None  # of this part and process

    def state_dict(self) -> dict[str, int]:
        """Keep the count; all processes are here."""
        own = 0 if self._own is None else int(self._own)
        return {"replaced": self._before + sum(dist.gather_objects(own))}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue counting."""
        self._before = state_dict["replaced"]

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count a micro-batch."""
        replaced = batch.get("replaced") if isinstance(batch, dict) else None
        if replaced is None or not isinstance(pl_module, StepModule):
            return
        found = replaced.sum()
        self._own = found if self._own is None else self._own + found
        # the log takes the mean over processes
        total = self._before + self._own * trainer.world_size
        pl_module.counts["replaced_samples"] = torch.as_tensor(total)
