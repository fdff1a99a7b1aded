"""What the table of presets and networks calls possible is: every such pair samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from genscale.backbones.base import Backbone
from genscale.backbones.causal_video import CausalVideo
from genscale.backbones.dimr import DiMR
from genscale.backbones.dit import DiT
from genscale.backbones.fit import FIT
from genscale.backbones.lamamba import LaMamba
from genscale.backbones.rin import RIN
from genscale.backbones.switti import Switti
from genscale.backbones.uvit import UViT
from genscale.guidance.cfg import ClassifierFree
from genscale.objectives.diffusion_forcing import DiffusionForcing
from genscale.objectives.edm import EDM
from genscale.objectives.flow import FlowMatching
from genscale.objectives.next_scale import NextScale
from genscale.resolution import preset_named, refusal, sample_scaled
from genscale.resolution.presets import presets
from genscale.samplers.next_scale import NextScaleSampler
from genscale.samplers.ode import Euler
from tests.resolution.test_presets import DIMR, DIT, FIT_, LAMAMBA, RIN_, VIDEO

# network, objective, sampler
KINDS: dict[str, tuple[Callable[[], Backbone], Any, Any]] = {
    "dit": (lambda: DiT(**DIT, text_size=8), FlowMatching(), Euler(2)),
    "uvit": (lambda: UViT(**DIT), FlowMatching(), Euler(2)),
    "dimr": (lambda: DiMR(**DIMR), FlowMatching(), Euler(2)),
    "dimr, axial_rope": (lambda: DiMR(**DIMR, position="axial_rope"), FlowMatching(), Euler(2)),
    "lamamba": (lambda: LaMamba(**LAMAMBA), FlowMatching(), Euler(2)),
    "rin": (lambda: RIN(**RIN_), EDM(), Euler(2)),
    "snap_video": (lambda: FIT(**FIT_), EDM(), Euler(2)),
    "causal_video": (
        lambda: CausalVideo(**VIDEO, input_size=(3, 8, 8), num_classes=2),
        DiffusionForcing(),
        Euler(2),
    ),
    "switti": (lambda: Switti(scales=[1, 2, 4], hidden_size=32, depth=1, num_heads=2), None, None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_preset_that_is_not_refused_samples(kind: str) -> None:
    make, objective, sampler = KINDS[kind]
    torch.manual_seed(0)
    model = make().eval()
    print(kind, model.sample_shape, model.size_step)
