"""``python sample.py``: samples of a run as a grid, single pictures or clips, or an npz."""

from __future__ import annotations

import time
from typing import Any

from omegaconf import DictConfig, OmegaConf

from genscale.cli.numbers import check_numbers
from genscale.cli.sample_files import check_format, known_format, write_samples

CAPTION_LINES = 4  # that a prompt takes below a picture


def run(cfg: DictConfig) -> None:
    """Generate ``num_samples`` samples and write them in ``format``."""
    known_format(cfg.format)
    check_numbers(cfg, {"num_samples": 1, "batch_size": 1, "seed": None})
    from genscale.cli.enlarging import enlarges
    from genscale.cli.enlarging import sample as sample_enlarged
    from genscale.cli.reconstructing import reconstructs
    from genscale.cli.reconstructing import sample as sample_reconstructions

    if reconstructs(cfg):
        check_format(cfg.format, clips=False)
        sample_reconstructions(cfg)
        return
    if enlarges(cfg):
        check_format(cfg.format, clips=False)
        sample_enlarged(cfg)
        return
    from genscale import dist
    from genscale.cli.loading import load_pipeline, output_folder
    from genscale.cli.search_results import write_search
    from genscale.cli.searching import check_requests, sample_requests, search_setup
    from genscale.io.files import write_json
    from genscale.io.video import save_overview
    from genscale.prompts import read_prompts

    rank, world_size = dist.initialise()
    started = time.perf_counter()
    pipeline, sampler, guidance = load_pipeline(cfg)
    check_format(cfg.format, clips=pipeline.makes_clips)
    setup = search_setup(cfg, pipeline)
    if setup is not None:
        prompts = read_prompts(cfg.prompts)
        asked = sample_requests(pipeline, label_law(cfg), prompts, cfg.num_samples, cfg.seed)
        check_requests(setup, asked)
    settings = stream_settings(cfg, rank=rank, world_size=world_size)
    ids, images, labels, nfe, searched, spent_on = collect(pipeline, settings, setup=setup)
    if rank == 0:
        folder = output_folder(cfg, "samples")
        captions = _captions(cfg, pipeline, len(ids))
        save_overview(
            images,
            folder / "grid.png",
            frame_rate=pipeline.frame_rate,
            columns=grid_columns(cfg, pipeline, captions),
            captions=captions,
            caption_lines=CAPTION_LINES,
        )
        written = write_samples(
            cfg.format, folder, images, labels, captions, frame_rate=pipeline.frame_rate
        )
        record = {
            "run": str(cfg.run),
            "checkpoint": str(cfg.checkpoint),
            "weights": cfg.weights,
            "step": None if pipeline.origin is None else pipeline.origin.step,
            "num_samples": len(ids),
            "labels": OmegaConf.to_container(cfg.labels)
            if OmegaConf.is_config(cfg.labels)
            else cfg.labels,
            "prompts": None if captions is None else list(dict.fromkeys(captions)),
            "negative_prompt": cfg.negative_prompt,
            "seed": cfg.seed,
            "size": list(pipeline.image_shape[-2:]),
            "resolution": pipeline.resolution.label,
            "sampler": sampler,
            "guidance": guidance,
            "step_cache": pipeline.step_cache.label,
            "precision": cfg.precision,
            "nfe_per_sample": float(nfe.mean()),
            "solver_evaluations": pipeline.sampler.nfe(0, pipeline.sampler.num_steps),
            "seconds": round(time.perf_counter() - started, 2),
        }
        if setup is not None:
            record |= {"search": setup.label}
        if pipeline.references is not None:
            record |= pipeline.references.record()
        if pipeline.upscaling is not None:
            record |= pipeline.upscaling.record()
        if pipeline.makes_clips:
            record |= {"num_frames": images.shape[2], "frame_rate": shown_rate(pipeline)}
        write_json(folder / "samples.json", record)
        spent = f"{record['nfe_per_sample']:g} network evaluations each"
        if record["step_cache"] != "none":
            most = "at most " if pipeline.sampler.nfe_is_bound else ""
            spent += f" (of {most}{record['solver_evaluations']} a branch that the solver makes)"
        print(f"{len(ids)} samples, {spent}: {written}")
        if setup is not None:
            print(write_search(cfg, folder, pipeline, setup, searched, settings, seconds=spent_on))
    dist.finish()


def label_law(cfg: DictConfig) -> Any:
    """Return ``cfg.labels`` as plain Python."""
    if OmegaConf.is_config(cfg.labels):
        return OmegaConf.to_container(cfg.labels)
    return [cfg.labels] if isinstance(cfg.labels, int) else cfg.labels


def _captions(cfg: DictConfig, pipeline: Any, count: int) -> list[str] | None:
    """Return the prompt of each sample; None for a model that reads no text."""
    from genscale.prompts import read_prompts

    if pipeline.text is None:
        return None
    prompts = read_prompts(cfg.prompts) or pipeline.example_captions
    return [prompts[i % len(prompts)] for i in range(count)]


def stream_settings(cfg: DictConfig, *, rank: int, world_size: int) -> dict[str, Any]:
    """Return what the command line says of the samples, as the pipeline's stream takes it."""
    from genscale.prompts import read_prompts

    return {
        "num_samples": cfg.num_samples,
        "labels": label_law(cfg),
        "prompts": read_prompts(cfg.prompts),
        "negative_prompt": None if cfg.negative_prompt is None else str(cfg.negative_prompt),
        "seed": cfg.seed,
        "batch_size": cfg.batch_size,
        "rank": rank,
        "world_size": world_size,
    }


def collect(
    pipeline: Any, settings: dict[str, Any], *, setup: Any = None
) -> tuple[Any, Any, Any, Any, list[dict[str, Any]], dict[str, float]]:
    """Generate this process's share with a progress bar and join all shares by sample id.

    Args:
        pipeline: what makes the samples.
        settings: of :func:`stream_settings`.
        setup: how they are searched for; None samples once.

    Returns:
        ids ``(n,)``, images uint8 ``(n, C, H, W)`` or clips ``(n, C, T, H, W)``, labels ``(n,)``
        (-1 where there are none), network evaluations ``(n,)``; of a search also a record of each
        sample, and this process's seconds by kind of work.
    """
    import torch

    from genscale import dist
    from genscale.cli.searching import searched

    rank, count, world_size = (settings[k] for k in ("rank", "num_samples", "world_size"))
    share = count * (rank + 1) // world_size - count * rank // world_size
    batches, records = [], []
    seconds: dict[str, float] = {}
    for batch, found in searched(pipeline, setup, settings, total=share, show=rank == 0):
        batches.append(batch)
        records += found
        if batch.search is not None:
            spent = {**batch.search.cost.seconds}
            spent["search"] = batch.search.seconds - sum(spent.values())
            seconds = {k: seconds.get(k, 0.0) + v for k, v in spent.items()}
    if batches:
        known = [b.labels if b.labels is not None else torch.full_like(b.ids, -1) for b in batches]
        parts = (
            torch.cat([b.ids for b in batches]),
            torch.cat([b.images for b in batches]),
            torch.cat(known),
            torch.cat([b.nfe for b in batches]),
        )
    else:
        empty = torch.zeros(0, dtype=torch.int64)
        no_images = torch.zeros((0, *pipeline.image_shape), dtype=torch.uint8)
        parts = (empty, no_images, empty, empty.double())
    joined = [record for part in dist.gather_objects(records) for record in part]
    ids, images, labels, nfe = dist.gather_rows(*parts)
    return ids, images, labels, nfe, sorted(joined, key=lambda each: each["id"]), seconds


def shown_rate(pipeline: Any) -> float | str | None:
    """Return the frame rate that samples were asked for, as JSON can hold it."""
    rate = pipeline.frame_rate
    return "inf" if rate == float("inf") else rate


def grid_columns(cfg: DictConfig, pipeline: Any, captions: list[str] | None = None) -> int | None:
    """Return a width that puts one class or prompt in every column where they allow it."""
    law = label_law(cfg)
    count = len(law) if isinstance(law, list) else pipeline.num_classes if law == "balanced" else 0
    if captions is not None:
        count = len(set(captions))
    if count == 2:
        return 8
    return count if 3 <= count <= 16 else None
