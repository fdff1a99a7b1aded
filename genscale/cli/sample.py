"""``python sample.py``: samples of a run as a grid, single pictures, or an npz."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from genscale.cli.numbers import check_numbers
from genscale.errors import ConfigError, did_you_mean

FORMATS = ("grid", "png", "npz")
CAPTION_LINES = 4  # that a prompt takes below a picture


def run(cfg: DictConfig) -> None:
    """Generate ``num_samples`` samples and write them in ``format``."""
    if cfg.format not in FORMATS:
        raise ConfigError(
            f"format must be one of {', '.join(FORMATS)}, but '{cfg.format}' was given."
            f"{did_you_mean(str(cfg.format), FORMATS)}"
        )
    check_numbers(cfg, {"num_samples": 1, "batch_size": 1, "seed": None})
    from genscale.cli.reconstructing import reconstructs
    from genscale.cli.reconstructing import sample as sample_reconstructions

    if reconstructs(cfg):
        sample_reconstructions(cfg)
        return
    from genscale import dist
    from genscale.cli.loading import load_pipeline, output_folder
    from genscale.io.files import write_json

    rank, world_size = dist.initialise()
    started = time.perf_counter()
    pipeline, sampler, guidance = load_pipeline(cfg)
    ids, images, labels, nfe = collect(cfg, pipeline, rank=rank, world_size=world_size)
    if rank == 0:
        folder = output_folder(cfg, "samples")
        captions = _captions(cfg, pipeline, len(ids))
        written = _write(cfg, folder, pipeline, images, labels, captions)
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
            "sampler": sampler,
            "guidance": guidance,
            "step_cache": pipeline.step_cache.label,
            "precision": cfg.precision,
            "nfe_per_sample": float(nfe.mean()),
            "solver_evaluations": pipeline.sampler.nfe(0, pipeline.sampler.num_steps),
            "seconds": round(time.perf_counter() - started, 2),
        }
        write_json(folder / "samples.json", record)
        spent = f"{record['nfe_per_sample']:g} network evaluations each"
        if record["step_cache"] != "none":
            most = "at most " if pipeline.sampler.nfe_is_bound else ""
            spent += f" (of {most}{record['solver_evaluations']} a branch that the solver makes)"
        print(f"{len(ids)} samples, {spent}: {written}")
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


def collect(cfg: DictConfig, pipeline: Any, *, rank: int, world_size: int) -> tuple[Any, ...]:
    """Generate this process's share with a progress bar and join all shares by sample id.

    Returns:
        ids ``(n,)``, images uint8 ``(n, C, H, W)``, labels ``(n,)`` (-1 where there are none),
        network evaluations ``(n,)``.
    """
    import torch

    from genscale import dist
    from genscale.cli.progress import track
    from genscale.prompts import read_prompts

    stream = pipeline.stream(
        num_samples=cfg.num_samples,
        labels=label_law(cfg),
        prompts=read_prompts(cfg.prompts),
        negative_prompt=None if cfg.negative_prompt is None else str(cfg.negative_prompt),
        seed=cfg.seed,
        batch_size=cfg.batch_size,
        rank=rank,
        world_size=world_size,
    )
    share = cfg.num_samples * (rank + 1) // world_size - cfg.num_samples * rank // world_size
    batches = list(track(stream, "sampling", total=share, show=rank == 0))
    if batches:
        labels = [b.labels if b.labels is not None else torch.full_like(b.ids, -1) for b in batches]
        parts = (
            torch.cat([b.ids for b in batches]),
            torch.cat([b.images for b in batches]),
            torch.cat(labels),
            torch.cat([b.nfe for b in batches]),
        )
    else:
        empty = torch.zeros(0, dtype=torch.int64)
        shape = pipeline.image_shape
        images = torch.zeros((0, *shape), dtype=torch.uint8)
        parts = (empty, images, empty, empty.double())
    return dist.gather_rows(*parts)


def _write(
    cfg: DictConfig,
    folder: Path,
    pipeline: Any,
    images: Any,
    labels: Any,
    captions: list[str] | None,
) -> Path:
    """Write a grid, and the samples in the format asked for; return the path to name."""
    from genscale.io.images import save_grid, save_npz, save_png
    from genscale.prompts import as_file_name

    grid = folder / "grid.png"
    columns = grid_columns(cfg, pipeline, captions)
    save_grid(images, grid, columns=columns, captions=captions, caption_lines=CAPTION_LINES)
    if cfg.format == "npz":
        path = folder / "samples.npz"
        arrays = images.permute(0, 2, 3, 1).contiguous().numpy()
        save_npz(path, arrays, labels.numpy() if bool((labels >= 0).all()) else None)
        return path
    if cfg.format == "png":
        width = max(len(str(len(images) - 1)), 5)
        for i, image in enumerate(images):
            suffix = f"_class{int(labels[i])}" if int(labels[i]) >= 0 else ""
            if captions is not None:
                suffix += f"_{as_file_name(captions[i])}"
            save_png(folder / f"{i:0{width}d}{suffix}.png", image)
        return folder
    return grid


def grid_columns(cfg: DictConfig, pipeline: Any, captions: list[str] | None = None) -> int | None:
    """Return a width that puts one class or prompt in every column where they allow it."""
    law = label_law(cfg)
    count = len(law) if isinstance(law, list) else pipeline.num_classes if law == "balanced" else 0
    if captions is not None:
        count = len(set(captions))
    if count == 2:
        return 8
    return count if 3 <= count <= 16 else None
