"""Training runs of upscalers: what is refused, how they are assembled, what they leave behind."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from genscale.cli.app import instantiate
from genscale.cli.fitting import shown, summarise
from genscale.cli.startup import problem_of
from genscale.runs import RunFolder

if TYPE_CHECKING:
    from genscale.training.upscaling import UpscalerRecipe, UpscalerTraining

_ROOM = "genscale.upscaling."
# class of the model -> its objective, and the class of that
_RECIPES = {
    "LUA": ("lua", "LatentUpscaling"),
    "SwinIR": ("super_resolution", "SuperResolution"),
    "ESPCN": ("super_resolution", "SuperResolution"),
    "WDSR": ("super_resolution", "SuperResolution"),
    "IRN": ("rescaling", "Rescaling"),
    "IARN": ("arbitrary_rescaling", "ArbitraryRescaling"),
}
_BIJECTIONS = {"IRN", "IARN"}
_MODELS = "model=lua, swinir, espcn, wdsr, irn or iarn"
_OBJECTIVES = {name for _, name in _RECIPES.values()}


def trains_enlarger(cfg: DictConfig) -> bool:
    """Return whether a run trains an upscaler: its model says so, or its objective."""
    model = str(OmegaConf.select(cfg, "model._target_"))
    objective = str(OmegaConf.select(cfg, "objective._target_")).rpartition(".")[2]
    return model.startswith(_ROOM) or objective in _OBJECTIVES


def enlarger_problems(cfg: DictConfig) -> list[str]:
    """Return a sentence for every part of the config that does not go with such a run."""
    model = str(OmegaConf.select(cfg, "model._target_"))
    name = model.rpartition(".")[2]
    objective = str(cfg.objective._target_).rpartition(".")[2]
    if not model.startswith(_ROOM):
        return [
            f"objective={objective} trains an upscaler, but {name} is none. Give {_MODELS}, or "
            "another objective=..."
        ]
    if name not in _RECIPES:
        return [f"model._target_={model} cannot be trained. Give {_MODELS}."]
    option, recipe = _RECIPES[name]
    problems = []
    if objective != recipe:
        problems.append(
            f"objective={objective} does not train {name}. Give objective={option}, or leave it "
            "out."
        )
    if name != "LUA" and not str(cfg.autoencoder._target_).endswith(".Identity"):
        problems.append(
            f"{name} enlarges pictures, but an autoencoder was given with autoencoder=... Leave "
            "it out, or give model=lua, which enlarges latents."
        )
    precision = str(cfg.trainer.get("precision", ""))
    if name in _BIJECTIONS and precision not in ("32-true", "32", "64-true"):
        problems.append(
            f"trainer.precision={precision} was given, but the inverse of {name} is none "
            "in half precision. Give trainer.precision=32-true."
        )
    return problems + trainer_problems(cfg, name)


def picture_problems(cfg: DictConfig, datamodule: Any, recipe: UpscalerRecipe | None) -> list[str]:
    """Return a sentence for everything of data and autoencoder that an upscaler cannot learn from.

    Args:
        cfg: the composed config.
        datamodule: built from it.
        recipe: None where it could not be built, which is told elsewhere.
    """
    from genscale.data.latents import LatentDataModule

    if isinstance(datamodule, LatentDataModule):
        return [
            f"data={datamodule.name} are latents, but an upscaler learns from pictures, which it "
            "makes small itself. Give the data they were made of."
        ]
    if datamodule.num_frames:
        return [
            f"data={datamodule.name} holds clips, but upscalers are trained on pictures. Give "
            "data=emoji, say."
        ]
    latent = str(cfg.model._target_).endswith(".LUA")
    problems: list[str] = []
    stride = 1
    if latent:
        built: dict[str, Any] = {}

        def build() -> None:
            built["autoencoder"] = instantiate(cfg.autoencoder, "autoencoder")

        problems += problem_of(build)
        if not problems:
            autoencoder = built["autoencoder"]
            stride = autoencoder.downsample
            problems += _autoencoder_problems(autoencoder, datamodule.channels)
    if recipe is None or problems:
        return problems
    side = recipe.side(datamodule.resolution)
    name = "data.resolution" if recipe.patch_size is None else "objective.patch_size"
    if side > datamodule.resolution:
        return [
            f"objective.patch_size={side} is larger than the data's pictures of "
            f"{datamodule.resolution} pixels. Give at most that."
        ]
    scales = OmegaConf.select(cfg, "model.scales") or [OmegaConf.select(cfg, "model.scale") or 1]
    for scale in scales:
        for given, what in ((side, name), (datamodule.resolution, "data.resolution")):
            if given % (scale * stride):
                cells = f" times the autoencoder's {stride} pixels a cell" if stride > 1 else ""
                problems.append(
                    f"{what}={given} does not divide by the scale {scale}{cells}. Give a multiple "
                    f"of {scale * stride}."
                )
    if getattr(recipe, "encode_once", False) and datamodule.flip:
        problems.append(
            "objective.encode_once=true keeps the latents of pictures as they are, but data.flip="
            "true mirrors them at every step. Give data.flip=false."
        )
    return list(dict.fromkeys(problems))


def _autoencoder_problems(autoencoder: Any, channels: int) -> list[str]:
    from genscale.cli.autoencoding import channel_problems

    if autoencoder.temporal_downsample is not None:
        return [
            "The autoencoder takes clips, but upscalers are trained on pictures. Give an "
            "autoencoder=... of pictures."
        ]
    if autoencoder.downsample == 1:
        return [
            "model=lua enlarges latents, but the autoencoder leaves pictures as they are. Train "
            "one with: python train.py model=kl_small data=<the same>, and give autoencoder=run "
            "autoencoder.run=<its folder>."
        ]
    return autoencoder.check(encodes=True, decodes=True) or channel_problems(autoencoder, channels)


def trainer_problems(cfg: DictConfig, name: str) -> list[str]:
    """Return a sentence for every part of the config that is for backbones alone.

    Args:
        cfg: the composed config.
        name: of the model's class.
    """
    problems = []
    if cfg.sampler.get("_target_"):
        problems.append(f"{name} is not sampled from. Leave sampler=... out.")
    for key in ("compile", "checkpoint_blocks"):
        if cfg[key]:
            problems.append(f"{key}=true is not known to the training of {name}. Leave it out.")
    if "FullySharded" in str(OmegaConf.select(cfg, "trainer.strategy._target_")):
        problems.append(
            f"trainer=fsdp shards a backbone's blocks, but {name} is trained whole on every "
            "device. Give trainer=ddp."
        )
    if str(cfg.trainer.get("precision", "")).startswith("16"):
        problems.append(
            f"trainer.precision={cfg.trainer.precision} needs a gradient scaler, which {name} is "
            "trained without. Give bf16-mixed or 32-true."
        )
    return problems


def build_enlarger(cfg: DictConfig) -> UpscalerTraining:
    """Build network and training."""
    recipe: UpscalerRecipe = instantiate(cfg.objective, "objective")
    autoencoder = instantiate(cfg.autoencoder, "autoencoder")
    network = instantiate(cfg.model, "model")
    return recipe.build(network, seed=cfg.seed, autoencoder=autoencoder)


def prepare_enlarger(module: Any, datamodule: Any) -> Any:
    """Measure latents and count operations; return what a network makes of pictures."""
    from genscale.training.upscaler_run import enlarge_first, prepare
    from genscale.training.upscaling import count_upscaler_flops

    training = module.trainable
    prepare(training, datamodule)
    shape = training.input_shape(datamodule.resolution)
    module.flops = count_upscaler_flops(module.model, shape)
    module.model.sample_shape = shape  # networks take any; the summary tells that of training
    return partial(enlarge_first, training)


def facts_writer(module: Any, datamodule: Any, folder: RunFolder) -> Any:
    """Return what writes ``upscaler.json`` as training starts."""
    from genscale.training.upscaler_run import WriteFacts

    return WriteFacts(folder, module.trainable.facts(data=datamodule.name))


def export_enlarger(cfg: DictConfig, folder: RunFolder, module: Any, log: Any) -> None:
    """Write ``export/``, ``summary.json`` and the report, and say how to go on."""
    from genscale.training.upscaler_run import export_upscaler

    facts = export_upscaler(folder, folder.path / "export")
    psnr = {k.rpartition("/")[2]: v for k, v in log.latest.items() if k.startswith("train/psnr")}
    summarise(cfg, folder, module, log, **psnr)
    place = shown(folder.path)
    option = type(module.model).__name__.lower()
    print(f"evaluate: python evaluate.py run={place}")
    print(f"look:     python sample.py run={place} num_samples=16")
    print(
        f"enlarge:  python sample.py run=<a generator> upscaling={option} upscaling.run={place} "
        f"upscaling.scale={facts.scales[0]}"
    )
