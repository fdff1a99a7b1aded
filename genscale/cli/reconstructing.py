"""``sample.py`` and ``evaluate.py`` of a run that trained an autoencoder: pictures made again."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from genscale.cli.app import instantiate
from genscale.cli.loading import datasets_of, output_folder
from genscale.errors import ConfigError
from genscale.runs import RunFolder

if TYPE_CHECKING:
    from torch import Tensor

    from genscale.metrics.lpips import LPIPS
    from genscale.metrics.protocol import MetricValue

_SHOWN = 64  # pictures and reconstructions in an evaluation's grid
_OF_SAMPLING = ("sampler", "guidance", "step_cache", "autoencoder", "text_encoder", "upscaling")
_NOTHING = (".NoStepCache", ".NoText", ".NoUpscaling")  # what these groups say by default


def reconstructs(cfg: DictConfig) -> bool:
    """Return whether ``cfg.run`` is a run that trained an autoencoder."""
    from genscale.training.autoencoder_run import trains_autoencoder

    folder = Path(str(cfg.run)).expanduser()
    if cfg.get("samples") is not None or not (folder / "config.yaml").is_file():
        return False
    return trains_autoencoder(RunFolder.open(folder).config())


@dataclass(frozen=True, slots=True)
class Reconstructed:
    """Pictures ``(n, C, H, W)`` uint8, what was made of them, their tokens ``(n, L)``, and labels.

    Attributes:
        split: ``heldout``, or ``train`` where nothing is held out.
        tokens: None where the autoencoder has none.
        labels: -1 where the data have none.
    """

    images: Tensor
    made: Tensor
    tokens: Tensor | None
    labels: Tensor
    split: str
    network: Any
    origin: Any
    data: Any


def sample(cfg: DictConfig) -> None:
    """Write ``num_samples`` held-out pictures above their reconstructions, in ``format``."""
    from genscale import dist
    from genscale.io.files import write_json
    from genscale.io.images import channels_last, save_npz, save_png
    from genscale.training.callbacks.reconstructions import save_pairs

    started = time.perf_counter()
    refuse_settings(cfg, "trained an autoencoder, which reconstructs held-out pictures")
    found = _reconstruct(cfg, cfg.num_samples)
    if dist.initialise()[0] == 0:
        folder = output_folder(cfg, "samples")
        save_pairs(found.images, found.made, folder / "grid.png")
        written = folder / "grid.png"
        if cfg.format == "npz":
            written = folder / "samples.npz"
            labels = found.labels if bool((found.labels >= 0).all()) else None
            save_npz(written, channels_last(found.made), labels)
        elif cfg.format == "png":
            written = folder
            for number, image in enumerate(found.made):
                save_png(folder / f"{number:05d}.png", image)
        record = {
            "run": str(cfg.run),
            "checkpoint": str(cfg.checkpoint),
            "weights": found.origin.weights,
            "step": found.origin.step,
            "num_samples": len(found.made),
            "reconstructions_of": f"{found.data.name}, {found.split}",
            "seconds": round(time.perf_counter() - started, 2),
        }
        write_json(folder / "samples.json", record)
        which = "held-out" if found.split == "heldout" else "training"
        print(f"{len(found.made)} {which} pictures and their reconstructions: {written}")
    dist.finish()


def evaluate(cfg: DictConfig) -> None:
    """Measure reconstructions of held-out pictures, and which codes they use."""
    from genscale import dist
    from genscale.cli.evaluate import print_values
    from genscale.evaluation import as_record
    from genscale.io.files import write_json
    from genscale.report import write_report
    from genscale.training.callbacks.reconstructions import save_pairs

    started = time.perf_counter()
    refuse_settings(cfg, "trained an autoencoder, which reconstructs held-out pictures")
    found = _reconstruct(cfg, cfg.num_samples)
    if dist.initialise()[0] == 0:
        values = [*_closeness(found), *_perceived(cfg, found), *_usage(found)]
        folder = output_folder(cfg, "evaluations")
        record = {
            "run": str(cfg.run),
            "checkpoint": str(cfg.checkpoint),
            "weights": found.origin.weights,
            "step": found.origin.step,
            "num_samples": len(found.images),
            "command": sys.argv,
            "seconds": round(time.perf_counter() - started, 2),
            **as_record(values),
        }
        count = _SHOWN // 2
        save_pairs(found.images[:count], found.made[:count], folder / "grid.png")
        write_json(folder / "metrics.json", record)
        print_values(values, record, {})
        print(f"numbers: {folder / 'metrics.json'}")
        if not cfg.out_dir:
            print(f"report: {write_report(RunFolder.open(cfg.run).path)}")
    dist.finish()


def refuse_settings(cfg: DictConfig, does: str) -> None:
    """Refuse what has no meaning for a run that does not generate: nothing is ignored in silence.

    Args:
        cfg: of ``sample.py`` or ``evaluate.py``.
        does: what such a run does, as a predicate.

    Raises:
        ConfigError: something is given that is for generating runs.
    """
    for group in _OF_SAMPLING:
        node = cfg.get(group)
        given = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else None
        values = [v for k, v in given.items() if v is not None] if isinstance(given, dict) else []
        if values and not str(values[0]).endswith(_NOTHING):
            raise ConfigError(f"{group}=... was given, but run={cfg.run} {does}. Leave it out.")
    if cfg.get("size") is not None:
        raise ConfigError(f"size={cfg.size} was given, but run={cfg.run} {does}. Leave it out.")
    if cfg.get("precision", "float32") != "float32":
        raise ConfigError(
            f"precision={cfg.precision} was given, but run={cfg.run} {does}, in float32. "
            "Leave it out."
        )


def held_out(data: Any) -> tuple[Any, str]:
    """Return the held-out pictures of a data module, or all it has, and the name of the split."""
    return (data.train, "train") if data.heldout is None else (data.heldout, "heldout")


def so_many(pictures: Any, count: int | None, what_for: str) -> int:
    """Return how many of some pictures are meant; all where no number is given.

    Raises:
        ConfigError: there are fewer.
    """
    total = len(pictures) if count is None else count
    if total > len(pictures):
        raise ConfigError(
            f"num_samples={total} was given, but '{pictures.name}' has {len(pictures)} pictures "
            f"{what_for}. Give at most that many."
        )
    return total


def _reconstruct(cfg: DictConfig, count: int | None) -> Reconstructed:
    """Reconstruct the first so many pictures; processes share the work."""
    import torch

    from genscale import dist
    from genscale.training.autoencoder_run import load_autoencoder

    rank, world_size = dist.initialise()
    network, origin = load_autoencoder(
        cfg.run, checkpoint=cfg.checkpoint, weights=str(cfg.weights), device=cfg.device
    )
    data = datasets_of(cfg.run)
    pictures, split = held_out(data)
    total = so_many(pictures, count, f"to reconstruct ({split})")
    ids = torch.arange(total)[rank::world_size]
    batches = list(_batches(network, pictures, ids, cfg.batch_size))
    columns = [torch.cat(column) for column in zip(*batches, strict=True)]
    ids, images, made, tokens = dist.gather_rows(*columns)
    labels = pictures.labels
    return Reconstructed(
        images=images,
        made=made,
        tokens=tokens if tokens.shape[1] else None,
        labels=torch.full((total,), -1) if labels is None else labels[ids],
        split=split,
        network=network,
        origin=origin,
        data=data,
    )


def _batches(
    network: Any, pictures: Any, ids: Tensor, batch_size: int
) -> Iterator[tuple[Tensor, ...]]:
    """Yield ids, pictures, reconstructions and tokens of this process's share."""
    import torch

    from genscale import dist
    from genscale.autoencoders.base import ScaleTokenizer
    from genscale.cli.progress import track
    from genscale.io.images import from_uint8, to_uint8
    from genscale.training.autoencoder_run import reconstruct

    device = next(network.parameters()).device
    show = dist.initialise()[0] == 0
    parts = torch.split(ids, batch_size)
    for part in track(parts, "reconstructing", total=len(ids), show=show):
        images = pictures.images(part)
        inputs = from_uint8(images).to(device)
        tokens = torch.zeros(len(part), 0, dtype=torch.int64)
        if isinstance(network, ScaleTokenizer):
            with torch.no_grad():
                tokens = network.tokens(inputs).cpu()
        yield part, images, to_uint8(reconstruct(network, inputs)).cpu(), tokens


def _protocol(found: Reconstructed, **settings: str) -> Any:
    from genscale.metrics.protocol import EvalProtocol

    data = found.data
    pictures = data.train if found.split == "train" else data.heldout
    return EvalProtocol(
        reference=f"{data.name}-{data.resolution}-{found.split}",
        reference_sha256=pictures.fingerprint(),
        reference_split=found.split,
        reference_count=len(found.images),
        num_samples=len(found.images),
        class_law="empirical",
        seeds="",
        sampler="reconstruction",
        autoencoder=type(found.network).__name__.lower(),
        weights=found.origin.weights,
        settings=tuple(settings.items()),
    )


def _closeness(found: Reconstructed) -> list[MetricValue]:
    """Return PSNR and SSIM."""
    import torch

    from genscale.metrics.protocol import MetricValue
    from genscale.metrics.reconstruction import picture_psnr, picture_ssim, squared_error

    psnr = picture_psnr(found.images, found.made)
    ssim = picture_ssim(found.images, found.made)
    pooled = 10 * torch.log10(255.0**2 / squared_error(found.images, found.made).mean())
    protocol = _protocol(found, average="mean over pictures")
    details = {"std": float(psnr.std()), "of_the_mean_error": float(pooled)}
    return [
        MetricValue("psnr", float(psnr.mean()), protocol.digest, details, protocol),
        MetricValue(
            "ssim", float(ssim.mean()), protocol.digest, {"std": float(ssim.std())}, protocol
        ),
    ]


def pair_measures(cfg: DictConfig) -> list[LPIPS]:
    """Return the distances of pictures from their originals that ``metrics`` has, ready to run.

    Raises:
        ConfigError: weights are missing.
    """
    nodes = OmegaConf.select(cfg, "metrics.pairs") or []
    measures = [instantiate(node, f"metrics.pairs.{i}") for i, node in enumerate(nodes)]
    if problems := [sentence for measure in measures for sentence in measure.check()]:
        raise ConfigError("\n".join(problems))
    return measures


def _perceived(cfg: DictConfig, found: Reconstructed) -> list[MetricValue]:
    """Return the distances that ``metrics`` has of pictures from their originals."""
    from genscale.metrics.lpips import mean_distance

    protocol = _protocol(found, average="mean over pictures")
    device = next(found.network.parameters()).device
    return [
        mean_distance(measure.to(device), found.images, found.made, protocol)
        for measure in pair_measures(cfg)
    ]


def _usage(found: Reconstructed) -> list[MetricValue]:
    """Return how many codes these pictures use: of all scales together, and of each."""
    import torch

    from genscale.metrics.protocol import MetricValue

    if found.tokens is None:
        return []
    from genscale.layers.scales import scale_spans

    network, protocol = found.network, _protocol(found, counted="codes of at least one token")
    details = {"of": network.vocab_size}
    for (height, width), (start, end) in zip(
        network.scales, scale_spans(network.scales), strict=True
    ):
        details[f"scale_{height}x{width}"] = len(torch.unique(found.tokens[:, start:end]))
    used = len(torch.unique(found.tokens))
    return [MetricValue("codes_used", float(used), protocol.digest, details, protocol)]
