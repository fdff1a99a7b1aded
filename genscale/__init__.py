"""genscale: train, sample and evaluate visual generative models, assembled by config.

``import genscale`` is light: it loads neither torch nor lightning. The public names below are
imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_PUBLIC = {
    "Backbone": "genscale.backbones.base",
    "BackboneOutput": "genscale.backbones.base",
    "Autoencoder": "genscale.autoencoders.base",
    "Conditioning": "genscale.conditioning.base",
    "Objective": "genscale.objectives.base",
    "Denoiser": "genscale.objectives.base",
    "Guidance": "genscale.guidance.base",
    "Sampler": "genscale.samplers.base",
    "State": "genscale.samplers.base",
    "GenerationPipeline": "genscale.pipeline",
}

__all__ = [
    "Autoencoder",
    "Backbone",
    "BackboneOutput",
    "Conditioning",
    "Denoiser",
    "GenerationPipeline",
    "Guidance",
    "Objective",
    "Sampler",
    "State",
    "__version__",
]

if TYPE_CHECKING:
    from genscale.autoencoders.base import Autoencoder
    from genscale.backbones.base import Backbone, BackboneOutput
    from genscale.conditioning.base import Conditioning
    from genscale.guidance.base import Guidance
    from genscale.objectives.base import Denoiser, Objective
    from genscale.pipeline import GenerationPipeline
    from genscale.samplers.base import Sampler, State


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'genscale' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
