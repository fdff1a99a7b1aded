"""What a search of ``sample.py`` leaves: numbers, pictures before and after, and a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from genscale.cli.searching import searched
from genscale.pipeline import GenerationPipeline
from genscale.search.budget import Budget
from genscale.search.plain import PlainSampling
from genscale.search.setup import SearchSetup

SHOWN = 64  # samples whose plain twin is drawn


def write_search(
    cfg: DictConfig,
    folder: Path,
    pipeline: GenerationPipeline,
    setup: SearchSetup,
    records: Sequence[dict[str, Any]],
    settings: dict[str, Any],
    *,
    seconds: dict[str, float],
) -> str:
    """Write ``search.json``, ``before.png`` and ``search.html``.

    Args:
        cfg: the command's config.
        folder: of the samples.
        pipeline: what made them.
        setup: how.
        records: of each sample, by id.
        settings: of the stream that made them, for their twins without search.
        seconds: wall-clock, by kind of work.

    Returns:
        lines to print.
    """
    from genscale.io.files import write_json
    from genscale.report.search_page import write_search_report

    before = _plain_twins(cfg, folder, pipeline, setup, settings) if cfg.compare else []
    kinds = ("rewards", "held_out")
    record: dict[str, Any] = {
        "search": setup.label,
        "seconds": round(sum(seconds.values()), 2),
        "seconds_of": {kind: round(value, 3) for kind, value in seconds.items()},
        "plain_nfe": before[0]["cost"]["nfe"] if before else None,
        "state_bytes": max((each["state_bytes"] for each in records), default=0),
        "invalid": sum(each["invalid"] for each in records),
        "cost": means([each["cost"] for each in records]),
        "means": {kind: means([each[kind] for each in records]) for kind in kinds},
        "means_before": {kind: means([each[kind] for each in before]) for kind in kinds},
        "samples": list(records),
        "samples_before": before,
    }
    write_json(folder / "search.json", record)
    report = write_search_report(folder, record)
    return "\n".join([*_told(record), f"report: {report}"])


def means(rows: Sequence[dict[str, float | None]]) -> dict[str, float]:
    """Return the mean of every quantity over the rows in which it is known."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if value is not None:
                found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def _plain_twins(
    cfg: DictConfig,
    folder: Path,
    pipeline: GenerationPipeline,
    setup: SearchSetup,
    settings: dict[str, Any],
) -> list[dict[str, Any]]:
    """Sample the first ones without search, and draw them as ``grid.png`` draws the others."""
    import torch

    from genscale.cli.sample import CAPTION_LINES, grid_columns
    from genscale.io.video import save_overview

    plain = replace(setup, search=PlainSampling(), budget=Budget())
    count = min(cfg.num_samples, SHOWN)
    twins = {**settings, "num_samples": count, "rank": 0, "world_size": 1}
    batches, records = [], []
    for batch, found in searched(pipeline, plain, twins, total=count, show=True):
        batches.append(batch)
        records += found
    captions = [c for batch in batches for c in batch.captions or ()] or None
    images: Tensor = torch.cat([batch.images for batch in batches])
    save_overview(
        images,
        folder / "before.png",
        frame_rate=pipeline.frame_rate,
        columns=grid_columns(cfg, pipeline, captions),
        captions=captions,
        caption_lines=CAPTION_LINES,
    )
    return records


def _told(record: dict[str, Any]) -> list[str]:
    """Return a line for every reward: its mean with and without the search."""
    lines = [record["search"]]
    for kind, role in (("rewards", "searched for"), ("held_out", "held out")):
        for name, value in record["means"][kind].items():
            plain = record["means_before"][kind].get(name)
            was = "" if plain is None else f" (without search {plain:.4g})"
            lines.append(f"  {name}, {role}: {value:.4g}{was}")
    return lines
