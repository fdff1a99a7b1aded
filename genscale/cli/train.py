"""``python train.py``: compose, check, build, fit, and leave a run folder behind."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from genscale import dist
from genscale.cli.app import instantiate
from genscale.cli.numbers import number_problems
from genscale.errors import ConfigError, GenscaleError, ParallelError, did_you_mean
from genscale.runs import RunFolder, new_folder, newest_run, point_latest, remove_empty

# what may differ between a run and its continuation
FREE_ON_RESUME = ("trainer", "logger", "callbacks", "resume", "run_dir", "paths")
# whole numbers and the least allowed
_LEAST = {
    "seed": None,
    "batch_size": 1,
    "trainer.max_steps": 1,
    "trainer.num_nodes": 1,
    "trainer.accumulate_grad_batches": 1,
    "callbacks.log_every": 1,
    "callbacks.checkpoint_every": 0,
    "callbacks.keep_checkpoints": 1,
    "callbacks.keep_every": 0,
    "callbacks.sample_every": 0,
    "callbacks.sample_count": 1,
    "callbacks.metrics_every": 0,
    "callbacks.metrics_samples": 2,
    "callbacks.max_bad_steps": 1,
}
_RUN_DIR_VARIABLE = "GENSCALE_RUN_DIR"  # tells processes that Lightning starts where the run is


def run(cfg: DictConfig) -> None:
    """Train as configured; the run folder holds everything afterwards."""
    _quiet()
    with open_dict(cfg):
        cfg.name = cfg.name or _default_name(cfg)
    _forget_hydra()
    _find_problems(cfg)
    datamodule = instantiate(cfg.data, "data")
    _adopt_data(cfg, datamodule)
    folder, checkpoint = _locate(cfg)
    try:
        trainer, module, log = _assemble(cfg, datamodule, folder)
        _check_processes(trainer)
    except BaseException:
        if cfg.run_dir is None and cfg.resume is None:
            remove_empty(folder.path, Path(cfg.paths.outputs).expanduser().absolute())
        raise
    if trainer.is_global_zero:
        _begin(cfg, folder, module, datamodule, trainer, checkpoint, log)
    trainer.fit(
        module,
        datamodule=datamodule,
        ckpt_path=None if checkpoint is None else str(checkpoint),
        weights_only=True,
    )
    _end(cfg, folder, trainer, module, log)


def _quiet() -> None:
    """Keep Lightning's banners and advice for other kinds of training off the terminal."""
    import lightning.pytorch  # noqa: F401 - it sets its own levels on import

    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for text in (
        ".*does not have many workers.*",
        ".*lr_scheduler.step.*",
        ".*isinstance.treespec.*",
        ".*`training_step` returned `None`.*",
        ".*in eval mode at the start of training.*",
        ".*IterableDataset.*",
    ):
        warnings.filterwarnings("ignore", text)


def _default_name(cfg: DictConfig) -> str:
    """Return ``<model>_<data>`` as chosen on the command line."""
    from hydra.core.hydra_config import HydraConfig

    if HydraConfig.initialized():
        choices = HydraConfig.get().runtime.choices
        return f"{choices['model']}_{choices['data']}"
    return f"{cfg.model._target_.rpartition('.')[2].lower()}_{cfg.data.name}"


def _forget_hydra() -> None:
    """Make Lightning start further processes with the words that were typed.

    Where it sees Hydra at work, it puts settings of Hydra behind them, and other ones in every
    version.
    """
    from hydra.core.hydra_config import HydraConfig

    HydraConfig.instance().cfg = None  # Hydra restores it after the job


def _find_problems(cfg: DictConfig) -> None:
    """Raise one error that lists every problem that can be seen before anything is built."""
    import torch

    trainer = cfg.trainer
    problems = number_problems(cfg, _LEAST)
    if trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        problems.append(
            f"trainer.accelerator={trainer.accelerator} was given, but no CUDA device is present. "
            "Use trainer=cpu."
        )
    elif isinstance(trainer.devices, int) and not problems:
        parts = trainer.devices * trainer.num_nodes * trainer.accumulate_grad_batches
        if trainer.devices < 1 or cfg.batch_size % parts:
            problems.append(
                f"batch_size={cfg.batch_size} does not divide over trainer.devices="
                f"{trainer.devices} x trainer.num_nodes={trainer.num_nodes} x "
                f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}. "
                f"Give a positive multiple of {max(parts, 1)}."
            )
    share = cfg.condition_dropout
    if not isinstance(share, int | float) or not 0.0 <= share <= 1.0:
        problems.append(
            f"condition_dropout must be in [0, 1], but {share} was given. Give e.g. 0.1."
        )
    for path in ("data", "objective", "sampler", "guidance", "optim", "lr_schedule", "ema"):
        problems += _problem_of(partial(instantiate, cfg[path], path))
    if cfg.callbacks.metrics_every > 0:
        problems += instantiate(cfg.metrics, "metrics").check()
    for node in cfg.logger.values():
        problems += _problem_of(partial(_require_logger, node._target_.rpartition(".")[2]))
    if problems:
        raise ConfigError("\n".join(problems))


def _require_logger(package: str) -> None:
    from genscale.errors import require

    if package in ("tensorboard", "wandb"):
        require(package, what=f"logger={package}", extra=package)


def _problem_of(action: Callable[[], object]) -> list[str]:
    try:
        action()
    except (GenscaleError, ImportError, FileNotFoundError) as error:
        return [str(error)]
    return []


def _check_processes(trainer: Any) -> None:
    """Refuse processes that would each train alone in the same folder."""
    if dist.launched() not in (1, trainer.world_size):
        raise ParallelError(
            f"{dist.launched()} processes were started, but the trainer is set to "
            f"{trainer.world_size}. Give trainer=ddp, and trainer.devices= the processes of one "
            "machine."
        )


def _adopt_data(cfg: DictConfig, datamodule: Any) -> None:
    """Write what the data turned out to be into the config; the model's sizes follow from it."""
    known = ("channels", "resolution", "num_classes")
    with open_dict(cfg):
        for name in known:
            if name in cfg.data:
                cfg.data[name] = getattr(datamodule, name)
        cfg.data_info = {
            "name": datamodule.name,
            "size": len(datamodule.train),
            "num_classes": datamodule.num_classes,
            "class_names": list(datamodule.class_names),
            "fingerprint": datamodule.fingerprint(),
        }


def _locate(cfg: DictConfig) -> tuple[RunFolder, Path | None]:
    """Return the run folder and the checkpoint to continue from, if any."""
    outputs = Path(cfg.paths.outputs).expanduser()
    told = os.environ.get(_RUN_DIR_VARIABLE)
    if told and os.environ.get("LOCAL_RANK", "0") != "0":
        folder = RunFolder(Path(told))
    elif cfg.resume is not None:
        folder = _find_resumed(cfg, outputs)
    else:
        parent = (outputs / cfg.name).absolute()
        job = os.environ.get("SLURM_JOB_ID")
        if cfg.run_dir:
            folder = RunFolder(Path(cfg.run_dir).expanduser().absolute())
        elif job:
            folder = RunFolder(parent / f"slurm-{job}")
        else:
            folder = RunFolder(Path(dist.agree("run", lambda: str(new_folder(parent)))))
        if folder.checkpoints() and not job:
            raise ConfigError(
                f"run_dir={folder.path} already holds a run with checkpoints. "
                "Continue it with resume=latest, or give another run_dir."
            )
    os.environ[_RUN_DIR_VARIABLE] = str(folder.path)
    return folder, _checkpoint_to_resume(cfg, folder)


def _find_resumed(cfg: DictConfig, outputs: Path) -> RunFolder:
    if cfg.resume != "latest":
        path = Path(cfg.resume).expanduser()
        if not path.is_file():
            raise ConfigError(
                f"resume={cfg.resume} is no checkpoint file. Give resume=latest or the path of a "
                "checkpoints/step-*.ckpt file."
            )
        folder = RunFolder(path.resolve().parent.parent)
        if not folder.config_file.is_file():
            raise ConfigError(
                f"resume={cfg.resume} lies in no run folder: {folder.config_file} was expected. "
                "Give the checkpoint where its run left it, in <run>/checkpoints."
            )
        return folder
    if cfg.run_dir:
        return RunFolder.open(cfg.run_dir)
    found = newest_run(outputs / cfg.name)
    if found is None:
        raise ConfigError(
            f"resume=latest found no run named '{cfg.name}' in {outputs}. "
            "Start it without resume, or give its name= or run_dir=."
        )
    return found


def _checkpoint_to_resume(cfg: DictConfig, folder: RunFolder) -> Path | None:
    """Return the checkpoint to continue from after comparing the two configs key by key."""
    continued = cfg.resume is not None or bool(folder.checkpoints())
    if not continued:
        return None
    before = _flatten(folder.config())
    now = _flatten(OmegaConf.to_container(cfg, resolve=True))
    # shortest first: what others refer to is named before what follows from it
    for key in sorted({*before, *now}, key=lambda key: (key.count("."), key)):
        if key.split(".")[0] not in FREE_ON_RESUME and before.get(key) != now.get(key):
            raise ConfigError(
                f"The run in {folder.path} was started with {key}={before.get(key)}, but "
                f"{key}={now.get(key)} was given. Resume with the same value; only trainer, logger "
                "and callbacks may differ."
            )
    if cfg.resume not in (None, "latest"):
        return Path(cfg.resume).expanduser().resolve()
    # a run killed before its first checkpoint starts again in its folder
    return folder.checkpoint("latest") if folder.checkpoints() else None


def _flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(node, dict) and node:
        flat: dict[str, Any] = {}
        for name, value in node.items():
            flat |= _flatten(value, f"{prefix}{name}.")
        return flat
    return {prefix[:-1]: node}


def _assemble(cfg: DictConfig, datamodule: Any, folder: RunFolder) -> tuple[Any, Any, Any]:
    """Build trainer, module and log."""
    import torch

    from genscale.training.callbacks.log import TrainLog
    from genscale.training.module import GenerativeModule
    from genscale.training.run_log import RunLog

    torch.manual_seed(cfg.seed)  # initial weights; everything later is keyed
    module = GenerativeModule(
        model=instantiate(cfg.model, "model"),
        autoencoder=instantiate(cfg.autoencoder, "autoencoder"),
        objective=instantiate(cfg.objective, "objective"),
        optimizer=instantiate(cfg.optim, "optim"),
        lr_schedule=instantiate(cfg.lr_schedule, "lr_schedule"),
        ema=instantiate(cfg.ema, "ema"),
        batch_size=cfg.batch_size,
        condition_dropout=cfg.condition_dropout if datamodule.num_classes else 0.0,
        seed=cfg.seed,
        compile_blocks=cfg.compile,
    )
    log = TrainLog(
        RunLog(folder.metrics_file),
        every=cfg.callbacks.log_every,
        flops_per_sample=module.flops[""],
    )
    loggers = [
        instantiate(node, f"logger.{name}", save_dir=str(folder.path), name=folder.path.name)
        for name, node in cfg.logger.items()
    ]
    trainer = instantiate(
        OmegaConf.masked_copy(cfg.trainer, [key for key in cfg.trainer if key != "profiler"]),
        "trainer",
        profiler=_profiler(cfg.trainer.get("profiler"), folder),
        callbacks=_callbacks(cfg, datamodule, folder, module, log),
        logger=loggers or False,
        default_root_dir=str(folder.path),
        max_epochs=-1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=10**9,
    )
    return trainer, module, log


def _callbacks(
    cfg: DictConfig, datamodule: Any, folder: RunFolder, module: Any, log: Any
) -> list[Any]:
    """Return what happens beside the steps; the order matters, see each of them."""
    from genscale.training.callbacks.checkpoint import RunCheckpoint
    from genscale.training.callbacks.ema import UpdateEMA
    from genscale.training.callbacks.finite import FiniteGuard
    from genscale.training.callbacks.metrics import PeriodicMetrics
    from genscale.training.callbacks.progress import TrainProgress
    from genscale.training.callbacks.samples import SampleGrid
    from genscale.training.callbacks.stop import GracefulStop

    pipeline = module_pipeline(cfg, module)
    options = cfg.callbacks
    callbacks: list[Any] = [
        UpdateEMA(),
        FiniteGuard(max_in_row=options.max_bad_steps, every=options.log_every),
        log,
        TrainProgress(log),
        GracefulStop(every=options.log_every),
    ]
    if options.sample_every > 0:
        grid = SampleGrid(
            pipeline,
            folder,
            every=options.sample_every,
            count=options.sample_count,
            seed=cfg.seed,
            log=log,
        )
        callbacks.append(grid)
    if options.metrics_every > 0:
        from genscale.evaluation import periodic

        evaluate = periodic(instantiate(cfg.metrics, "metrics"), datamodule, seed=cfg.seed)
        callbacks.append(
            PeriodicMetrics(
                pipeline,
                evaluate,
                every=options.metrics_every,
                num_samples=options.metrics_samples,
                log=log,
            )
        )
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


def module_pipeline(cfg: DictConfig, module: Any) -> Any:
    """Return a pipeline over the module's own average: it always samples the current one."""
    from genscale.pipeline import GenerationPipeline

    return GenerationPipeline(
        model=module.ema,
        autoencoder=module.autoencoder,
        objective=module.objective,
        sampler=instantiate(cfg.sampler, "sampler"),
        guidance=instantiate(cfg.guidance, "guidance"),
        num_classes=int(cfg.data_info.num_classes or 0),
        class_names=tuple(cfg.data_info.class_names),
    )


def _begin(
    cfg: DictConfig,
    folder: RunFolder,
    module: Any,
    datamodule: Any,
    trainer: Any,
    checkpoint: Path | None,
    log: Any,
) -> None:
    """Write the run folder's first files and tell the user what is about to happen."""
    from rich.console import Console

    from genscale.io.files import atomic_write, write_json
    from genscale.runs import environment
    from genscale.training.summary import print_arithmetic, print_model

    folder.path.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder.config_file) as temporary:
        temporary.write_text(OmegaConf.to_yaml(cfg, resolve=True))
    write_json(folder.path / "env.json", environment())
    point_latest(Path(cfg.paths.outputs).expanduser(), folder.path)
    console = Console(stderr=True)
    print_model(console, module.model, module.flops)
    print_arithmetic(
        console,
        batch_size=cfg.batch_size,
        world_size=trainer.world_size,
        accumulate=trainer.accumulate_grad_batches,
        max_steps=trainer.max_steps,
        data_size=len(datamodule.train),
        run_dir=_shown(folder.path),
        resume=checkpoint,
    )


def _end(cfg: DictConfig, folder: RunFolder, trainer: Any, module: Any, log: Any) -> None:
    """Export, summarise, and say how to go on; a stopped run exits with its signal's status."""
    from genscale.training.callbacks.stop import GracefulStop

    stopped = next((c.received for c in trainer.callbacks if isinstance(c, GracefulStop)), None)
    if trainer.is_global_zero:
        if stopped:
            print(
                f"stopped at step {module.step} with a checkpoint; continue with: "
                "the same command and resume=latest"
            )
        else:
            _export(cfg, folder, trainer, module, log)
    # of the other processes it is no failure: Lightning would kill the first one for it
    if stopped and trainer.is_global_zero:
        raise SystemExit(128 + stopped)


def _export(cfg: DictConfig, folder: RunFolder, trainer: Any, module: Any, log: Any) -> None:
    from genscale.backbones.base import parameter_count
    from genscale.io.files import write_json
    from genscale.report import write_report

    config = OmegaConf.to_container(cfg, resolve=True)
    module_pipeline(cfg, module).save_pretrained(folder.path / "export", config)
    summary = {
        "steps": module.step,
        "samples_seen": module.samples_seen,
        "seconds": round(log.seconds, 1),
        "device": str(module.device),
        "seed": cfg.seed,
        "parameters": parameter_count(module.model),
        "gflops": module.flops[""] / 1e9,
        "loss": log.latest.get("train/loss"),
    }
    write_json(folder.path / "summary.json", summary)
    report = write_report(folder.path)
    shown = _shown(folder.path)
    print(json.dumps(summary))
    print(f"report: {_shown(report)}")
    print(f"sample:   python sample.py run={shown} num_samples=64 guidance.scale=2")
    print(f"evaluate: python evaluate.py run={shown} num_samples=500")


def _shown(path: Path) -> Path:
    """Return a path as a person would type it from here."""
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path
