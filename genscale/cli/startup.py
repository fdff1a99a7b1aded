"""Before anything is built: a quiet terminal, and every problem that can be seen, at once."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from omegaconf import DictConfig, open_dict

from genscale import dist
from genscale.cli.app import instantiate
from genscale.cli.autoencoding import autoencoder_problems
from genscale.cli.cascading import reference_problems
from genscale.cli.combinations import combination_problems, frame_problems
from genscale.cli.numbers import number_problems
from genscale.cli.sample import label_law
from genscale.cli.texting import caption_problems, example_captions, pairing_problems
from genscale.conditioning.labels import labels_for
from genscale.errors import ConfigError, GenscaleError, ParallelError, require

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
    "evaluation.num_samples": 1,
}


def quiet_lightning() -> None:
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
        ".*returned a view tensor.*",  # of a sharded model, for whom writes into its output
    ):
        warnings.filterwarnings("ignore", text)


def cluster_plugins() -> list[Any]:
    """Return how Lightning finds the processes that SLURM started; empty where it did not.

    Lightning's own answer to SIGUSR1, a checkpoint of another name and ``scontrol requeue``, is
    left out: the run stops by itself, and the batch script asks for the job to come again.
    """
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    if TorchElasticEnvironment.detect() or not SLURMEnvironment.detect():
        return []
    return [SLURMEnvironment(auto_requeue=False)]


def default_name(cfg: DictConfig) -> str:
    """Return ``<model>_<data>`` as chosen on the command line."""
    from hydra.core.hydra_config import HydraConfig

    if HydraConfig.initialized():
        choices = HydraConfig.get().runtime.choices
        return f"{choices['model']}_{choices['data']}"
    return f"{cfg.model._target_.rpartition('.')[2].lower()}_{cfg.data.name}"


def forget_hydra() -> None:
    """Make Lightning start further processes with the words that were typed.

    Where it sees Hydra at work, it puts settings of Hydra behind them, and other ones in every
    version.
    """
    from hydra.core.hydra_config import HydraConfig

    HydraConfig.instance().cfg = None  # Hydra restores it after the job


def settings_problems(cfg: DictConfig) -> list[str]:
    """Return a sentence for every number out of range, device not there, or batch not dividing."""
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
    return problems


def check(cfg: DictConfig) -> Any:
    """Raise one error that lists every problem that can be seen before a model is built.

    Returns:
        the data module: reading the data is part of the check, and is done once.
    """
    problems = settings_problems(cfg)
    share = cfg.condition_dropout
    if not isinstance(share, int | float) or not 0.0 <= share <= 1.0:
        problems.append(
            f"condition_dropout must be in [0, 1], but {share} was given. Give e.g. 0.1."
        )
    built: dict[str, Any] = {}
    of_parts: list[str] = []
    paths = ("objective", "sampler", "guidance", "optim", "lr_schedule", "ema", "text_encoder")
    for path in (*paths, "low_resolution"):
        if path == "sampler" and _awaits_frames(cfg):
            continue
        of_parts += problem_of(partial(_build_into, built, cfg, path))
    fitting = (built.get(path) for path in ("objective", "guidance", "sampler"))
    misfits = combination_problems(cfg.model, *fitting)
    if "text_encoder" in built:
        misfits += pairing_problems(cfg.model, built["text_encoder"])
    if misfits:  # the data need not be read to say so
        raise ConfigError("\n".join([*problems, *of_parts, *misfits]))
    problems += problem_of(partial(_build_into, built, cfg, "data")) + of_parts
    if "data" in built:
        problems += problem_of(partial(_check_labels, cfg, built["data"].num_classes or 0))
        in_latents = cfg.autoencoder.get("temporal_downsample") is not None
        problems += frame_problems(cfg.model, built["data"], in_latents=in_latents)
        problems += reference_problems(cfg.model, built.get("low_resolution"), built["data"])
        problems += problem_of(partial(_check_autoencoder, cfg, built["data"]))
        if "text_encoder" in built and built["text_encoder"].token_size:
            problems += caption_problems(built["text_encoder"], built["data"])
    if cfg.callbacks.metrics_every > 0:
        suite = instantiate(cfg.metrics, "metrics")
        problems += suite.check(num_samples=cfg.callbacks.metrics_samples)
    problems += logger_problems(cfg)
    if problems:
        raise ConfigError("\n".join(problems))
    return built["data"]


def _build_into(parts: dict[str, Any], cfg: DictConfig, path: str) -> None:
    parts[path] = instantiate(cfg[path], path)


def _awaits_frames(cfg: DictConfig) -> bool:
    """Return whether the sampler makes clips of a length that the data have yet to tell."""
    asks = "trained_frames" in cfg.sampler and cfg.sampler.trained_frames is None
    return asks and "num_frames" in cfg.data and cfg.data.num_frames is None


def _check_labels(cfg: DictConfig, num_classes: int) -> None:
    import torch

    labels_for(label_law(cfg.evaluation), torch.arange(1), num_classes=num_classes, seed=0)


def _check_autoencoder(cfg: DictConfig, datamodule: Any) -> None:
    problems = autoencoder_problems(cfg, datamodule)
    if problems:
        raise ConfigError("\n".join(problems))


def logger_problems(cfg: DictConfig) -> list[str]:
    """Return a sentence for every logger whose package is not installed."""
    packages = [node._target_.rpartition(".")[2] for node in cfg.logger.values()]
    return [text for name in packages for text in problem_of(partial(_require_logger, name))]


def _require_logger(package: str) -> None:
    if package in ("tensorboard", "wandb"):
        require(package, what=f"logger={package}", extra=package)


def problem_of(action: Callable[[], object]) -> list[str]:
    """Return the sentence of what an action raises; an empty list where it succeeds."""
    try:
        action()
    except (GenscaleError, ImportError, FileNotFoundError) as error:
        return [str(error)]
    return []


def check_processes(trainer: Any) -> None:
    """Refuse processes that would each train alone in the same folder."""
    if dist.launched() not in (1, trainer.world_size):
        raise ParallelError(
            f"{dist.launched()} processes were started, but the trainer is set to "
            f"{trainer.world_size}. Give trainer=ddp, and trainer.devices= the processes of one "
            "machine."
        )


def adopt_data(cfg: DictConfig, datamodule: Any) -> None:
    """Write what the data turned out to be into the config; the model's sizes follow from it."""
    known = ("channels", "resolution", "num_frames", "num_classes")
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
        if datamodule.num_frames:  # runs of pictures compare as before there were clips
            cfg.data_info.num_frames = datamodule.num_frames
            cfg.data_info.frame_rate = datamodule.frame_rate
        examples = example_captions(datamodule)
        if examples is not None:
            cfg.data_info.example_captions = examples
