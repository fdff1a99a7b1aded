"""Updates the weight average; stands first, so that whatever saves or samples sees it fresh."""

from __future__ import annotations

import lightning.pytorch as pl

from genscale.training.callbacks.base import StepCallback
from genscale.training.module import GenerativeModule


class UpdateEMA(StepCallback):
    """Moves ``module.ema`` towards ``module.model`` after every optimizer step."""

    def on_step(self, trainer: pl.Trainer, module: GenerativeModule) -> None:
        """Update the average."""
        module.ema_law.update(module.ema, module.model, module.step)
