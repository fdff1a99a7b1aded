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
    "TextTiles": "genscale.resolution.text_tiles",
    "WindowedAttention": "genscale.resolution.hidiffusion",
    "Preset": "genscale.resolution.presets",
    "preset_named": "genscale.resolution.presets",
    "refusal": "genscale.resolution.applicability",
    "sample_scaled": "genscale.resolution.sampling",
}

__all__ = [
    "DilatedConvs",
    "DilatedSampling",
    "EntropyAttention",
    "FlowAligned",
    "FourierConvs",
    "Preset",
    "Projection",
    "ResolutionOp",
    "RotaryScaling",
    "ScaleFusion",
    "SkipResidual",
    "TextTiles",
    "WindowFusion",
    "WindowedAttention",
    "apply_resolution",
    "preset_named",
    "refusal",
    "sample_scaled",
]

if TYPE_CHECKING:
    from genscale.resolution.applicability import refusal
    from genscale.resolution.base import ResolutionOp, apply_resolution
    from genscale.resolution.dilated import DilatedConvs
    from genscale.resolution.entropy import EntropyAttention
    from genscale.resolution.flow_guided import FlowAligned, Projection, SkipResidual
    from genscale.resolution.fourier import FourierConvs
    from genscale.resolution.hidiffusion import WindowedAttention
    from genscale.resolution.presets import Preset, preset_named
    from genscale.resolution.rotary import RotaryScaling
    from genscale.resolution.sampling import sample_scaled
    from genscale.resolution.scale_fusion import ScaleFusion
    from genscale.resolution.text_tiles import TextTiles
    from genscale.resolution.windows import DilatedSampling, WindowFusion


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'genscale.resolution' has no attribute '{name}'")
