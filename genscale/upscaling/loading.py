"""Upscalers read back: from a training run, an exported folder, or a file of another program."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genscale.assembly import build
from genscale.errors import CheckpointError, ConfigError
from genscale.io.converters import espcn, irn, swin
from genscale.io.files import write_json
from genscale.io.weights import assign_strictly, complete_from, read_checkpoint
from genscale.run_weights import MAIN, read_weights
from genscale.runs import RunFolder
from genscale.upscaling.base import Upscaler
from genscale.upscaling.espcn import ESPCN
from genscale.upscaling.iarn import IARN
from genscale.upscaling.interpolation import Interpolation
from genscale.upscaling.irn import IRN
from genscale.upscaling.lua import LUA
from genscale.upscaling.swinir import SwinIR
from genscale.upscaling.wdsr import WDSR

WEIGHTS = "diffusion_pytorch_model.safetensors"
FACTS = "upscaler.json"
_KINDS: dict[str, type[Upscaler]] = {
    kind.__name__: kind for kind in (LUA, SwinIR, ESPCN, WDSR, IRN, IARN, Interpolation)
}
_ROOM = "genscale.upscaling."
# files of the authors -> the latent space they are for
_PUBLISHED = {"lua_flux.pth": "flux"}


@dataclass(frozen=True, slots=True, kw_only=True)
class UpscalerFacts:
    """What must be known of an upscaler before it is used; ``upscaler.json`` beside its weights.

    Attributes:
        space: ``latent``: what a VAE's decoder takes, neither shifted nor scaled; or ``pixel``:
            pictures in [0, 1].
        channels: of what it upscales.
        scales: factors it offers.
        family: the latent space, as of
            :func:`~genscale.upscaling.latent_conventions.family_of`; None where it has no name.
        latent_stats: ``mean`` and ``std`` of every channel of the latents of training; None where
            nobody knows.
        autoencoder: whose latents it was trained on: ``name``, ``encoder`` (a SHA-256 over the
            encoder's weights, or None), ``latent_channels``, ``downsample``, ``scale``, ``shift``;
            None where nobody knows.
        data: what it was trained on; None where nobody knows.
        origin: run, step and weights it was read from, or the name of its file.
        weights: which average; None of other programs' files.
        step: optimizer steps of training; None where nobody knows.
    """

    space: str
    channels: int
    scales: tuple[int, ...]
    family: str | None = None
    latent_stats: dict[str, list[float]] | None = None
    autoencoder: dict[str, Any] | None = None
    data: str | None = None
    origin: str | None = None
    weights: str | None = None
    step: int | None = None


def facts_of(network: Upscaler, **known: Any) -> UpscalerFacts:
    """Return the facts that an upscaler tells itself, and others that are known of it."""
    return UpscalerFacts(
        space=network.space, channels=network.channels, scales=tuple(network.scales), **known
    )


def load_upscaler(
    source: str | Path, checkpoint: str | int | Path = "latest", weights: str = MAIN
) -> tuple[Upscaler, UpscalerFacts]:
    """Read an upscaler.

    Args:
        source: the folder of a run of an upscaler, such as ``model=lua`` or ``irn``; a folder
            that :func:`save_upscaler` wrote, such as the ``export`` of a run; or a file of
            official layout.
        checkpoint: of a run: ``latest``, a step, or a file.
        weights: of a run: ``ema``, ``raw``, or another average.

    Returns:
        in eval mode, on the CPU, without gradients; and what is known of it.

    Raises:
        ConfigError: a run that trained something else, or a choice that a folder does not have.
        CheckpointError: nothing there, or files that are damaged or of another network.
    """
    path = Path(source).expanduser()
    if (path / "config.yaml").is_file():
        network, facts = _read_run(path, checkpoint, weights)
    elif (checkpoint, weights) != ("latest", MAIN):
        raise ConfigError(
            f"{source} is no run, and holds one set of weights, but checkpoint={checkpoint} and "
            f"weights={weights} were given. Leave them out."
        )
    elif path.is_dir():
        network, facts = read_folder(path)
    elif path.is_file():
        network, facts = read_file(path)
    else:
        raise CheckpointError(
            f"{source} is no folder and no file. Give the folder of a run, its export, or a file "
            "such as lua_flux.pth."
        )
    return network.requires_grad_(False).eval(), facts


def save_upscaler(network: Upscaler, folder: str | Path, facts: UpscalerFacts) -> None:
    """Write weights and config as diffusers' mixins do, and the facts beside them."""
    folder = Path(folder)
    mixin: Any = network  # the decorated method has lost its type
    mixin.save_pretrained(folder)
    write_facts(folder, facts)


def write_facts(folder: Path, facts: UpscalerFacts) -> None:
    """Write ``upscaler.json``."""
    write_json(folder / FACTS, asdict(facts))


def read_folder(folder: Path) -> tuple[Upscaler, UpscalerFacts]:
    """Read what :func:`save_upscaler` wrote; without ``upscaler.json`` the network tells alone.

    Raises:
        CheckpointError: a file is lacking, damaged, or of another network.
    """
    settings = _read_json(folder / "config.json")
    kind = settings.get("_class_name", "LUA")
    if kind not in _KINDS:
        raise CheckpointError(
            f"{folder / 'config.json'} describes {kind}, but one of {', '.join(_KINDS)} was "
            "expected. Give the folder of one."
        )
    own = {name: value for name, value in settings.items() if name[0] != "_"}
    try:
        with torch.device("meta"):
            network = _KINDS[kind](**own)
    except TypeError as error:
        raise CheckpointError(
            f"{folder / 'config.json'} holds settings that {kind} does not know: {error}. "
            "Get the folder again."
        ) from error
    if network.state_dict():
        state = read_checkpoint(folder / WEIGHTS)
        _fill(network, state, folder / WEIGHTS)
        complete_from(network, partial(_KINDS[kind], **own))
    return network, _read_facts(folder, network, origin=folder.name)


def read_file(path: Path, input_size: int | None = None) -> tuple[Upscaler, UpscalerFacts]:
    """Read a file of official layout, or one of ours beside its config.

    Args:
        path: of LUA, SwinIR, ESPCN (two ports) or IRN.
        input_size: side that a SwinIR or LUA is made for; None for what the file tells.

    Raises:
        CheckpointError: the file is damaged, or of none of these.
    """
    state = swin.unwrapped(read_checkpoint(path))
    make: partial[Upscaler]
    if swin.is_official(state):
        settings = swin.config_from_state_dict(state, input_size=input_size)
        make = partial(LUA if "scales" in settings else SwinIR, **settings)
        with torch.device("meta"):
            network = make()
        state = swin.from_official(state, network)
    elif espcn.is_official(state):
        make, state = (
            partial(ESPCN, **espcn.config_from_state_dict(state)),
            espcn.from_official(state),
        )
        with torch.device("meta"):
            network = make()
    elif irn.is_official(state):
        make = partial(IRN, **irn.config_from_state_dict(state))
        with torch.device("meta"):
            network = make()
    elif (path.parent / "config.json").is_file():
        return read_folder(path.parent)
    else:
        raise CheckpointError(
            f"{path} has no official keys of LUA, SwinIR, ESPCN or IRN, and no config.json lies "
            f"beside it to read it with (first key: {next(iter(state))}). Give a file such as "
            "lua_flux.pth."
        )
    _fill(network, state, path)
    complete_from(network, make)
    return network, facts_of(network, family=_PUBLISHED.get(path.name), origin=path.name)


def trains_upscaler(config: Mapping[str, Any]) -> bool:
    """Return whether the model of a run's config is an upscaler."""
    node = config.get("model")
    return isinstance(node, Mapping) and str(node.get("_target_", "")).startswith(_ROOM)


def _read_run(
    path: Path, checkpoint: str | int | Path, weights: str
) -> tuple[Upscaler, UpscalerFacts]:
    folder = RunFolder.open(path)
    config = folder.config()
    if not trains_upscaler(config):
        model = str((config.get("model") or {}).get("_target_", "nothing")).rpartition(".")[2]
        raise ConfigError(
            f"run={path} trained {model}, which is no upscaler. Give the run of model=lua, swinir, "
            "espcn, wdsr, irn or iarn."
        )
    state, origin = read_weights(folder, checkpoint, weights)
    make = partial(build, config["model"], path="model")
    with torch.device("meta"):
        network = make()
    _fill(network, state, origin.file)
    complete_from(network, make)
    facts = _read_facts(folder.path, network, origin=None)
    return network, replace(facts, origin=str(origin), weights=origin.weights, step=origin.step)


def _read_facts(folder: Path, network: Upscaler, origin: str | None) -> UpscalerFacts:
    """Read ``upscaler.json``; what it says of the network itself is the network's own word."""
    if not (folder / FACTS).is_file():
        return facts_of(network, origin=origin)
    told = _read_json(folder / FACTS)
    known = {field.name for field in fields(UpscalerFacts)} - {"space", "channels", "scales"}
    facts = facts_of(network, **{name: value for name, value in told.items() if name in known})
    return facts if facts.origin else replace(facts, origin=origin)


def _fill(network: Upscaler, state: Mapping[str, Tensor], source: Path) -> None:
    assign_strictly(network, state, device=torch.device("cpu"), source=source)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"There is no {path.name} in {path.parent}, and the folder of an upscaler has one. "
            "Give another folder."
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}. Get it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, but settings by name were expected. "
            "Get it again."
        )
    return content
