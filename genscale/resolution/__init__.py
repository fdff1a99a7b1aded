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
    "WindowFusion": "genscale.resolution.windows",
    "DilatedSampling": "genscale.resolution.windows",
    "DilatedConvs": "genscale.resolution.dilated",
    "FourierConvs": "genscale.resolution.fourier",
    "SkipResidual": "genscale.resolution.flow_guided",
    "Projection": "genscale.resolution.flow_guided",
    "FlowAligned": "genscale.resolution.flow_guided",
    "ScaleFusion": "genscale.resolution.scale_fusion",
}

__all__ = [
    "DilatedConvs",
    "DilatedSampling",
    "EntropyAttention",
    "FlowAligned",
    "FourierConvs",
    "Projection",
    "ResolutionOp",
    "RotaryScaling",
    "ScaleFusion",
    "SkipResidual",
    "WindowFusion",
    "apply_resolution",
]

if TYPE_CHECKING:
    from genscale.resolution.base import ResolutionOp, apply_resolution
    from genscale.resolution.dilated import DilatedConvs
    from genscale.resolution.entropy import EntropyAttention
    from genscale.resolution.flow_guided import FlowAligned, Projection, SkipResidual
    from genscale.resolution.fourier import FourierConvs
    from genscale.resolution.rotary import RotaryScaling
    from genscale.resolution.scale_fusion import ScaleFusion
    from genscale.resolution.windows import DilatedSampling, WindowFusion


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'genscale.resolution' has no attribute '{name}'")
