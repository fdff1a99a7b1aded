"""The evaluation suite during training, on the averaged weights."""

from __future__ import annotations

import time
from collections.abc import Callable

import lightning.pytorch as pl

from genscale.pipeline import GenerationPipeline
from genscale.training.callbacks.base import StepCallback, due
from genscale.training.callbacks.log import TrainLog
from genscale.training.parallel import whole
from genscale.training.step_module import StepModule

Evaluate = Callable[[GenerationPipeline, int, int, int], dict[str, float]]


class PeriodicMetrics(StepCallback):
    """Evaluates every ``every`` steps and writes ``eval/<metric>`` rows.

    Every process samples its share; states are merged inside ``evaluate``.

    Args:
        pipeline: shares the module's average.
        evaluate: (pipeline, number of samples, rank, world size) -> values by name.
        every: optimizer steps between evaluations; 0 turns them off.
        num_samples: samples an evaluation.
        log: where rows go, and whose clock leaves out the time spent here.
    """

    def __init__(
        self,
        pipeline: GenerationPipeline,
        evaluate: Evaluate,
        *,
        every: int,
        num_samples: int,
        log: TrainLog,
    ) -> None:
        self.pipeline = pipeline
        self.evaluate = evaluate
        self.every = every
        self.num_samples = num_samples
        self.train_log = log

    def on_step(self, trainer: pl.Trainer, module: StepModule) -> None:
        """Evaluate when due."""
        if not due(module.step, self.every, trainer.max_steps):
            return
        started = time.perf_counter()
        with whole(module.averages().values()):  # shares, and the steps they take, are unlike
            values = self.evaluate(
                self.pipeline, self.num_samples, trainer.global_rank, trainer.world_size
            )
        row = {f"eval/{name}": value for name, value in values.items()}
        if trainer.is_global_zero:
            progress = {
                "step": module.step,
                "samples_seen": module.samples_seen,
                "seconds": round(self.train_log.seconds, 3),
            }
            self.train_log.run_log.append({**progress, **row})
        for logger in trainer.loggers:
            logger.log_metrics(row, step=module.step)
        trainer.strategy.barrier("metrics")
        self.train_log.exclude(time.perf_counter() - started)
