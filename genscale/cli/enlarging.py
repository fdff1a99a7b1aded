"""``sample.py`` and ``evaluate.py`` of a run that trained an upscaler: small and large again."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from genscale.cli.loading import datasets_of, output_folder
from genscale.cli.reconstructing import held_out, pair_measures, refuse_settings, so_many
from genscale.runs import RunFolder

if TYPE_CHECKING:
    from torch import Tensor

    from genscale.metrics.lpips import LPIPS
    from genscale.metrics.protocol import EvalProtocol, MetricValue
    from genscale.training.upscaling import UpscalerTraining
    from genscale.upscaling.loading import UpscalerFacts

_SHOWN = 16  # pictures of an evaluation's grid


def enlarges(cfg: DictConfig) -> bool:
    """Return whether ``cfg.run`` is a run that trained an upscaler."""
    from genscale.upscaling.loading import trains_upscaler

    folder = Path(str(cfg.run)).expanduser()
    if cfg.get("samples") is not None or not (folder / "config.yaml").is_file():
        return False
    return trains_upscaler(RunFolder.open(folder).config())


@dataclass(frozen=True, slots=True)
class Enlarged:
    """Pictures ``(n, C, H, W)`` uint8, and what was made of their small versions.

    Attributes:
        images: the originals.
        small: by scale, what was made large: nearest neighbours show it at the size of the rest.
        made: by scale and by name, ``""`` for the network's; see
            :func:`~genscale.training.upscaler_run.enlarged`.
        split: ``heldout``, or ``train`` where nothing is held out.
        facts: of the upscaler.
        training: what made them.
        data: the data module.
    """

    images: Tensor
    small: dict[int, Tensor]
    made: dict[int, dict[str, Tensor]]
    split: str
    facts: UpscalerFacts
    training: UpscalerTraining
    data: Any


def sample(cfg: DictConfig) -> None:
    """Write held-out pictures, small and large again, below each other, in ``format``."""
    from genscale import dist
    from genscale.io.files import write_json
    from genscale.io.images import channels_last, save_npz, save_png

    started = time.perf_counter()
    _refuse(cfg)
    found = _enlarge(cfg, cfg.num_samples)
    if dist.initialise()[0] == 0:
        folder = output_folder(cfg, "samples")
        written = folder / "grid.png"
        _save_comparison(found, len(found.images), written)
        first = found.made[min(found.made)][""]
        if cfg.format == "npz":
            written = folder / "samples.npz"
            save_npz(written, channels_last(first), None)
        elif cfg.format == "png":
            written = folder
            for number, image in enumerate(first):
                save_png(folder / f"{number:05d}.png", image)
        record = {
            **_record(cfg, found),
            "scale": min(found.made),
            "seconds": round(time.perf_counter() - started, 2),
        }
        write_json(folder / "samples.json", record)
        which = "held-out" if found.split == "heldout" else "training"
        print(f"{len(found.images)} {which} pictures made small and large again: {written}")
    dist.finish()


def evaluate(cfg: DictConfig) -> None:
    """Measure pictures made large again by the network, and by what it is compared with."""
    from genscale import dist
    from genscale.cli.evaluate import print_values
    from genscale.evaluation import as_record
    from genscale.io.files import write_json
    from genscale.report import write_report

    started = time.perf_counter()
    _refuse(cfg)
    found = _enlarge(cfg, cfg.num_samples)
    if dist.initialise()[0] == 0:
        values = _closeness(found, pair_measures(cfg))
        folder = output_folder(cfg, "evaluations")
        record = {
            **_record(cfg, found),
            "command": sys.argv,
            "seconds": round(time.perf_counter() - started, 2),
            **as_record(values),
        }
        _save_comparison(found, _SHOWN, folder / "grid.png")
        write_json(folder / "metrics.json", record)
        print_values(values, record, {})
        print(f"numbers: {folder / 'metrics.json'}")
        if not cfg.out_dir:
            print(f"report: {write_report(RunFolder.open(cfg.run).path)}")
    dist.finish()


def _refuse(cfg: DictConfig) -> None:
    refuse_settings(cfg, "trained an upscaler, which makes held-out pictures small and large again")


def _record(cfg: DictConfig, found: Enlarged) -> dict[str, Any]:
    return {
        "run": str(cfg.run),
        "checkpoint": str(cfg.checkpoint),
        "weights": found.facts.weights,
        "step": found.facts.step,
        "num_samples": len(found.images),
        "enlarged": f"{found.data.name}, {found.split}",
    }


def _enlarge(cfg: DictConfig, count: int | None) -> Enlarged:
    """Make the first so many pictures small and large again; processes share the work."""
    import torch

    from genscale import dist
    from genscale.training.upscaler_run import load_training

    rank, world_size = dist.initialise()
    training, facts = load_training(
        cfg.run, checkpoint=cfg.checkpoint, weights=str(cfg.weights), device=cfg.device
    )
    data = datasets_of(cfg.run)
    pictures, split = held_out(data)
    total = so_many(pictures, count, f"to enlarge ({split})")
    ids = torch.arange(total)[rank::world_size]
    batches = list(_batches(training, pictures, ids, cfg.batch_size))
    columns = {
        name: torch.cat([batch[name] for batch in batches])
        for name in (batches[0] if batches else {})
    }
    _, *gathered = dist.gather_rows(*columns.values())
    whole = dict(zip(list(columns)[1:], gathered, strict=True))
    made: dict[int, dict[str, Tensor]] = {scale: {} for scale in facts.scales}
    for name in whole:
        if isinstance(name, tuple) and name[1] != "small":
            made[name[0]][name[1]] = whole[name]
    return Enlarged(
        images=whole["images"],
        small={scale: whole[scale, "small"] for scale in facts.scales},
        made=made,
        split=split,
        facts=facts,
        training=training,
        data=data,
    )


def _batches(
    training: UpscalerTraining, pictures: Any, ids: Tensor, batch_size: int
) -> Iterator[dict[Any, Tensor]]:
    """Yield ids, pictures, and by (scale, name) what was made of them, of this process's share."""
    import torch

    from genscale import dist
    from genscale.cli.progress import track
    from genscale.io.images import from_uint8, to_uint8
    from genscale.training.upscaler_run import enlarged, shown_small

    device = next(training.model.parameters()).device
    show = dist.initialise()[0] == 0
    for part in track(torch.split(ids, batch_size), "enlarging", total=len(ids), show=show):
        images = pictures.images(part)
        inputs = from_uint8(images).to(device)
        rows: dict[Any, Tensor] = {"ids": part, "images": images}
        for scale in training.model.scales:
            rows[scale, "small"] = to_uint8(shown_small(training, inputs, scale)).cpu()
            for name, made in enlarged(training, inputs, scale).items():
                rows[scale, name] = to_uint8(made).cpu()
        yield rows


def _closeness(found: Enlarged, perceptual: Sequence[LPIPS]) -> list[MetricValue]:
    """Return PSNR and SSIM of all that was made, by scale; edges of so many pixels left out.

    Perceptual distances, where there are any, are of whole pictures.
    """
    from genscale.metrics.lpips import mean_distance
    from genscale.metrics.protocol import MetricValue
    from genscale.metrics.restoration import Channel, restoration_psnr, restoration_ssim

    values: list[MetricValue] = []
    colour = found.images.shape[1] == 3
    for scale, by_name in found.made.items():
        # pictures that are all border are scored whole
        border = scale if min(found.images.shape[2:]) > 4 * scale else 0
        for name, made in by_name.items():
            end = f"_x{scale}" + (f"_{name}" if name else "")
            scores: list[tuple[str, Channel, Any]] = [
                ("psnr_y", "y", restoration_psnr),
                ("ssim_y", "y", restoration_ssim),
            ]
            if colour:
                scores.append(("psnr_rgb", "rgb", restoration_psnr))
            for score, channel, measure in scores:
                protocol = _protocol(found, scale, name, channel, border)
                numbers = measure(found.images, made, channel=channel, border=border)
                values.append(
                    MetricValue(
                        f"{score}{end}",
                        float(numbers.mean()),
                        protocol.digest,
                        {"std": float(numbers.std())},
                        protocol,
                    )
                )
            whole = _protocol(found, scale, name, "rgb", 0)
            for each in perceptual:
                value = mean_distance(each, found.images, made, whole)
                values.append(replace(value, name=f"{value.name}{end}"))
    return values


def _protocol(found: Enlarged, scale: int, name: str, channel: str, border: int) -> EvalProtocol:
    from genscale.metrics.protocol import EvalProtocol

    data, training = found.data, found.training
    pictures = data.train if found.split == "train" else data.heldout
    autoencoder = getattr(training, "autoencoder", None)
    return EvalProtocol(
        reference=f"{data.name}-{data.resolution}-{found.split}",
        reference_sha256=pictures.fingerprint(),
        reference_split=found.split,
        reference_count=len(found.images),
        num_samples=len(found.images),
        class_law="empirical",
        seeds="",
        sampler=name or type(training.model).__name__.lower(),
        autoencoder="" if autoencoder is None else autoencoder.protocol_name,
        weights="" if name else str(found.facts.weights),
        settings=(
            ("average", "mean over pictures"),
            ("border", border),
            ("channel", channel),
            ("reduced_by", training.reduction),
            ("scale", scale),
        ),
    )


def _save_comparison(found: Enlarged, count: int, path: Path) -> None:
    """Write a grid: small pictures, every way of enlarging them, originals; the first scale's."""
    import torch

    from genscale.io.images import save_grid

    scale = min(found.made)
    rows = {"small": found.small[scale]}
    named = found.made[scale]
    rows |= {name: made for name, made in named.items() if name}
    rows |= {type(found.training.model).__name__.lower(): named[""], "original": found.images}
    columns = min(count, len(found.images), 8)
    parts, labels = [], []
    for start in range(0, min(count, len(found.images)), columns):
        for name, images in rows.items():
            part = images[start : start + columns]
            missing = part.new_full((columns - len(part), *part.shape[1:]), 255)
            parts.append(torch.cat([part, missing]))
            labels.append(name)
    save_grid(torch.cat(parts), str(path), columns=columns, row_labels=labels)
