"""Losses, learning rate and throughput, with one device sync a log interval."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from genscale.training.callbacks.base import StepCallback, due
from genscale.training.run_log import RunLog
from genscale.training.step_module import StepModule

# dense bfloat16 peaks in TFLOP/s, from the vendors' data sheets
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "A10": 125.0}


class TrainLog(StepCallback):
    """Writes a row every ``every`` steps: mean losses since the last row, totals, and rates.

    A term that some steps do not have, such as that of one of several heads, is averaged over those
    that have it.

    Args:
        run_log: where rows go, beside the trainer's loggers.
        every: optimizer steps between rows.
        flops_per_sample: forward FLOPs of one sample; training is counted as three forwards.
    """

    def __init__(self, run_log: RunLog, *, every: int, flops_per_sample: int) -> None:
        self.run_log = run_log
        self.every = max(every, 1)
        self.flops_per_sample = flops_per_sample
        self.latest: dict[str, float] = {}  # the last row, for the progress bar
        self._sums: dict[str, Tensor] = {}
        self._counts: Counter[str] = Counter()  # a term of some steps is a mean over those
        self._steps = 0
        self._seconds = 0.0  # of training, earlier parts of a resumed run included
        self._clock = 0.0  # when this part of the run started
        self._interval = 0.0  # when this interval started, had it been training only

    def state_dict(self) -> dict[str, Any]:
        """Keep the seconds trained so far; only whole intervals, like the rows."""
        return {"seconds": self._seconds + time.perf_counter() - self._clock}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the clock."""
        self._seconds = float(state_dict["seconds"])

    @property
    def seconds(self) -> float:
        """Seconds of training so far, sampling and saving included."""
        return self._seconds + time.perf_counter() - self._clock

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drop rows past the resume point and start the clock."""
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero:
            self.run_log.rewind(self._seen)
        self._clock = self._interval = time.perf_counter()

    def on_step(self, trainer: pl.Trainer, module: StepModule) -> None:
        """Add the step's terms on the device; write a row when one is due."""
        terms = dict(module.terms)
        if module.gradient_norm is not None:
            terms["gradient_norm"] = module.gradient_norm
        for name, value in terms.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self._counts.update(terms.keys())
        self._steps += 1
        if due(module.step, self.every, trainer.max_steps):
            self._write(trainer, module)

    def _write(self, trainer: pl.Trainer, module: StepModule) -> None:
        names = [*self._sums, *module.counts]
        means = torch.stack(
            [self._sums[name] / self._counts[name] for name in self._sums]
            + [count.float() for count in module.counts.values()]
        )
        if trainer.world_size > 1:
            means = trainer.strategy.reduce(means, reduce_op="mean")
        values = means.tolist()  # the one sync of the interval
        now = time.perf_counter()
        rate = self._steps * module.batch_size / max(now - self._interval, 1e-9)
        flops = 3 * rate * self.flops_per_sample
        row: dict[str, Any] = {
            "step": module.step,
            "samples_seen": module.samples_seen,
            "seconds": round(self.seconds, 3),
            **{f"train/{name}": value for name, value in zip(names, values, strict=True)},
            "train/learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "train/samples_per_second": rate,
            "train/gflops_per_second": flops / 1e9,
        }
        peak = peak_flops(module.device)
        if peak is not None:
            row["train/mfu"] = flops / (peak * trainer.world_size)
        self.latest = row
        self._sums, self._counts, self._steps = {}, Counter(), 0
        if trainer.is_global_zero:
            self.run_log.append(row)
        for logger in trainer.loggers:
            logger.log_metrics({k: v for k, v in row.items() if "/" in k}, step=module.step)
        self._interval = time.perf_counter()

    def exclude(self, seconds: float) -> None:
        """Leave time spent on sampling, metrics or saving out of the current interval's rate."""
        self._interval += seconds


def peak_flops(device: torch.device) -> float | None:
    """Return the device's dense bfloat16 peak in FLOP/s where it is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for key, peak in PEAK_TFLOPS.items() if key in name), None)
