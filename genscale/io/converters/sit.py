"""SiT checkpoints: keys, shapes and settings are those of DiT; the recipe is another."""

from __future__ import annotations

from genscale.io.converters.dit import (
    BACKBONE,
    config_from_official,
    config_from_state_dict,
    from_official,
    to_official,
)

__all__ = [
    "BACKBONE",
    "config_from_official",
    "config_from_state_dict",
    "from_official",
    "to_official",
]
