"""ESPCN: two PyTorch ports (Lornatang/ESPCN-PyTorch, leftthomas/ESPCN) under our names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from genscale.errors import CheckpointError

# leftthomas -> ours; the other port has our keys
_KEYS = {"conv1": "feature_maps.0", "conv2": "feature_maps.2", "conv3": "sub_pixel.0"}


def config_from_official(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of ``genscale.upscaling.espcn.ESPCN`` for those of a port.

    Args:
        config: ``implementation`` (``lornatang`` or ``leftthomas``), ``upscale_factor``, and for
            the first ``in_channels``, ``out_channels`` and ``channels``.

    Raises:
        CheckpointError: another port, or other channels out than in.
    """
    implementation = config.get("implementation", "lornatang")
    scale = int(config["upscale_factor"])
    if implementation == "leftthomas":
        return {"scale": scale, "channels": 1, "hidden_size": 64, "output": "sigmoid"}
    channels, out = int(config.get("in_channels", 1)), int(config.get("out_channels", 1))
    if implementation != "lornatang" or channels != out:
        raise CheckpointError(
            "ESPCN checkpoints of the ports 'lornatang' (as many channels out as in) and "
            f"'leftthomas' are known, but '{implementation}' with {channels} channels in and "
            f"{out} out was given; convert it to one of them."
        )
    hidden_size = int(config.get("channels", 64))
    return {"scale": scale, "channels": channels, "hidden_size": hidden_size, "output": "clamp"}


def is_official(state: Mapping[str, Tensor]) -> bool:
    """Return whether a state dict is one of a port."""
    return set(state) == {f"{name}.{part}" for name in _names(state) for part in ("weight", "bias")}


def config_from_state_dict(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the settings of ``genscale.upscaling.espcn.ESPCN`` off a port's tensors.

    Args:
        state: one that :func:`is_official` holds for.
    """
    first, _, last = (state[f"{name}.weight"] for name in _names(state))
    hidden_size, channels = first.shape[:2]
    return {
        "scale": math.isqrt(last.shape[0] // channels),
        "channels": channels,
        "hidden_size": hidden_size,
        "output": "sigmoid" if "conv1.weight" in state else "clamp",
    }


def _names(state: Mapping[str, Tensor]) -> list[str]:
    """Return what the three convolutions are called in a state dict."""
    return list(_KEYS) if "conv1.weight" in state else list(_KEYS.values())


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a port's tensors, or its gradients, under our keys."""
    return {_rename(name): value for name, value in state.items()}


def _rename(name: str) -> str:
    module, _, rest = name.partition(".")
    return f"{_KEYS[module]}.{rest}" if module in _KEYS else name
