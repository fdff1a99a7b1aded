"""Training-free resolution scaling: operators on trained models, put on for a while.

The public names are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

_PUBLIC = {
    "ResolutionOp": "genscale.resolution.base",
    "apply_resolution": "genscale.resolution.base",
    "EntropyAttention": "genscale.resolution.entropy",
    "RotaryScaling": "genscale.resolution.rotary",
}

__all__ = ["EntropyAttention", "ResolutionOp", "RotaryScaling", "apply_resolution"]

if TYPE_CHECKING:
    from genscale.resolution.base import ResolutionOp, apply_resolution
    from genscale.resolution.entropy import EntropyAttention
    from genscale.resolution.rotary import RotaryScaling


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'genscale.resolution' has no attribute '{name}'")
