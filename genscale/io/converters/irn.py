"""IRN (pkuxmq/Invertible-Image-Rescaling): keys and shapes are ours; settings are renamed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from genscale.errors import CheckpointError


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


def _used(config: Mapping[str, Any], learnt: bool) -> list[int]:
    """Return the numbers of blocks that the official network reads; it ignores further ones."""
    count = 1 if learnt or config.get("down_first", False) else int(config["down_num"])
    return [int(number) for number in config["block_num"][:count]]
