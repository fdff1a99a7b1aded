"""``python train.py``: compose, check, build, fit, and leave a run folder behind."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from genscale import dist
from genscale.cli.app import instantiate
from genscale.cli.autoencoding import settle_autoencoder
from genscale.cli.bucketing import check_shapes
from genscale.cli.fitting import build_trainer, shown, summarise, train_log, usual_callbacks
from genscale.cli.placing import locate
from genscale.cli.sample import label_law
from genscale.cli.startup import (
    adopt_data,
    check,
    check_processes,
    default_name,
    forget_hydra,
    quiet_lightning,
)
from genscale.cli.texting import text_cache
from genscale.cli.trainables import (
    assemble_trainable,
    check_trainable,
    export_trainable,
    is_trainable,
)
from genscale.errors import ConfigError
from genscale.runs import RunFolder, point_latest, remove_empty


def run(cfg: DictConfig) -> None:
    """Train as configured; the run folder holds everything afterwards."""
    quiet_lightning()
    with open_dict(cfg):
        cfg.name = cfg.name or default_name(cfg)
    forget_hydra()
    settle_autoencoder(cfg)
    of_backbone = not is_trainable(cfg)
    datamodule = check(cfg) if of_backbone else check_trainable(cfg)
    adopt_data(cfg, datamodule)
    folder, checkpoint = locate(cfg)
    try:
        assemble = _assemble if of_backbone else assemble_trainable
        trainer, module, log = assemble(cfg, datamodule, folder)
        check_processes(trainer)
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
    _end(cfg, folder, trainer, module, log, _export if of_backbone else export_trainable)


def _assemble(cfg: DictConfig, datamodule: Any, folder: RunFolder) -> tuple[Any, Any, Any]:
    """Build trainer, module and log."""
    import torch

    from genscale.training.module import GenerativeModule

    text = text_cache(cfg)
    datamodule.with_captions = text is not None
    torch.manual_seed(cfg.seed)  # initial weights; everything later is keyed
    module = GenerativeModule(
        model=_model(cfg),
        autoencoder=instantiate(cfg.autoencoder, "autoencoder"),
        objective=instantiate(cfg.objective, "objective"),
        optimizer=instantiate(cfg.optim, "optim"),
        lr_schedule=instantiate(cfg.lr_schedule, "lr_schedule"),
        ema=instantiate(cfg.ema, "ema"),
        batch_size=cfg.batch_size,
        condition_dropout=cfg.condition_dropout if datamodule.num_classes or text else 0.0,
        seed=cfg.seed,
        text=text,
        low_resolution=instantiate(cfg.low_resolution, "low_resolution"),
        compile_blocks=cfg.compile,
        checkpoint_blocks=cfg.checkpoint_blocks,
    )
    check_shapes(datamodule, module.model, module.autoencoder)
    log = train_log(cfg, folder, module.flops[""])
    callbacks = _callbacks(cfg, datamodule, folder, module, log)
    trainer = build_trainer(cfg, folder, callbacks)
    return trainer, module, log


def _model(cfg: DictConfig) -> Any:
    """Build the backbone; a process that will be sent its shards of it needs no weights now."""
    import torch

    sharded = str(OmegaConf.select(cfg, "trainer.strategy._target_")).endswith(".FullySharded")
    with torch.device("meta") if sharded and not dist.may_be_first() else nullcontext():
        return instantiate(cfg.model, "model")


def _callbacks(
    cfg: DictConfig, datamodule: Any, folder: RunFolder, module: Any, log: Any
) -> list[Any]:
    """Return what happens beside the steps; the order matters, see each of them."""
    from genscale.cascade import ReducedData
    from genscale.training.callbacks.metrics import PeriodicMetrics
    from genscale.training.callbacks.samples import SampleGrid

    pipeline = module_pipeline(cfg, module)
    if pipeline.low_resolution is not None:
        held_out = datamodule.train if datamodule.heldout is None else datamodule.heldout
        pipeline.references = ReducedData(held_out, pipeline.low_resolution)
    pipeline.ready(pipeline.guidance)  # what it names is read now, not at the first grid
    options = cfg.callbacks
    looks: list[Any] = []
    if options.sample_every > 0:
        grid = SampleGrid(
            pipeline,
            folder,
            every=options.sample_every,
            count=options.sample_count,
            seed=cfg.seed,
            log=log,
        )
        looks.append(grid)
    if options.metrics_every > 0:
        from genscale.evaluation import periodic

        evaluate = periodic(
            instantiate(cfg.metrics, "metrics"),
            datamodule,
            seed=cfg.seed,
            labels=label_law(cfg.evaluation),
        )
        looks.append(
            PeriodicMetrics(
                pipeline,
                evaluate,
                every=options.metrics_every,
                num_samples=options.metrics_samples,
                log=log,
            )
        )
    return usual_callbacks(cfg, folder, module, log, looks)


def module_pipeline(cfg: DictConfig, module: Any) -> Any:
    """Return a pipeline over the module's own average: it always samples the current one."""
    from genscale.loading import facts_of
    from genscale.pipeline import GenerationPipeline

    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    pipeline = GenerationPipeline(
        model=module.ema,
        autoencoder=module.autoencoder,
        objective=module.objective,
        sampler=instantiate(cfg.sampler, "sampler"),
        guidance=instantiate(cfg.guidance, "guidance"),
        text=module.text,
        **facts_of(config["data_info"]),
    )
    pipeline.config = config
    _guide_by_own_average(pipeline, module)
    return pipeline


def _guide_by_own_average(pipeline: Any, module: Any) -> None:
    """Let autoguidance without another run lead away from a further average, as it is now."""
    from genscale.guidance.autoguidance import Autoguidance
    from genscale.io.weights import check_choice
    from genscale.weak_models import WeakModel

    if not isinstance(pipeline.guidance, Autoguidance) or pipeline.guidance.settings.run:
        return
    settings = pipeline.guidance.settings
    networks = module.averages()
    del networks["ema"]
    if settings.checkpoint is not None:
        raise ConfigError(
            f"guidance.weak_checkpoint={settings.checkpoint} was given without guidance.weak_run, "
            "but a run that is only starting has no checkpoints. Give guidance.weak_run=<folder>."
        )
    if not networks:
        raise ConfigError(
            "Autoguidance during training leads away from another run or another average, but "
            "there is neither. Give guidance.weak_run=<folder>, or ema=several and "
            "guidance.weak_weights=<one of them>; or give guidance=autoguidance to sample.py alone."
        )
    check_choice("guidance.weak_weights, without guidance.weak_run,", settings.weights, networks)
    name = settings.weights
    pipeline.weak_models.add(settings, WeakModel(networks[name], module.objective, f"own {name}"))


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
        accumulate=cfg.trainer.accumulate_grad_batches,
        max_steps=trainer.max_steps,
        data_size=len(datamodule.train),
        run_dir=shown(folder.path),
        resume=checkpoint,
    )


def _end(
    cfg: DictConfig, folder: RunFolder, trainer: Any, module: Any, log: Any, export: Any
) -> None:
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
            export(cfg, folder, trainer, module, log)
    # of the other processes it is no failure: Lightning would kill the first one for it
    if stopped and trainer.is_global_zero:
        raise SystemExit(128 + stopped)


def _export(cfg: DictConfig, folder: RunFolder, trainer: Any, module: Any, log: Any) -> None:
    from genscale.pipeline import GenerationPipeline

    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    # the last checkpoint: there, the weights are whole whatever the strategy
    pipeline = GenerationPipeline.from_run(folder.path, device="cpu")
    pipeline.save_pretrained(folder.path / "export", config)
    summarise(cfg, folder, module, log)
    place = shown(folder.path)
    print(f"sample:   python sample.py run={place} num_samples=64 guidance.scale=2")
    print(f"evaluate: python evaluate.py run={place} num_samples={cfg.evaluation.num_samples}")
