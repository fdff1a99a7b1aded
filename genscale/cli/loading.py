"""A run read back by the command line: its pipeline, with sampler and guidance as asked."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from genscale.assembly import build
from genscale.cli.app import instantiate
from genscale.cli.cascading import place_references
from genscale.cli.combinations import combination_problems
from genscale.cli.resolvers import frames_of
from genscale.conditioning.text import fit_problems
from genscale.errors import ConfigError
from genscale.guidance.autoguidance import Autoguidance
from genscale.pipeline import GenerationPipeline, exported_config
from genscale.resolution.applicability import refusal
from genscale.resolution.presets import NoScaling, Preset
from genscale.resolution.sampling import sampler_refusal
from genscale.run_weights import is_exported
from genscale.runs import RunFolder, new_folder
from genscale.sample_conditions import check_frame_rate
from genscale.sizes import size_hint
from genscale.text_cache import TextCache
from genscale.upscaling.choice import UpscalingChoice

_NEXT_SCALE = "genscale.samplers.next_scale.NextScale"
_BLOCKS = "genscale.samplers.blocks.Blocks"
_BY_SCALE = "genscale.guidance.scale_wise.ScaleGuidance"


def inherit(
    node: DictConfig, own: dict[str, Any], *, unguided: str = "genscale.guidance.cfg.ClassifierFree"
) -> dict[str, Any]:
    """Return the run's own settings with the numbers given on the command line put in.

    ``sampler=run sampler.steps=30`` changes the steps of the run's sampler; a group that names a
    ``_target_`` replaces the run's settings altogether. ``unguided`` is what guides where numbers
    are given to a run without guidance.
    """
    given: dict[str, Any] = OmegaConf.to_container(node, resolve=True)  # type: ignore[assignment]
    if given.get("_target_"):
        return given
    changes = {name: value for name, value in given.items() if value is not None}
    if changes and own["_target_"].endswith(".Unguided"):
        own = {"_target_": unguided}
    return {**own, **changes}


def load_pipeline(cfg: DictConfig) -> tuple[GenerationPipeline, dict[str, Any], dict[str, Any]]:
    """Load ``cfg.run`` (a run or an exported folder).

    Returns:
        the pipeline, and the settings of its sampler and guidance as used; of a weak model also
        its name, and its operations as a share of the model's: ``nfe`` counts both alike.
    """
    if is_exported(cfg.run):
        own = exported_config(Path(str(cfg.run)).expanduser())
    else:
        own = RunFolder.open(cfg.run).config()
    pipeline = GenerationPipeline.load(
        cfg.run, checkpoint=cfg.checkpoint, weights=str(cfg.weights), device=cfg.device
    )
    sampler = inherit(cfg.sampler, own["sampler"])
    if sampler["_target_"] == _NEXT_SCALE and sampler.get("num_scales") is None:
        sampler["num_scales"] = len(pipeline.model.config.get("scales") or (1,))
    if sampler["_target_"] == _BLOCKS and sampler.get("block_size") is None:
        settings = pipeline.model.config
        sampler["block_size"] = settings.get("block_size")
        sampler["trained_frames"] = frames_of(settings.get("input_size"))
        sampler["independent_first_frame"] = bool(settings.get("independent_first_frame"))
    scale_wise = pipeline.objective.family == "scale_wise"
    guidance = (
        inherit(cfg.guidance, own["guidance"], unguided=_BY_SCALE)
        if scale_wise
        else inherit(cfg.guidance, own["guidance"])
    )
    pipeline.sampler = instantiate(OmegaConf.create(sampler), "sampler")
    asked = instantiate(OmegaConf.create(guidance), "guidance")
    _place_size(cfg, pipeline)
    problems = combination_problems(
        OmegaConf.create(own["model"]), pipeline.objective, asked, pipeline.sampler
    )
    if problems:
        raise ConfigError("\n".join(problems))
    pipeline.guidance = pipeline.ready(asked)
    if isinstance(asked, Autoguidance):
        weak = pipeline.weak_models.find(asked.settings, pipeline)
        share = weak.model.flops() / pipeline.model.flops()
        guidance = {**guidance, "weak_model": weak.name, "weak_flops": round(share, 4)}
    if cfg.get("step_cache") is not None:
        pipeline.step_cache = instantiate(cfg.step_cache, "step_cache")
    pipeline.set_precision(cfg.precision)
    if cfg.get("frame_rate") is not None:
        check_frame_rate(cfg.frame_rate, clips=pipeline.makes_clips)
        pipeline.frame_rate = float(cfg.frame_rate)
    _place_autoencoder(cfg, pipeline, own["autoencoder"])
    _place_text_encoder(cfg, pipeline, own)
    place_references(cfg, pipeline, lambda: datasets_of(cfg.run))
    if cfg.get("offload"):
        pipeline.offload()
    if cfg.get("upscaling") is not None:
        choice: UpscalingChoice = instantiate(cfg.upscaling, "upscaling")
        pipeline.upscaling = choice.placed(pipeline.autoencoder, pipeline.decoded_shape[0])
    return pipeline, _as_json(sampler), _as_json(guidance)


def _place_size(cfg: DictConfig, pipeline: GenerationPipeline) -> None:
    """Let the pipeline make pictures of the size asked for, and say where it is a bold one."""
    size = cfg.get("size")
    if size is None:
        asked = cfg.get("resolution")
        preset = None if asked is None else instantiate(asked, "resolution")
        if preset is not None and not isinstance(preset, NoScaling):
            raise ConfigError(
                f"resolution={preset.name} is for pictures of another size than the trained one, "
                "but no size was given. Add e.g. size=64, or leave resolution out."
            )
        return
    trained = pipeline.image_shape[-2:]
    sides: Any = OmegaConf.to_container(size) if OmegaConf.is_config(size) else size
    pipeline.set_size(sides)
    if pipeline.size is None:
        return
    if cfg.get("resolution") is not None:
        _place_resolution(cfg, pipeline)
    if not isinstance(pipeline.resolution, NoScaling):
        return
    hint = size_hint((trained[0], trained[1]), pipeline.size)
    if hint is not None:
        sys.stderr.write(f"{hint}\n")


def _place_resolution(cfg: DictConfig, pipeline: GenerationPipeline) -> None:
    """Give the pipeline its preset of resolution, and see that it fits network and sampler.

    Raises:
        ConfigError: it does not.
    """
    preset: Preset = instantiate(cfg.resolution, "resolution")
    native, target = pipeline.model.sample_shape[-2:], pipeline.sample_shape[-2:]
    problem = refusal(
        pipeline.model, preset, (native[0], native[1]), (target[0], target[1])
    ) or sampler_refusal(pipeline.sampler, preset)
    if problem is not None:
        raise ConfigError(problem)
    if preset.enlarge == "pixel" or preset.family == "scale_wise":  # small pictures are encoded
        problems = pipeline.autoencoder.check(encodes=True, decodes=True)
        if problems:
            raise ConfigError("\n".join(problems))
    pipeline.resolution = preset


def _as_json(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with infinities as words, which JSON has no numbers for."""
    infinite = {
        name: str(value)
        for name, value in settings.items()
        if isinstance(value, float) and math.isinf(value)
    }
    return {**settings, **infinite}


def _place_autoencoder(cfg: DictConfig, pipeline: GenerationPipeline, own: dict[str, Any]) -> None:
    """Let the autoencoder read its weights where the command line says, and see that it can."""
    asked = inherit(cfg.autoencoder, own)
    if asked != own:
        autoencoder = instantiate(OmegaConf.create(asked), "autoencoder")
        pipeline.autoencoder = autoencoder.eval().to(pipeline.device)
    problems = pipeline.autoencoder.check(encodes=False, decodes=True)
    if problems:
        raise ConfigError("\n".join(problems))


def _place_text_encoder(cfg: DictConfig, pipeline: GenerationPipeline, own: dict[str, Any]) -> None:
    """Let the text encoder read its weights where the command line says, and see that it can."""
    given = cfg.get("text_encoder")
    if pipeline.text is None:
        if given is not None and given.get("_target_"):
            raise ConfigError(
                "text_encoder=... was given, but the model reads no text. Leave it out."
            )
        return
    if given is not None:
        asked = inherit(given, own["text_encoder"])
        if asked != own["text_encoder"]:
            encoder = instantiate(OmegaConf.create(asked), "text_encoder")
            pipeline.text = TextCache(encoder).to(pipeline.device)
    encoder = pipeline.text.encoder
    problems = fit_problems(pipeline.model.config, encoder) + encoder.check()
    if problems:
        raise ConfigError("\n".join(problems))


def datasets_of(run: str) -> Any:
    """Build the data module a run was trained on, for its reference images.

    Raises:
        ConfigError: ``run`` is an exported folder, which does not say where its data was.
    """
    if is_exported(run):
        raise ConfigError(
            f"run={run} is an exported folder, which has no data to compare with. "
            "Give reference=<statistics or npz>, or the run it was exported from."
        )
    return build(RunFolder.open(run).config()["data"], path="data")


def output_folder(cfg: DictConfig, kind: str) -> Path:
    """Make the folder where results go: ``out_dir``, or a stamped folder inside the run."""
    if cfg.out_dir:
        folder = Path(cfg.out_dir).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    exported = is_exported(cfg.run)
    base = Path(str(cfg.run)).expanduser() if exported else RunFolder.open(cfg.run).path
    return new_folder(base / kind)
