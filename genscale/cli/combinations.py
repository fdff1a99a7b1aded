"""Parts of a config that do not go together, found before data is read or weights are built."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

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

    problems = []
    learned = bool(model_setting(model, "learn_sigma"))
    if isinstance(objective, DenoisingObjective):
        try:
            objective.check_variance(learned)
        except ConfigError as error:
            problems.append(str(error))
    if objective is not None and guidance is not None:
        problems += guidance.check(objective.process)
    if objective is not None and sampler is not None:
        problems += sampler.check(objective.process, learned_variance=learned)
    return problems


def model_setting(node: DictConfig, name: str) -> Any:
    """Return a setting of the model: as given, else its constructor's default, else None."""
    if name in node:
        return node[name]
    signature = read_signature(str(node.get("_target_")))
    default = signature.parameters.get(name) if signature is not None else None
    return None if default is None else ast.literal_eval(default)
