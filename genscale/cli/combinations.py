"""Parts of a config that do not go together, found before data is read or weights are built."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from genscale.cli.signatures import read_signature
from genscale.errors import ConfigError

if TYPE_CHECKING:
    from genscale.guidance.base import Guidance
    from genscale.objectives.base import Objective
    from genscale.samplers.base import Sampler


def combination_problems(
    model: DictConfig,
    objective: Objective | None,
    guidance: Guidance | None,
    sampler: Sampler | None,
) -> list[str]:
    """Return a sentence for every pair of these that does not fit.

    Args:
        model: the model's node; it is not built.
        objective: None where it could not be built, which is told elsewhere.
        guidance: None likewise.
        sampler: None likewise.
    """
    from genscale.objectives.denoising import DenoisingObjective

    problems = family_problems(model, objective, guidance, sampler)
    if problems or objective is None or objective.family != "diffusion":
        return problems
    learned = bool(model_setting(model, "learn_sigma"))
    if isinstance(objective, DenoisingObjective):
        try:
            objective.check_variance(learned)
        except ConfigError as error:
            problems.append(str(error))
        if objective.self_conditioning > 0 and not _remembers(model):
            problems.append(
                f"objective.self_conditioning={objective.self_conditioning:g} trains a network to "
                f"use what it remembers, but {str(model.get('_target_')).rpartition('.')[2]} "
                "remembers nothing. Pass objective.self_conditioning=0."
            )
    if guidance is not None:
        problems += guidance.check(objective.process)
    if sampler is not None:
        problems += sampler.check(objective.process, learned_variance=learned)
    return problems


def family_problems(
    model: DictConfig,
    objective: Objective | None,
    guidance: Guidance | None,
    sampler: Sampler | None,
) -> list[str]:
    """Return a sentence for every part that is made for another family than the objective."""
    if objective is None:
        return []
    own = objective.family
    problems = []
    network = "scale_wise" if model_setting(model, "scales") is not None else "diffusion"
    if network != own:
        problems.append(
            f"objective={type(objective).__name__} trains {_PLAIN[own]}, but "
            f"{str(model.get('_target_')).rpartition('.')[2]} is {_PLAIN[network]}. "
            f"Give objective={_OBJECTIVES[network]}, or another model=..."
        )
        return problems
    if sampler is not None and sampler.family != own:
        problems.append(
            f"sampler={type(sampler).__name__} is for {_PLAIN[sampler.family]}, but the model is "
            f"{_PLAIN[own]}. Give sampler={_SAMPLERS[own]}."
        )
    if guidance is not None and own not in guidance.families:
        problems.append(
            f"guidance={type(guidance).__name__} does not guide {_PLAIN[own]}. "
            f"Give guidance={_GUIDANCES[own]}, or guidance=none."
        )
    return problems


def frame_problems(model: DictConfig, datamodule: Any, *, in_latents: bool = False) -> list[str]:
    """Return a sentence where a model of clips meets pictures, one of pictures clips, or lengths.

    Args:
        model: the model's node, whose ``input_size`` has three sides where it makes clips.
        datamodule: with ``num_frames``, 0 for pictures.
        in_latents: whether an autoencoder makes fewer latent frames of them.
    """
    # not resolved: a size that follows the data cannot be where these have no frames
    settings: dict[str, Any] = OmegaConf.to_container(model)  # type: ignore[assignment]
    raw = settings.get("input_size")
    sides = raw if isinstance(raw, list) else []
    makes_clips = len(sides) == 3
    name = str(model.get("_target_")).rpartition(".")[2]
    frames = datamodule.num_frames
    if makes_clips and not frames:
        return [
            f"{name} makes clips, but data '{datamodule.name}' holds pictures. "
            "Give data=moving_sprites, say, or another model=..."
        ]
    if frames and not makes_clips:
        return [
            f"Data '{datamodule.name}' holds clips of {frames} frames, but {name} makes pictures. "
            "Give model=snap_video, say, or other data=..."
        ]
    if makes_clips and isinstance(sides[0], int) and sides[0] != frames and not in_latents:
        return [
            f"model.input_size begins with {sides[0]} frames, but the clips of data "
            f"'{datamodule.name}' have {frames}. Give data.num_frames={sides[0]}, or leave "
            "model.input_size out."
        ]
    return []


_PLAIN = {"diffusion": "a diffusion model", "scale_wise": "a scale-wise model"}
_OBJECTIVES = {"diffusion": "flow, ddpm or edm", "scale_wise": "next_scale"}
_SAMPLERS = {"diffusion": "sde or another solver", "scale_wise": "next_scale"}
_GUIDANCES = {"diffusion": "cfg", "scale_wise": "scale_wise"}


def _remembers(model: DictConfig) -> bool:
    """Return whether the model's class conditions itself on what it remembers."""
    from hydra.utils import get_object

    try:
        network = get_object(str(model.get("_target_")))
    except ImportError:  # told where the model is built
        return True
    return bool(getattr(network, "self_conditioning", False))


def model_setting(node: DictConfig, name: str) -> Any:
    """Return a setting of the model: as given, else its constructor's default, else None."""
    if name in node:
        return node[name]
    signature = read_signature(str(node.get("_target_")))
    default = signature.parameters.get(name) if signature is not None else None
    return None if default is None else ast.literal_eval(default)
