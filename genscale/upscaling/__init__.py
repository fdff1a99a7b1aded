"""Trained upscalers of latents and pictures, and what puts them behind a pipeline.

The public names are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

_PUBLIC = {
    "ESPCN": "genscale.upscaling.espcn",
    "IARN": "genscale.upscaling.iarn",
    "IRN": "genscale.upscaling.irn",
    "LUA": "genscale.upscaling.lua",
    "Interpolation": "genscale.upscaling.interpolation",
    "LatentUpscaler": "genscale.upscaling.latent_upscaler",
    "SwinIR": "genscale.upscaling.swinir",
    "Upscaler": "genscale.upscaling.base",
    "Upscaling": "genscale.upscaling.stage",
    "WDSR": "genscale.upscaling.wdsr",
    "adapt_channels": "genscale.upscaling.lua",
    "collaborative_downscale": "genscale.upscaling.collaborative",
    "decode": "genscale.upscaling.latent_conventions",
    "to_vae_space": "genscale.upscaling.latent_conventions",
    "with_latent_upscaler": "genscale.upscaling.latent_upscaler",
}

__all__ = [
    "ESPCN",
    "IARN",
    "IRN",
    "LUA",
    "WDSR",
    "Interpolation",
    "LatentUpscaler",
    "SwinIR",
    "Upscaler",
    "Upscaling",
    "adapt_channels",
    "collaborative_downscale",
    "decode",
    "to_vae_space",
    "with_latent_upscaler",
]

if TYPE_CHECKING:
    from genscale.upscaling.base import Upscaler
    from genscale.upscaling.collaborative import collaborative_downscale
    from genscale.upscaling.espcn import ESPCN
    from genscale.upscaling.iarn import IARN
    from genscale.upscaling.interpolation import Interpolation
    from genscale.upscaling.irn import IRN
    from genscale.upscaling.latent_conventions import decode, to_vae_space
    from genscale.upscaling.latent_upscaler import LatentUpscaler, with_latent_upscaler
    from genscale.upscaling.lua import LUA, adapt_channels
    from genscale.upscaling.stage import Upscaling
    from genscale.upscaling.swinir import SwinIR
    from genscale.upscaling.wdsr import WDSR


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'genscale.upscaling' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
