"""ESPCN: two PyTorch ports (Lornatang/ESPCN-PyTorch, leftthomas/ESPCN) under our names."""

from __future__ import annotations

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


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a port's tensors, or its gradients, under our keys."""
    return {_rename(name): value for name, value in state.items()}


def _rename(name: str) -> str:
    module, _, rest = name.partition(".")
    return f"{_KEYS[module]}.{rest}" if module in _KEYS else name
