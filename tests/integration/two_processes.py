"""One of two processes that train together, run after run; ``test_sharding.py`` starts both.

Starting Python twice and importing everything takes longer than all the runs, so one pair of
processes does them one after the other. The argument is a JSON list of :class:`Job` fields.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from genscale.cli.app import main
from genscale.training.callbacks.ema import UpdateEMA
from genscale.training.module import GenerativeModule


@dataclass(frozen=True, slots=True)
class Job:
    """A training run.

    Args:
        words: the command line.
        stop: break off when this step is done.
        spoil: the loss of this step is NaN, on the last process alone.
        copies: folders to copy first, and where to.
    """

    words: list[str]
    stop: int | None = None
    spoil: int | None = None
    copies: tuple[tuple[str, str], ...] = ()


class PowerCut(BaseException):
    """Ends a run without any farewell."""


def do(job: Job, rank: int, last: int) -> int:
    """Train, as process ``rank`` of 0 to ``last``; return the status of the command."""
    update, loss_of = UpdateEMA.on_step, GenerativeModule.training_step
    if job.copies:
        for source, target in job.copies if rank == 0 else ():
            shutil.copytree(source, target)
        torch.distributed.barrier()  # no first job copies: there is a group

    def on_step(self: Any, trainer: Any, module: Any) -> None:
        update(self, trainer, module)
        if module.step == job.stop:
            raise PowerCut

    def training_step(self: Any, raw: Any, batch_idx: int) -> Any:
        loss = loss_of(self, raw, batch_idx)
        return loss * float("nan") if self.step + 1 == job.spoil and rank == last else loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UpdateEMA, "on_step", on_step)
        patch.setattr(GenerativeModule, "training_step", training_step)
        patch.setenv("GENSCALE_RUN_DIR", "")  # training sets it
        try:
            return main("train", "genscale.cli.train:run", argv=job.words)
        except PowerCut:
            return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    size = os.environ["WORLD_SIZE"]
    for fields in json.loads(sys.argv[1]):
        os.environ["WORLD_SIZE"] = size  # Lightning removes it after a run
        status = do(Job(**fields), int(os.environ["RANK"]), int(size) - 1)
        if status:
            raise SystemExit(status)
