"""Samples with fixed seeds during training: the same noise and labels at every look."""

from __future__ import annotations

import time

import lightning.pytorch as pl

from genscale.io.video import save_overview
from genscale.pipeline import GenerationPipeline
from genscale.runs import RunFolder
from genscale.training.callbacks.base import StepCallback, due
from genscale.training.callbacks.log import TrainLog
from genscale.training.parallel import whole
from genscale.training.step_module import StepModule


class SampleGrid(StepCallback):
    """Writes ``samples/step-*.png`` from the averaged weights, on the first process.

    Of clips that is a contact sheet, and ``samples/step-*.webp`` plays.

    Args:
        pipeline: shares the module's average, so it always samples the current one.
        run: the run folder.
        every: optimizer steps between grids; 0 turns them off.
        count: pictures a grid.
        seed: seed of the set.
        log: whose clock leaves out the time spent here.
    """

    def __init__(
        self,
        pipeline: GenerationPipeline,
        run: RunFolder,
        *,
        every: int,
        count: int,
        seed: int,
        log: TrainLog,
    ) -> None:
        self.pipeline = pipeline
        self.run = run
        self.every = every
        self.count = count
        self.seed = seed
        self.train_log = log

    def on_step(self, trainer: pl.Trainer, module: StepModule) -> None:
        """Write a grid when due."""
        if not due(module.step, self.every, trainer.max_steps):
            return
        started = time.perf_counter()
        # where averages are sharded, all processes hold them whole for the first one
        with whole(module.averages().values()):
            if trainer.is_global_zero:
                self._write(module.step)
            trainer.strategy.barrier("samples")
        self.train_log.exclude(time.perf_counter() - started)

    def _write(self, step: int) -> None:
        classes = self.pipeline.num_classes
        captions = None
        if self.pipeline.text is not None:
            known = self.pipeline.example_captions
            classes, captions = len(known), [known[i % len(known)] for i in range(self.count)]
        columns = classes if 2 <= classes <= 16 else None
        images = self.pipeline.generate(num_samples=self.count, seed=self.seed)
        path = self.run.samples_dir / f"step-{step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_overview(
            images,
            path,
            frame_rate=self.pipeline.frame_rate,
            columns=columns,
            captions=captions,
            caption_lines=4,
        )
