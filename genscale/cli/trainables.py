"""Training runs of what is no backbone: checked, assembled and exported."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from genscale.cli.app import instantiate
from genscale.cli.bucketing import no_buckets
from genscale.cli.enlargers import (
    build_enlarger,
    enlarger_problems,
    export_enlarger,
    facts_writer,
    picture_problems,
    prepare_enlarger,
    trainer_problems,
    trains_enlarger,
)
from genscale.cli.fitting import build_trainer, shown, summarise, train_log, usual_callbacks
from genscale.cli.startup import logger_problems, problem_of, settings_problems
from genscale.errors import ConfigError
from genscale.runs import RunFolder

if TYPE_CHECKING:
    from genscale.training.trainable import TrainableRecipe

_ROOM = "genscale.autoencoders."
_RECIPES = {"MSVQ": "reconstruction", "KLNetwork": "reconstruction_kl"}
_CARRIED_OUT_HERE = ("gradient_clip_val", "accumulate_grad_batches")


def is_trainable(cfg: DictConfig) -> bool:
    """Return whether a run trains no backbone: its model says so, or its objective."""
    from genscale.training.autoencoder_run import trains_autoencoder

    model = str(OmegaConf.select(cfg, "model._target_"))
    if model.startswith(_ROOM) or trains_autoencoder({"objective": cfg.objective}):
        return True
    return trains_enlarger(cfg)


def check_trainable(cfg: DictConfig) -> Any:
    """Raise one error that lists every problem that can be seen before a network is built.

    Returns:
        the data module: reading the data is part of the check, and is done once.
    """
    enlarges = trains_enlarger(cfg)
    misfits = enlarger_problems(cfg) if enlarges else _combination_problems(cfg)
    problems = settings_problems(cfg) + misfits
    if problems:
        raise ConfigError("\n".join(problems))
    built: dict[str, Any] = {}

    def build(path: str) -> None:
        built[path] = instantiate(cfg[path], path)

    for path in ("objective", "optim", "lr_schedule", "ema", "data"):
        problems += problem_of(partial(build, path))
    if "objective" in built:
        problems += built["objective"].check()
    if "data" in built and enlarges:
        problems += picture_problems(cfg, built["data"], built.get("objective"))
    elif "data" in built:
        problems += _data_problems(built["data"], built.get("objective"))
    if "data" in built:
        name = str(OmegaConf.select(cfg, "model._target_")).rpartition(".")[2]
        problems += no_buckets(built["data"], name)
    problems += logger_problems(cfg)
    if problems:
        raise ConfigError("\n".join(problems))
    return built["data"]


def _combination_problems(cfg: DictConfig) -> list[str]:
    """Return a sentence for every part of the config that does not go with such a run."""
    from genscale.training.autoencoder_run import trains_autoencoder

    problems = []
    model = str(OmegaConf.select(cfg, "model._target_"))
    name = model.rpartition(".")[2]
    if not model.startswith(_ROOM):
        return [
            f"objective={cfg.objective._target_.rpartition('.')[2]} trains an autoencoder, but "
            f"{name} is none. Give model=msvq or model=kl_small, or another objective=..."
        ]
    recipe = _RECIPES.get(name)
    if recipe is None:
        return [f"model._target_={model} cannot be trained. Give model=msvq or model=kl_small."]
    if not trains_autoencoder({"objective": cfg.objective}):
        problems.append(
            f"objective={str(cfg.objective._target_).rpartition('.')[2]} trains a generative "
            f"model, but {name} is an autoencoder. Give objective={recipe}."
        )
    if not str(cfg.autoencoder._target_).endswith(".Identity"):
        problems.append(
            f"{name} is an autoencoder itself, and learns from pixels, but another one was given "
            "with autoencoder=... Leave it out."
        )
    return problems + trainer_problems(cfg, name)


def _data_problems(datamodule: Any, recipe: TrainableRecipe | None) -> list[str]:
    """Return a sentence where the data are no pictures, or too small for the discriminator."""
    from genscale.data.latents import LatentDataModule
    from genscale.training.reconstruction import ReconstructionRecipe

    if isinstance(datamodule, LatentDataModule):
        return [
            f"data={datamodule.name} are latents that another autoencoder has made, but an "
            "autoencoder learns from pictures. Give the data they were made of."
        ]
    if isinstance(recipe, ReconstructionRecipe) and recipe.adversarial_weight > 0:
        least = 2**recipe.discriminator_layers
        if datamodule.resolution < least:
            return [
                f"objective.discriminator_layers={recipe.discriminator_layers} needs pictures of "
                f"{least} pixels a side, but data.resolution={datamodule.resolution}. Give fewer "
                "layers."
            ]
    return []


def assemble_trainable(cfg: DictConfig, datamodule: Any, folder: RunFolder) -> tuple[Any, Any, Any]:
    """Build trainer, module and log."""
    import torch

    from genscale.training.callbacks.reconstructions import Reconstructions
    from genscale.training.trainable_module import TrainableModule

    torch.manual_seed(cfg.seed)  # initial weights; everything later is keyed
    accumulate = int(cfg.trainer.accumulate_grad_batches)
    enlarges = trains_enlarger(cfg)
    module = TrainableModule(
        trainable=build_enlarger(cfg) if enlarges else _build_autoencoder(cfg),
        optimizer=instantiate(cfg.optim, "optim"),
        lr_schedule=instantiate(cfg.lr_schedule, "lr_schedule"),
        ema=instantiate(cfg.ema, "ema"),
        batch_size=cfg.batch_size,
        gradient_clip=cfg.trainer.get("gradient_clip_val"),
        accumulate=accumulate,
        seed=cfg.seed,
    )
    datamodule.accumulate = accumulate
    prepare = prepare_enlarger if enlarges else _prepare_autoencoder
    make = prepare(module, datamodule)
    log = train_log(cfg, folder, module.flops[""])
    options = cfg.callbacks
    looks: list[Any] = [
        Reconstructions(
            datamodule.heldout or datamodule.train,
            folder,
            grid_every=options.sample_every,
            grid_count=options.sample_count,
            metrics_every=options.metrics_every,
            metrics_count=options.metrics_samples,
            log=log,
            make=make,
        )
    ]
    if enlarges:
        looks.append(facts_writer(module, datamodule, folder))
    callbacks = usual_callbacks(cfg, folder, module, log, looks)
    trainer = build_trainer(cfg, folder, callbacks, without=_CARRIED_OUT_HERE)
    return trainer, module, log


def _build_autoencoder(cfg: DictConfig) -> Any:
    recipe: TrainableRecipe = instantiate(cfg.objective, "objective")
    return recipe.build(instantiate(cfg.model, "model"), seed=cfg.seed)


def _prepare_autoencoder(module: Any, datamodule: Any) -> Any:
    """Count operations; return what the network makes of pictures."""
    from genscale.training.autoencoder_run import count_flops, reconstruct

    module.flops = count_flops(module.model, datamodule.channels, datamodule.resolution)
    return reconstruct


def export_trainable(
    cfg: DictConfig, folder: RunFolder, trainer: Any, module: Any, log: Any
) -> None:
    """Write ``export/``, ``summary.json`` and the report, and say how to go on."""
    if trains_enlarger(cfg):
        export_enlarger(cfg, folder, module, log)
        return
    from genscale.training.autoencoder_run import load_autoencoder, save_autoencoder

    network, _ = load_autoencoder(folder.path, device="cpu")
    datamodule = trainer.datamodule
    save_autoencoder(network, folder.path / "export", datamodule, finish=module.trainable.finish)
    summarise(cfg, folder, module, log, psnr=log.latest.get("train/psnr"))
    place = shown(folder.path)
    print(f"evaluate: python evaluate.py run={place}")
    print(f"reconstruct: python sample.py run={place} num_samples=64")
    group = "msvq" if type(network).__name__ == "MSVQ" else "kl_small"
    model = "var" if group == "msvq" else "dimr"
    choice = cfg.data_info.name
    print(
        f"train on its latents: python train.py model={model} autoencoder={group} "
        f"autoencoder.run={place} data={choice}"
    )
