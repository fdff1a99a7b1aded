"""IRN (pkuxmq/Invertible-Image-Rescaling): keys and shapes are ours; settings are renamed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from genscale.errors import CheckpointError
from genscale.io.keys import count_children


def config_from_official(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of ``genscale.upscaling.irn.IRN`` for those of the official network.

    Args:
        config: ``channel_in``, ``channel_out``, ``block_num``, ``down_num``, and where they are
            given ``gc``, ``down_first``, ``use_ConvDownsampling``, ``down_scale``.

    Raises:
        CheckpointError: another network inside the couplings than dense blocks.
    """
    if (subnet := config.get("subnet", "DBNet")) != "DBNet":
        raise CheckpointError(
            f"The network's couplings are '{subnet}', but IRN here has dense blocks (DBNet) only; "
            "give a checkpoint of such a network."
        )
    learnt = bool(config.get("use_ConvDownsampling", False))
    return {
        "scale": int(config.get("down_scale", 4)) if learnt else 2 ** int(config["down_num"]),
        "num_blocks": _used(config, learnt),
        "growth": int(config.get("gc", 32)),
        "channels": int(config["channel_in"]),
        "small_channels": int(config["channel_out"]),
        "downsampling": "conv" if learnt else "haar",
        "down_first": bool(config.get("down_first", False)),
    }


def is_official(state: Mapping[str, Tensor]) -> bool:
    """Return whether a state dict begins as the network's does: with a downsampling."""
    return any(f"operations.0.{name}" in state for name in ("haar_weights", "conv_weights"))


def config_from_state_dict(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the settings of ``genscale.upscaling.irn.IRN`` off a state dict.

    Args:
        state: one that :func:`is_official` holds for.

    Raises:
        CheckpointError: it has no coupling blocks.
    """
    kinds = []
    for number in range(count_children(state, "operations")):
        prefix = f"operations.{number}."
        if f"{prefix}haar_weights" in state:
            kinds.append("haar")
        else:
            kinds.append("conv" if f"{prefix}conv_weights" in state else "block")
    if "block" not in kinds:
        raise CheckpointError(
            "The file holds the downsampling of an IRN, but none of its coupling blocks "
            "(operations.*.F.*). Give a whole state dict."
        )
    coupling = f"operations.{kinds.index('block')}.F."
    small = state[f"{coupling}conv5.weight"].shape[0]
    width = small + state[f"{coupling}conv1.weight"].shape[1]  # channels that a block sees
    learnt = kinds[0] == "conv"
    halvings = kinds.count("haar")
    down_first = not learnt and halvings > 1 and kinds[1] == "haar"
    blocks: list[int] = []
    for kind in kinds:
        if kind == "block":
            blocks[-1] += 1
        elif not (down_first and blocks):
            blocks.append(0)
    if learnt:
        scale = math.isqrt(state["operations.0.conv_weights"].shape[0])
        channels = width // scale**2
    else:
        scale = 2**halvings
        channels = width // 4 ** kinds.index("block")
    return {
        "scale": scale,
        "num_blocks": blocks,
        "growth": state[f"{coupling}conv1.weight"].shape[0],
        "channels": channels,
        "small_channels": small,
        "downsampling": "conv" if learnt else "haar",
        "down_first": down_first,
    }


def _used(config: Mapping[str, Any], learnt: bool) -> list[int]:
    """Return the numbers of blocks that the official network reads; it ignores further ones."""
    count = 1 if learnt or config.get("down_first", False) else int(config["down_num"])
    return [int(number) for number in config["block_num"][:count]]
