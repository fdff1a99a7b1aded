"""Counts steps skipped for a non-finite gradient, and stops when they follow one another."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor

from genscale.errors import GenscaleError
from genscale.training.callbacks.base import StepCallback, due
from genscale.training.parallel import gradient_norm
from genscale.training.step_module import StepModule


class FiniteGuard(StepCallback):
    """Skipped steps are counted on the device; every ``every`` steps the counts are looked at.

    The skip itself happens inside the fused optimizer, on all processes alike.

    Args:
        max_in_row: stop after so many skipped steps in a row.
        every: optimizer steps between looks.
    """

    def __init__(self, *, max_in_row: int, every: int) -> None:
        self.max_in_row = max_in_row
        self.every = max(every, 1)
        # tensors on the device once training runs
        self._skipped: Tensor | int = 0  # in all, earlier parts of a resumed run included
        self._in_row: Tensor | int = 0
        self._worst = torch.zeros((), dtype=torch.int64)  # longest row since the last look

    def state_dict(self) -> dict[str, int]:
        """Keep the counts: an interrupted run stops and reports as one left alone."""
        return {"skipped": int(self._skipped), "in_row": int(self._in_row)}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue counting."""
        self._skipped, self._in_row = state_dict["skipped"], state_dict["in_row"]

    def on_step(self, trainer: pl.Trainer, module: StepModule) -> None:
        """Count, and raise when ``max_in_row`` steps in a row were skipped."""
        if module.gradient_norm is None:
            return
        bad = (~torch.isfinite(module.gradient_norm)).long()
        self._skipped = self._skipped + bad
        self._in_row = (self._in_row + 1) * bad
        self._worst = torch.maximum(self._worst.to(bad.device), self._in_row)
        module.counts["skipped_steps"] = self._skipped
        if due(module.step, min(self.every, self.max_in_row), trainer.max_steps):
            if int(self._worst) >= self.max_in_row:
                raise GenscaleError(self._message(module))
            self._worst = self._in_row

    def _message(self, module: StepModule) -> str:
        first = (module.step - 1) * module.batch_size
        last = first + module.batch_size - 1
        norms = {
            name: float(gradient_norm(child.parameters()))  # all processes are here
            for name, child in module.model.named_children()
            if any(p.grad is not None for p in child.parameters())
        }
        listed = ", ".join(f"{name} {norm:.3g}" for name, norm in norms.items())
        return (
            f"{self.max_in_row} optimizer steps in a row had a non-finite gradient, the last at "
            f"step {module.step} (stream positions {first} to {last}; gradient norms by block: "
            f"{listed}). Lower optim.lr, or look at these samples."
        )
