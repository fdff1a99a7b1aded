"""Folders of weights for other programs: the official layout, and that of diffusers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from genscale.backbones.base import Backbone
from genscale.errors import ConfigError
from genscale.io.converters import families, families_of
from genscale.io.keys import on_meta


def converter_of(model: Backbone) -> tuple[str, ModuleType]:
    """Return the family of a network and its converter.

    Raises:
        ConfigError: no converter knows networks of this class.
    """
    names = families_of(type(model))
    if not names:
        raise ConfigError(
            f"There is no official layout of {type(model).__name__}; converters are for "
            f"{', '.join(families())}. Give layout=genscale."
        )
    return names[0], families()[names[0]]


def write_official(model: Backbone, folder: Path) -> dict[str, Any]:
    """Write the official state dict as ``model.safetensors`` and, the same, as ``model.pth``.

    The latter holds tensors alone: ``torch.load(..., weights_only=True)`` reads it. Where the
    official program keeps settings in ``config.json``, that is written, too.

    Returns:
        the settings that cannot be read off the file.

    Raises:
        ConfigError: no converter, or settings that the official layout cannot hold.
    """
    from safetensors.torch import save_file

    _, module = converter_of(model)
    official: dict[str, Tensor] = module.to_official(model.state_dict(), model.config)
    official = {name: tensor.detach().contiguous() for name, tensor in official.items()}
    save_file(official, folder / "model.safetensors", metadata={"format": "pt"})
    torch.save(official, folder / "model.pth")
    stated = module.config_to_official(model.config) if hasattr(module, "UNTOLD") else None
    if stated is not None:
        (folder / "config.json").write_text(json.dumps(stated, indent=2) + "\n", encoding="utf-8")
        return untold_settings(model, module.config_from_official(stated))
    words = {name: model.config[name] for name in getattr(module, "UNTOLD", ())}
    return words | untold_settings(model, module.config_from_state_dict(official))


def untold_settings(model: Backbone, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a model that one built from ``found`` would not have."""
    own, twin = model.config, on_meta(type(model), found).config
    return {
        name: value for name, value in own.items() if name[0] != "_" and twin.get(name) != value
    }


def as_words(settings: Mapping[str, Any]) -> str:
    """Write settings as words of a command line."""
    return " ".join(
        f"{name}={json.dumps(value, separators=(',', ':'))}" for name, value in settings.items()
    )


def write_diffusers(model: Backbone, folder: Path) -> None:
    """Write a network as the folder of its diffusers class, a DiT's or a causal Wan's.

    Raises:
        ConfigError: another network, or settings that its layout cannot hold.
    """
    names = families_of(type(model))
    module = families()[names[0]] if names else None
    if module is None or not hasattr(module, "to_diffusers"):
        raise ConfigError(
            f"layout=diffusers is for DiT, SiT and causal Wan, but the run's network is a "
            f"{type(model).__name__}. Give layout=genscale, which diffusers' ModelMixin wrote."
        )
    state = module.to_diffusers(model.state_dict(), model.config)

    import diffusers

    network = getattr(diffusers, getattr(module, "DIFFUSERS", "DiTTransformer2DModel"))
    with torch.device("meta"):
        theirs = network(**module.diffusers_config(model.config))
    theirs.load_state_dict(state, strict=True, assign=True)
    theirs.save_pretrained(folder)
