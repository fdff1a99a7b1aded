"""A progress bar over batches of samples."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def track(batches: Iterable[Any], what: str, *, total: int, show: bool = True) -> Iterator[Any]:
    """Pass on batches and show count, rate and time left on standard error.

    Batches are tensors, or have ``ids``. Where standard error is no terminal, a line is written
    every ten seconds.
    """
    if not show:
        yield from batches
        return
    started = last = time.perf_counter()
    done = 0
    if sys.stderr.isatty():
        columns = (
            TextColumn(what),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=total, rate="")
            for batch in batches:
                done += len(getattr(batch, "ids", batch))
                rate = done / max(time.perf_counter() - started, 1e-9)
                bar.update(task, completed=done, rate=f"{rate:.1f}/s")
                yield batch
        return
    for batch in batches:
        done += len(getattr(batch, "ids", batch))
        now = time.perf_counter()
        if now - last >= 10:
            last = now
            left = (total - done) * (now - started) / done
            sys.stderr.write(f"{what} {done}/{total}, {left:.0f} s left\n")
        yield batch
