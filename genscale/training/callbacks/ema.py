"""Updates the weight averages; stands first, so that whatever saves or samples sees it fresh."""

from __future__ import annotations

import lightning.pytorch as pl

from genscale.training.callbacks.base import StepCallback
from genscale.training.step_module import StepModule


class UpdateEMA(StepCallback):
    """Moves the averages towards ``module.model`` after every optimizer step."""

    def on_step(self, trainer: pl.Trainer, module: StepModule) -> None:
        """Update the averages."""
        module.update_averages()
