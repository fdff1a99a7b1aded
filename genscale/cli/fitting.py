"""What every training run is given besides what it trains: log, trainer, callbacks, summary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from genscale.cli.app import instantiate
from genscale.cli.startup import cluster_plugins
from genscale.errors import ConfigError, did_you_mean
from genscale.runs import RunFolder


def train_log(cfg: DictConfig, folder: RunFolder, flops_per_sample: int) -> Any:
    """Return what writes the rows of ``metrics.jsonl``."""
    from genscale.training.callbacks.log import TrainLog
    from genscale.training.run_log import RunLog

    return TrainLog(
        RunLog(folder.metrics_file),
        every=cfg.callbacks.log_every,
        flops_per_sample=flops_per_sample,
    )


def build_trainer(
    cfg: DictConfig, folder: RunFolder, callbacks: list[Any], *, without: tuple[str, ...] = ()
) -> Any:
    """Build Lightning's trainer, quiet and without its own loops of validation.

    Args:
        cfg: the composed config.
        folder: of the run.
        callbacks: in their order.
        without: keys of ``cfg.trainer`` that are carried out elsewhere.
    """
    loggers = [
        instantiate(node, f"logger.{name}", save_dir=str(folder.path), name=folder.path.name)
        for name, node in cfg.logger.items()
    ]
    keys = [key for key in cfg.trainer if key not in ("profiler", *without)]
    return instantiate(
        OmegaConf.masked_copy(cfg.trainer, keys),
        "trainer",
        profiler=_profiler(cfg.trainer.get("profiler"), folder),
        callbacks=callbacks,
        logger=loggers or False,
        plugins=cluster_plugins(),
        default_root_dir=str(folder.path),
        max_epochs=-1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=10**9,
    )


def usual_callbacks(
    cfg: DictConfig, folder: RunFolder, module: Any, log: Any, looks: list[Any]
) -> list[Any]:
    """Return what happens beside the steps; the order matters, see each of them.

    Args:
        cfg: the composed config.
        folder: of the run.
        module: what is trained.
        log: of :func:`train_log`.
        looks: what looks at the averages: grids and metrics.
    """
    from genscale.training.callbacks.checkpoint import RunCheckpoint
    from genscale.training.callbacks.ema import UpdateEMA
    from genscale.training.callbacks.finite import FiniteGuard
    from genscale.training.callbacks.progress import TrainProgress
    from genscale.training.callbacks.replaced import ReplacedSamples
    from genscale.training.callbacks.snapshots import EMASnapshots
    from genscale.training.callbacks.stop import GracefulStop
    from genscale.training.ema import PosthocEMA

    options = cfg.callbacks
    callbacks: list[Any] = [
        UpdateEMA(),
        FiniteGuard(max_in_row=options.max_bad_steps, every=options.log_every),
        ReplacedSamples(),
        log,
        TrainProgress(log),
        GracefulStop(every=options.log_every),
        *looks,
    ]
    if isinstance(module.ema_law, PosthocEMA):
        callbacks.append(EMASnapshots(folder, module.ema_law, log=log))
    callbacks.append(
        RunCheckpoint(
            folder,
            every=options.checkpoint_every,
            keep=options.keep_checkpoints,
            keep_every=options.keep_every,
            log=log,
        )
    )
    return callbacks


def _profiler(name: str | None, folder: RunFolder) -> Any:
    """Return Lightning's profiler of that name; its report goes into the run folder."""
    from lightning.pytorch import profilers

    known = {
        "simple": profilers.SimpleProfiler,
        "advanced": profilers.AdvancedProfiler,
        "pytorch": profilers.PyTorchProfiler,
    }
    if name is None:
        return None
    if name not in known:
        raise ConfigError(
            f"trainer.profiler must be one of {', '.join(known)}, but '{name}' was given."
            f"{did_you_mean(str(name), list(known))}"
        )
    return known[name](dirpath=folder.path, filename="profile")


def summarise(
    cfg: DictConfig, folder: RunFolder, module: Any, log: Any, **further: float | None
) -> None:
    """Write ``summary.json`` and the report of a finished run, and print where they are.

    Args:
        cfg: the composed config.
        folder: of the run.
        module: what was trained.
        log: of the run.
        further: numbers of this kind of run, by name.
    """
    from genscale.backbones.base import parameter_count
    from genscale.io.files import write_json
    from genscale.report import write_report

    summary = {
        "steps": module.step,
        "samples_seen": module.samples_seen,
        "seconds": round(log.seconds, 1),
        "device": str(module.device),
        "seed": cfg.seed,
        "parameters": parameter_count(module.model),
        "gflops": module.flops[""] / 1e9,
        "loss": log.latest.get("train/loss"),
        **further,
    }
    replaced = log.latest.get("train/replaced_samples")
    if replaced is not None:
        summary["replaced_samples"] = int(replaced)
    write_json(folder.path / "summary.json", summary)
    report = write_report(folder.path)
    print(json.dumps(summary))
    print(f"report: {shown(report)}")


def shown(path: Path) -> Path:
    """Return a path as a person would type it from here."""
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path
