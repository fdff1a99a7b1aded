"""What a person should know before a run starts, as tables on the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import nn

from genscale.backbones.base import Backbone, parameter_count


def print_model(console: Console, model: Backbone, flops: dict[str, int]) -> None:
    """Print parameters and GFLOPs of one sample's forward, a row for every part."""
    table = Table(title=f"{type(model).__name__}, input {tuple(model.sample_shape)}")
    table.add_column("part")
    table.add_column("parameters", justify="right")
    table.add_column("GFLOPs", justify="right")
    for name, child in _parts(model):
        table.add_row(name, f"{parameter_count(child):,}", _giga(flops.get(name)))
    table.add_section()
    table.add_row("total", f"{parameter_count(model):,}", _giga(flops[""]))
    console.print(table)


def _parts(model: Backbone) -> list[tuple[str, nn.Module]]:
    """Return the children, lists opened one level, so that stages of a model have their rows."""
    parts: list[tuple[str, nn.Module]] = []
    for name, child in model.named_children():
        if type(child).__name__ == "ModuleList":
            parts += [(f"{name}.{i}", item) for i, item in child.named_children()]
        else:
            parts.append((name, child))
    return [(name, child) for name, child in parts if parameter_count(child)]


def _giga(count: int | None) -> str:
    return "-" if not count else f"{count / 1e9:.4g}"


def print_arithmetic(
    console: Console,
    *,
    batch_size: int,
    world_size: int,
    accumulate: int,
    max_steps: int,
    data_size: int,
    run_dir: Path,
    resume: Path | None,
) -> None:
    """Print how a step's batch comes about, how long the run is, and where results go."""
    micro = batch_size // (world_size * accumulate)
    seen = batch_size * max_steps
    console.print(
        f"batch {batch_size} = {world_size} process(es) x {accumulate} accumulation step(s) x "
        f"{micro} samples; {max_steps:,} steps = {seen:,} samples = {seen / data_size:.1f} times "
        f"the {data_size:,} training images"
    )
    console.print(f"results go to {run_dir}")
    if resume is not None:
        console.print(f"continuing from {resume}")
