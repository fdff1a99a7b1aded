"""What a trained run or an exported folder says, as a pipeline is built from it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genscale.assembly import build
from genscale.backbones.base import Backbone
from genscale.conditioning.text import reads_text
from genscale.errors import CheckpointError, ConfigError
from genscale.io.files import atomic_write
from genscale.io.weights import assign_strictly, complete_from, read_checkpoint
from genscale.run_weights import MAIN, Origin, read_weights
from genscale.runs import RunFolder
from genscale.text_cache import TextCache

# the parts of a run's config that sampling needs, and TEXT where the model reads text
EXPORTED = ("model", "autoencoder", "objective", "sampler", "guidance", "data_info")
TEXT = "text_encoder"


def choose_device(device: str | torch.device | None) -> torch.device:
    """Return a device that is present; None picks CUDA where there is one, else the CPU.

    Raises:
        ConfigError: ``device`` is no device, or is not present.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(
            f"device={device} is no device. Give cpu, cuda, or one of several as cuda:1."
        ) from error
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if chosen.type == "cuda" and (chosen.index or 0) >= count:
        present = f"CUDA devices 0 to {count - 1} are" if count else "no CUDA device is"
        raise ConfigError(
            f"device={device} was given, but {present} present. "
            f"Give device={'cuda:0' if count else 'cpu'}, or leave it out."
        )
    return chosen


def exported_config(folder: Path) -> dict[str, Any]:
    """Read the config of a folder written by :meth:`GenerationPipeline.save_pretrained`.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    file = folder / "genscale.json"
    if not file.is_file():
        raise CheckpointError(
            f"{folder} is no exported folder: genscale.json and model/ were expected. "
            "Training writes one into <run>/export."
        )
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}. Export the run again.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} holds no mapping. Export the run again.")
    return config


def write_exported(model: Backbone, folder: Path, config: dict[str, Any]) -> None:
    """Write ``model/`` in diffusers' layout and ``genscale.json`` with what sampling needs.

    Args:
        model: the backbone.
        folder: created if missing.
        config: the run's resolved config.
    """
    model.save_pretrained(folder / "model")
    with atomic_write(folder / "genscale.json") as temporary:
        kept = {key: config[key] for key in EXPORTED}
        if reads_text(model.config):
            kept[TEXT] = config[TEXT]
        if model.config.get("reference_channels") and "low_resolution" in config:
            kept["low_resolution"] = config["low_resolution"]
        temporary.write_text(json.dumps(kept, indent=2) + "\n")


@dataclass(frozen=True, slots=True)
class Stored:
    """A model as it lies in a folder.

    Attributes:
        config: the run's resolved config, or the part of it that was exported.
        state: the weights.
        origin: where they came from.
        hint: what to do where they do not fit, for the error.
    """

    config: dict[str, Any]
    state: dict[str, Tensor]
    origin: Origin
    hint: str = ""

    def model(self, device: torch.device) -> Backbone:
        """Build the backbone around its weights; it is never in memory twice.

        Raises:
            CheckpointError: the weights are of another model.
        """
        make = partial(build, self.config.get("model"), path="model")
        with torch.device("meta"):
            model: Backbone = make()
        assign_strictly(model, self.state, device=device, source=self.origin.file, hint=self.hint)
        complete_from(model, make)
        return model


def read_run(run: str | Path, checkpoint: str | int | Path, weights: str) -> Stored:
    """Read a run folder.

    Raises:
        ConfigError: no run there.
        CheckpointError: no such checkpoint, or damaged.
    """
    folder = RunFolder.open(run)
    state, origin = read_weights(folder, checkpoint, weights)
    hint = "Use the config.yaml of the run that wrote it."
    return Stored(folder.config(), state, origin, hint)


def read_exported(
    folder: str | Path, checkpoint: str | int | Path = "latest", weights: str = MAIN
) -> Stored:
    """Read an exported folder.

    Args:
        folder: written by :func:`write_exported`.
        checkpoint: what else a run would have been asked for; there is nothing but ``latest``,
        weights: and the averaged weights.

    Raises:
        ConfigError: something else was asked for.
        CheckpointError: a file is missing.
    """
    if (checkpoint, weights) != ("latest", MAIN):
        raise ConfigError(
            f"run={folder} is an exported folder, which holds the last averaged weights alone, "
            f"but checkpoint={checkpoint} and weights={weights} were given. Leave them out, or "
            "give the run it was exported from."
        )
    folder = Path(folder).expanduser()
    config = exported_config(folder)
    file = folder / "model" / "diffusion_pytorch_model.safetensors"
    return Stored(config, read_checkpoint(file), Origin(folder.resolve(), MAIN, None, file))


def parts_of(config: dict[str, Any], model: Backbone | None = None) -> dict[str, Any]:
    """Return the arguments of a pipeline as a resolved config (plain containers) says.

    Args:
        config: of a run, or the part of it that was exported.
        model: the backbone; None builds an untrained one.
    """
    data = config.get("data_info") or {}

    def part(name: str) -> Any:
        return build(config.get(name), path=name)

    parts = {
        "model": (part("model") if model is None else model).eval(),
        "autoencoder": part("autoencoder").eval(),
        "objective": part("objective"),
        "sampler": part("sampler"),
        "guidance": part("guidance"),
        **facts_of(data),
    }
    if reads_text(parts["model"].config):
        parts["text"] = TextCache(part(TEXT))
    return parts


def facts_of(data: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a pipeline that tell of the data, from a config's ``data_info``."""
    rate = data.get("frame_rate")
    return {
        "num_classes": int(data.get("num_classes") or 0),
        "class_names": tuple(data.get("class_names") or ()),
        "example_captions": tuple(data.get("example_captions") or ()),
        "frame_rate": None if rate is None else float(rate),
    }
