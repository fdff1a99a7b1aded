"""``python evaluate.py``: numbers of a run, or of two files, beside their protocols."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from genscale import dist
from genscale.cli.app import instantiate
from genscale.cli.enlarging import enlarges
from genscale.cli.enlarging import evaluate as evaluate_enlarged
from genscale.cli.loading import datasets_of, load_pipeline, output_folder
from genscale.cli.numbers import check_numbers
from genscale.cli.progress import track
from genscale.cli.reconstructing import evaluate as evaluate_reconstructions
from genscale.cli.reconstructing import reconstructs
from genscale.cli.run_protocol import settle
from genscale.cli.sample import grid_columns, label_law, shown_rate
from genscale.cli.search_results import means
from genscale.cli.searching import check_requests, sample_requests, search_setup, searched
from genscale.errors import ConfigError
from genscale.evaluation import (
    as_record,
    clip_protocol,
    describe,
    fit_reference,
    heldout_captions,
    measure,
)
from genscale.io.files import write_json
from genscale.io.images import channels_first, channels_last, load_npz, save_npz
from genscale.io.video import is_clips, save_overview
from genscale.metrics.protocol import EvalProtocol, MetricValue
from genscale.pipeline import Generated, choose_device
from genscale.prompts import read_prompts
from genscale.run_weights import is_exported
from genscale.runs import RunFolder, new_folder
from genscale.sample_conditions import check_frame_rate

GRID = 100  # pictures shown in the report,
CLIPS = 32  # or clips


def run(cfg: DictConfig) -> None:
    """Evaluate ``cfg.run``, or the files ``cfg.samples`` and ``cfg.reference``."""
    if reconstructs(cfg):
        evaluate_reconstructions(cfg)
        return
    if enlarges(cfg):
        evaluate_enlarged(cfg)
        return
    started = time.perf_counter()
    settle(cfg)
    check_numbers(cfg, {"num_samples": 1, "batch_size": 1, "seed": None})
    rank, world_size = dist.initialise()
    suite = instantiate(cfg.metrics, "metrics", **_reference(cfg))
    # a file brings its own number of samples, which is checked when it has been read
    problems = suite.check(num_samples=None if cfg.samples is not None else cfg.num_samples)
    if cfg.samples is not None and not Path(cfg.samples).expanduser().is_file():
        problems.append(
            f"No samples at samples={cfg.samples}. Give an npz with arr_0 (uint8 NHWC, of clips "
            "NTHWC)."
        )
    if problems:
        raise ConfigError("\n".join(problems))
    evaluate = _evaluate_files if cfg.samples is not None else _evaluate_run
    folder, record, values, images, columns = evaluate(cfg, suite, rank, world_size)
    if rank == 0:
        record |= {
            "command": sys.argv,
            "seconds": round(time.perf_counter() - started, 2),
            **as_record(values),
        }
        shown = images[: CLIPS if is_clips(images) else GRID]
        rate = record.get("frame_rate", cfg.frame_rate)
        save_overview(
            shown,
            folder / "grid.png",
            frame_rate=None if rate is None else float(rate),
            columns=columns,
        )
        write_json(folder / "metrics.json", record)
        print_values(values, record, suite.skipped)
        print(f"numbers: {folder / 'metrics.json'}")
        if cfg.samples is None and (RunFolder(folder.parent.parent).config_file).is_file():
            from genscale.report import write_report

            print(f"report: {write_report(folder.parent.parent)}")
    dist.finish()


def _reference(cfg: DictConfig) -> dict[str, Any]:
    """Return the suite's reference file, if one is named."""
    if cfg.reference is None:
        if cfg.samples is not None:
            raise ConfigError(
                "samples= was given without reference=. Give the file to compare with, e.g. "
                "reference=VIRTUAL_imagenet256_labeled.npz."
            )
        return {}
    return {"reference": str(Path(cfg.reference).expanduser())}


def _evaluate_run(cfg: DictConfig, suite: Any, rank: int, world_size: int) -> tuple[Any, ...]:
    """Sample from a run and measure."""
    pipeline, sampler, guidance = load_pipeline(cfg)
    suite.to(pipeline.device)
    if rank == 0:
        suite.watch = lambda batches, what, total: track(batches, what, total=total)
    data = None
    if suite.reference is None:
        data = datasets_of(cfg.run)
        fit_reference(suite, data, (pipeline.image_shape[-2], pipeline.image_shape[-1]))
    law = label_law(cfg)
    prompts = _prompts(cfg, pipeline, data)
    setup = search_setup(cfg, pipeline)
    if setup is not None:
        asked = sample_requests(pipeline, law, prompts, cfg.num_samples, cfg.seed)
        check_requests(setup, asked)
    settings = {
        "num_samples": cfg.num_samples,
        "labels": law,
        "prompts": prompts,
        "seed": cfg.seed,
        "batch_size": cfg.batch_size,
        "rank": rank,
        "world_size": world_size,
    }
    share = cfg.num_samples * (rank + 1) // world_size - cfg.num_samples * rank // world_size
    kept: list[Generated] = []
    records: list[dict[str, Any]] = []

    seconds = 0.0

    def watched() -> Iterator[Generated]:
        nonlocal seconds
        started = time.perf_counter()
        for batch, found in searched(pipeline, setup, settings, total=share, show=rank == 0):
            seconds += time.perf_counter() - started
            if cfg.save_samples or len(kept) * cfg.batch_size < GRID:
                kept.append(batch)
            records.extend(found)
            yield batch
            started = time.perf_counter()

    nfe = measure(suite, watched())
    nfe = sum(dist.gather_objects(nfe)) / world_size
    origin = pipeline.origin
    assert origin is not None  # it was loaded just now
    protocol = describe(
        pipeline,
        labels=law,
        texts="heldout_captions" if cfg.prompts is None else "prompts",
        num_samples=cfg.num_samples,
        nfe=nfe,
        weights=origin.weights,
        search=None if setup is None else setup.label,
    )
    values = suite.compute(protocol)
    folder = output_folder(cfg, "evaluations") if rank == 0 else None
    if cfg.save_samples:
        _save_samples(folder, kept)
    record = {
        "run": str(cfg.run),
        "checkpoint": str(cfg.checkpoint),
        "weights": cfg.weights,
        "step": origin.step,
        "num_samples": cfg.num_samples,
        "labels": law,
        "prompts": None if pipeline.text is None else str(cfg.prompts or "held-out captions"),
        "seed": cfg.seed,
        "size": list(pipeline.image_shape[-2:]),
        "resolution": pipeline.resolution.label,
        "sampler": sampler,
        "guidance": guidance,
        "step_cache": pipeline.step_cache.label,
        "nfe_per_sample": nfe,
        "seconds_per_sample": seconds / max(1, share),
        "solver_evaluations": pipeline.sampler.nfe(0, pipeline.sampler.num_steps),
    }
    if pipeline.device.type == "cuda":
        record["peak_gigabytes"] = torch.cuda.max_memory_allocated(pipeline.device) / 1e9
    if suite.patch is not None:
        record["patch"] = list(suite.patch)
    if pipeline.makes_clips:
        record |= {"num_frames": pipeline.image_shape[1], "frame_rate": shown_rate(pipeline)}
    if pipeline.references is not None:
        record |= pipeline.references.record()
    if pipeline.upscaling is not None:
        record |= pipeline.upscaling.record()
    if setup is not None:
        record |= _search_summary(setup.label, records)
    images = torch.cat([batch.images for batch in kept]) if kept else torch.zeros(0)
    return folder, record, values, images, grid_columns(cfg, pipeline)


def _search_summary(label: str, own: list[dict[str, Any]]) -> dict[str, Any]:
    """Return mean rewards and costs of all processes' samples."""
    records = [record for part in dist.gather_objects(own) for record in part]
    return {
        "search": label,
        "search_rewards": means([record["rewards"] for record in records]),
        "held_out_rewards": means([record["held_out"] for record in records]),
        "search_cost": means([record["cost"] for record in records]),
    }


def _prompts(cfg: DictConfig, pipeline: Any, data: Any) -> list[str] | None:
    """Return what is asked for, else the data's held-out captions; None without either."""
    given = read_prompts(cfg.prompts)
    if given is not None or pipeline.text is None:
        return given
    if data is None and not is_exported(cfg.run):
        data = datasets_of(cfg.run)
    return None if data is None else heldout_captions(data, cfg.num_samples)


def _save_samples(folder: Path | None, kept: list[Generated]) -> None:
    """Join all processes' samples and write them as one npz, where this one has the folder."""
    labels = [b.labels if b.labels is not None else torch.full_like(b.ids, -1) for b in kept]
    _, images, classes = dist.gather_rows(
        torch.cat([b.ids for b in kept]), torch.cat([b.images for b in kept]), torch.cat(labels)
    )
    if folder is not None:
        known = bool((classes >= 0).all())
        save_npz(folder / "samples.npz", channels_last(images), classes if known else None)


def _evaluate_files(cfg: DictConfig, suite: Any, rank: int, world_size: int) -> tuple[Any, ...]:
    """Measure an npz of samples against a reference file."""
    pixels, labels = load_npz(Path(cfg.samples).expanduser())
    images = channels_first(pixels)
    if cfg.size is not None:
        raise ConfigError(
            f"size={cfg.size} was given, but samples={cfg.samples} have a size. Leave it out."
        )
    if cfg.frame_rate is not None:
        check_frame_rate(cfg.frame_rate, clips=is_clips(images))
    suite.to(choose_device(cfg.device))
    ids = torch.arange(len(images))[rank::world_size]
    batches = (
        Generated(
            part, images[part], None if labels is None else labels[part], torch.zeros(len(part))
        )
        for part in torch.split(ids, cfg.batch_size)
    )
    measure(suite, track(batches, "features", total=len(ids), show=rank == 0))
    rate = None if cfg.frame_rate is None else float(cfg.frame_rate)
    protocol = EvalProtocol(
        num_samples=len(images),
        class_law="empirical",
        weights="unknown",
        clips=clip_protocol(tuple(images.shape[1:]), rate),
    )
    values = suite.compute(protocol)
    folder = _folder_of_files(cfg) if rank == 0 else None
    record = {
        "samples": str(cfg.samples),
        "reference": str(cfg.reference),
        "num_samples": len(images),
    }
    return folder, record, values, images, None


def _folder_of_files(cfg: DictConfig) -> Path:
    if not cfg.out_dir:
        return new_folder(Path("outputs/evaluations"))
    folder = Path(cfg.out_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def print_values(
    values: list[MetricValue], record: dict[str, Any], skipped: dict[str, str]
) -> None:
    """Print a table for people; every number stands beside its protocol."""
    title = f"{record['num_samples']} samples"
    if "search" in record:
        title += f" found by {record['search']}"
    if "nfe_per_sample" in record:
        title += f", {record['nfe_per_sample']:g} network evaluations each"
    if "seconds_per_sample" in record:
        title += f", {record['seconds_per_sample']:.3g} s"
    table = Table(title=title)
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("protocol")
    table.add_column("details")
    for value in values:
        details = ", ".join(
            f"{name} {number:.4g}"
            for name, number in value.details.items()
            if isinstance(number, int | float) and name != "seconds"
        )
        table.add_row(value.name, f"{value.value:.4f}", value.protocol_hash, details)
    console = Console()
    console.print(table)
    for kind in ("search_rewards", "held_out_rewards"):
        for name, number in record.get(kind, {}).items():
            role = "searched for" if kind == "search_rewards" else "held out"
            console.print(f"{name}, {role}: {number:.4g}")
    if "patch" in record:
        height, width = record["patch"]
        console.print(f"features are of {height}x{width} patches: the data have no larger pictures")
    for name, reason in skipped.items():
        console.print(f"left out: {name}: {reason}")
