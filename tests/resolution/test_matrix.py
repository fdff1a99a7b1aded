"""What the table of presets and networks calls possible is: every such pair samples."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from genscale.backbones.base import Backbone
from genscale.backbones.causal_video import CausalVideo
from genscale.backbones.dimr import DiMR
from genscale.backbones.dit import DiT
from genscale.backbones.fit import FIT
from genscale.backbones.lamamba import LaMamba
from genscale.backbones.rin import RIN
from genscale.backbones.uvit import UViT
from genscale.guidance.cfg import ClassifierFree
from genscale.objectives.base import Objective
from genscale.objectives.diffusion_forcing import DiffusionForcing
from genscale.objectives.edm import EDM
from genscale.objectives.flow import FlowMatching
from genscale.resolution import preset_named, refusal, sample_scaled
from genscale.resolution.presets import presets
from genscale.samplers.ode import Euler
from tests.resolution.test_presets import DIMR, DIT, FIT_, LAMAMBA, RIN_, VIDEO

FLOW = FlowMatching()
# scale-wise networks: test_pyramid.py; those of diffusers: test_pipelines.py
KINDS: dict[str, tuple[Callable[[], Backbone], Objective]] = {
    "dit": (lambda: DiT(**DIT), FLOW),
    "dit_text": (lambda: DiT(**DIT, text_size=8), FLOW),
    "uvit": (lambda: UViT(**DIT), FLOW),
    "dimr": (lambda: DiMR(**DIMR), FLOW),
    "dimr, axial_rope": (lambda: DiMR(**DIMR, position="axial_rope"), FLOW),
    "lamamba": (lambda: LaMamba(**LAMAMBA), FLOW),
    "rin": (lambda: RIN(**RIN_), EDM()),
    "snap_video": (lambda: FIT(**FIT_), EDM()),
    "causal_video": (lambda: CausalVideo(**VIDEO, input_size=(3, 8, 8)), DiffusionForcing()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_preset_that_is_not_refused_samples(kind: str) -> None:
    make, objective = KINDS[kind]
    torch.manual_seed(0)
    model = make().eval()
    native, guided = model.sample_shape[-2:], ClassifierFree(2.0)
    target = 2 * native[0], 2 * native[1]
    sampled = set()
    for name in presets():
        preset = preset_named(name)
        if refusal(model, preset, native, target) is not None:
            continue
        with torch.no_grad():
            latents = sample_scaled(
                Euler(2),
                lambda sides: guided.wrap(
                    objective.view(model, shape=(*model.sample_shape[:-2], *sides))
                ),
                model.example_condition("cpu"),
                torch.tensor([3]),
                model=model,
                native=native,
                target=target,
                preset=preset,
                images=lambda latents: latents[:, :3],
            ).latents
        assert latents.shape == (1, *model.sample_shape[:-2], *target), name
        assert latents.isfinite().all(), name
        assert not any(module._forward_hooks for module in model.modules()), name
        sampled.add(name)
    assert {"none", "multidiffusion", "sdedit", "demofusion", "hiflow"} <= sampled
