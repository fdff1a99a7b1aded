"""Held-out pictures above their reconstructions, and how good these are, during training."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from genscale import rng
from genscale.data.base import ImageDataset
from genscale.io.images import from_uint8, save_grid, to_uint8
from genscale.metrics.reconstruction import picture_psnr
from genscale.rng import Purpose
from genscale.runs import RunFolder
from genscale.training.autoencoder_run import reconstruct
from genscale.training.callbacks.base import StepCallback, due
from genscale.training.callbacks.log import TrainLog
from genscale.training.step_module import StepModule

_BATCH = 250


class Reconstructions(StepCallback):
    """Writes ``samples/step-*.png`` and ``eval/psnr`` from the averaged weights.

    Args:
        pictures: the held-out ones, or those of training where none are held out.
        run: the run folder.
        grid_every: optimizer steps between grids; 0 turns them off.
        grid_count: pictures and reconstructions in a grid, together.
        metrics_every: optimizer steps between measurements; 0 turns them off.
        metrics_count: pictures measured, at most.
        log: where rows go, and whose clock leaves out the time spent here.
        make: what the averaged network makes of pictures ``(n, C, H, W)`` in [-1, 1].
    """

    def __init__(
        self,
        pictures: ImageDataset,
        run: RunFolder,
        *,
        grid_every: int,
        grid_count: int,
        metrics_every: int,
        metrics_count: int,
        log: TrainLog,
        make: Callable[[Any, Tensor], Tensor] = reconstruct,
    ) -> None:
        self.make = make
        self.pictures = pictures
        self.run = run
        self.grid_every = grid_every
        self.grid_count = grid_count
        self.metrics_every = metrics_every
        self.metrics_count = metrics_count
        self.train_log = log

    def on_step(self, trainer: pl.Trainer, module: StepModule) -> None:
        """Write what is due, on the first process."""
        wants_grid = due(module.step, self.grid_every, trainer.max_steps)
        wants_metrics = due(module.step, self.metrics_every, trainer.max_steps)
        if not (wants_grid or wants_metrics):
            return
        started = time.perf_counter()
        if trainer.is_global_zero:
            if wants_grid:
                images, made = reconstructed(
                    module.ema, self.pictures, max(self.grid_count // 2, 1), self.make
                )
                path = self.run.samples_dir / f"step-{module.step:08d}.png"
                save_pairs(images, made, path)
            if wants_metrics:
                self._measure(trainer, module)
        trainer.strategy.barrier("reconstructions")
        self.train_log.exclude(time.perf_counter() - started)

    def _measure(self, trainer: pl.Trainer, module: StepModule) -> None:
        images, made = reconstructed(module.ema, self.pictures, self.metrics_count, self.make)
        row = {"eval/psnr": float(picture_psnr(images, made).mean())}
        progress = {
            "step": module.step,
            "samples_seen": module.samples_seen,
            "seconds": round(self.train_log.seconds, 3),
        }
        self.train_log.run_log.append({**progress, **row})
        for logger in trainer.loggers:
            logger.log_metrics(row, step=module.step)


def some_rows(count: int, size: int) -> Tensor:
    """Return ``count`` rows of a data set of ``size``, the same at every call, in their order."""
    order = rng.permutation(rng.key(0, Purpose.SUBSET), size)
    return order[:count].sort().values


def reconstructed(
    network: Any,
    pictures: ImageDataset,
    count: int,
    make: Callable[[Any, Tensor], Tensor] = reconstruct,
) -> tuple[Tensor, Tensor]:
    """Return ``count`` pictures and what a network makes of them: uint8 ``(n, C, H, W)`` each."""
    rows = some_rows(count, len(pictures))
    device = next(network.parameters()).device
    images, made = [], []
    for part in torch.split(rows, _BATCH):
        images.append(pictures.images(part))
        made.append(to_uint8(make(network, from_uint8(images[-1]).to(device))).cpu())
    return torch.cat(images), torch.cat(made)


def save_pairs(images: Tensor, made: Tensor, path: object) -> None:
    """Write a grid in which every row of pictures stands above the row of its reconstructions.

    Args:
        images: uint8 ``(n, C, H, W)``.
        made: the same shape.
        path: file to write.
    """
    columns = min(len(images), 8 if len(images) <= 32 else 16)
    rows = [
        part
        for pair in zip(torch.split(images, columns), torch.split(made, columns), strict=True)
        for part in pair
    ]
    full = [torch.cat([r, r.new_full((columns - len(r), *r.shape[1:]), 255)]) for r in rows]
    labels = ["picture", "again"] * (len(rows) // 2)
    save_grid(torch.cat(full), str(path), columns=columns, row_labels=labels)
