"""Weight files of other programs: bare state dicts, and training files that hold some."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from genscale.errors import CheckpointError
from genscale.io.weights import check_choice, read_checkpoint

WEIGHTS = ("ema", "model")  # what training files call them
_DIFFUSERS = ("DiTTransformer2DModel", "Transformer2DModel")  # the latter before diffusers 0.30
_NO_NAMES: Mapping[str, str] = {}
_STEM = "diffusion_pytorch_model"


def read_state_dict(
    path: Path,
    weights: str | None = None,
    *,
    nested: Sequence[str] = (),
    containers: Mapping[str, str] = _NO_NAMES,
) -> dict[str, Tensor]:
    """Read the state dict in a file of another program.

    Args:
        path: a bare state dict, or a training file, whose weights lie below ``ema`` and
            ``model``. Options of a command line beside them (``argparse.Namespace``, which holds
            values and nothing that runs) are read over; other objects are refused.
        weights: ``ema`` or ``model``; None takes ``ema`` where there are several.
        nested: keys of a training file below which the weights lie, one in the other; read where
            they are there.
        containers: what a program calls its weights -> ``ema`` or ``model``.

    Raises:
        CheckpointError: a file without weights, without these, or that cannot be read safely.
    """
    if weights is not None:
        check_choice("weights", weights, WEIGHTS)
    wanted = weights or WEIGHTS[0]
    content = read_checkpoint(
        path,
        harmless=(argparse.Namespace,),
        advice=(
            "If you trust where it came from, take the weights out once, in the environment of the "
            f"program that wrote it: torch.save(torch.load('{path.name}', weights_only=False)"
            f"['{wanted}'], 'weights.pt'), and import that file."
        ),
    )
    content = {containers.get(name, name): part for name, part in content.items()}
    inner: Any = content
    for key in nested:
        inner = inner.get(key) if isinstance(inner, Mapping) else None
    if nested and is_state_dict(inner):
        content = dict(inner)
    if isinstance(content.get("state_dict"), Mapping) and "genscale" in content:
        raise CheckpointError(
            f"{path} is a checkpoint of a genscale run, which needs no import. Sample from its "
            "run folder, or write a folder with: python -m genscale.cli.export run=<run folder>"
        )
    if is_state_dict(content):
        if weights is not None:
            raise CheckpointError(
                f"{path} is a bare state dict, but weights={weights} was given, which chooses "
                "among several. Leave it out."
            )
        return content
    there = [name for name in WEIGHTS if is_state_dict(content.get(name))]
    if wanted not in there:
        raise CheckpointError(
            f"{path} holds no tensors by name below '{wanted}': its keys are "
            f"{', '.join(list(map(str, content))[:6]) or 'none'}. "
            + (f"Give weights={there[0]}." if there else "Give a file with a state dict.")
        )
    return dict(content[wanted])


def is_state_dict(value: Any) -> bool:
    """Return whether a value is a mapping of names to tensors, and not an empty one."""
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def read_settings_beside(path: Path) -> dict[str, Any] | None:
    """Return ``config.json`` of the folder a weight file lies in; None where there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    file = path.parent / "config.json"
    if not file.is_file():
        return None
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}. Get it again.") from error
    if not isinstance(settings, dict):
        raise CheckpointError(
            f"{file} holds a {type(settings).__name__}, but settings by name were expected. "
            "Get it again."
        )
    return settings


def read_diffusers(
    path: Path, classes: Sequence[str] = _DIFFUSERS
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read weights and config of a DiT, or of another network, in diffusers' layout.

    Args:
        path: the model's folder, a pipeline's folder with ``transformer/``, or the weight file.
        classes: names that diffusers has, or had, for such a network.

    Returns:
        state dict (of all shards), and ``config.json``.

    Raises:
        CheckpointError: a file is missing or damaged, or they are of another class.
    """
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    files = [path] if path.is_file() else sorted(folder.glob(f"{_STEM}*.safetensors"))
    files = files or sorted(folder.glob(f"{_STEM}*.bin"))
    config_file = (path.parent if path.is_file() else folder) / "config.json"
    if not files or not config_file.is_file():
        lacking = f"{_STEM}.safetensors" if not files else "config.json"
        raise CheckpointError(
            f"{lacking} is missing from {config_file.parent}, and the folder of a diffusers model "
            f"has it beside the other. Give the folder of a {classes[0]}."
        )
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{config_file} is damaged: {error}. Get it again.") from error
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if kind not in classes or config.get("norm_type", "ada_norm_zero") != "ada_norm_zero":
        raise CheckpointError(
            f"{config_file} describes {kind or 'no model'}, but a {classes[0]} was expected. "
            "Give the folder of one."
        )
    state: dict[str, Tensor] = {}
    for file in files:
        state |= read_checkpoint(file)
    return state, config
