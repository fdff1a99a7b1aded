"""Parts that do not fit are found from the config alone, without a model."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from genscale.cli.combinations import combination_problems, family_problems, model_setting
from genscale.guidance.base import Unguided
from genscale.guidance.cfg import ClassifierFree
from genscale.guidance.scale_wise import ScaleGuidance
from genscale.guidance.zero_star import ZeroStar
from genscale.objectives.ddpm import DDPM
from genscale.objectives.denoising import DenoisingObjective
from genscale.objectives.edm import EDM
from genscale.objectives.flow import FlowMatching
from genscale.objectives.next_scale import NextScale
from genscale.samplers.next_scale import NextScale as Decoding
from genscale.samplers.ode import Euler

DIT = "genscale.backbones.dit.DiT"
DIMR = "genscale.backbones.dimr.DiMR"
FIT = "genscale.backbones.fit.FIT"
VAR = "genscale.backbones.var.VAR"


@pytest.mark.parametrize(
    ("node", "value"),
    [
        ({"_target_": DIT, "learn_sigma": True}, True),
        ({"_target_": DIT}, False),  # the constructor's default
        ({"_target_": DIMR}, None),  # no such setting
    ],
)
def test_a_setting_of_the_model_is_read_without_building_it(node: dict, value: bool) -> None:
    assert model_setting(OmegaConf.create(node), "learn_sigma") is value


@pytest.mark.parametrize(
    ("learn_sigma", "objective", "words"),
    [
        (False, FlowMatching(), None),
        (False, DDPM(), None),
        (True, DDPM(learn_sigma=True), None),
        (True, FlowMatching(ignore_variance=True), None),
        (True, FlowMatching(), "does not train it"),
        (True, DDPM(), "does not train it"),
        (False, DDPM(learn_sigma=True), "Pass model.learn_sigma=true"),
    ],
)
def test_a_learned_variance_needs_both_sides(
    learn_sigma: bool, objective: FlowMatching | DDPM, words: str | None
) -> None:
    model = OmegaConf.create({"_target_": DIT, "learn_sigma": learn_sigma})
    problems = combination_problems(model, objective, Unguided(), None)
    assert len(problems) == (0 if words is None else 1)
    assert words is None or words in problems[0]


@pytest.mark.parametrize("objective", [FlowMatching, DDPM, EDM])
def test_only_networks_that_remember_learn_to_use_it(objective: type[DenoisingObjective]) -> None:
    asked = objective(self_conditioning=0.9)  # type: ignore[call-arg]  # of all three
    assert combination_problems(OmegaConf.create({"_target_": FIT}), asked, None, None) == []
    node = OmegaConf.create({"_target_": DIT})
    (problem,) = combination_problems(node, asked, None, None)
    assert "DiT remembers nothing. Pass objective.self_conditioning=0." in problem
    assert combination_problems(node, objective(), None, None) == []  # type: ignore[call-arg]


def test_guidance_of_velocities_needs_one() -> None:
    model = OmegaConf.create({"_target_": DIT})
    assert combination_problems(model, FlowMatching(), ZeroStar(), None) == []
    assert combination_problems(model, DDPM(betas="continuous"), ZeroStar(), None) == []
    (problem,) = combination_problems(model, DDPM(), ZeroStar(), None)
    assert "guides the velocity of a flow" in problem


@pytest.mark.parametrize(
    ("target", "objective", "guidance", "sampler", "words"),
    [
        (VAR, NextScale(), ScaleGuidance(2.0), Decoding(3), []),
        (VAR, NextScale(), Unguided(), Decoding(3), []),
        (DIT, FlowMatching(), ClassifierFree(2.0), Euler(3), []),
        (VAR, FlowMatching(), Unguided(), Decoding(3), ["VAR is a scale-wise model. Give objecti"]),
        (DIT, NextScale(), Unguided(), Euler(3), ["DiT is a diffusion model. Give objective=flow"]),
        (VAR, NextScale(), Unguided(), Euler(3), ["sampler=Euler is for a diffusion model"]),
        (DIT, FlowMatching(), Unguided(), Decoding(3), ["sampler=NextScale is for a scale-wise"]),
        (VAR, NextScale(), ClassifierFree(2.0), None, ["does not guide a scale-wise model"]),
        (
            *(DIT, FlowMatching(), ScaleGuidance(2.0), Decoding(3)),
            ["Give sampler=sde", "Give guidance=cfg, or guidance=none"],
        ),
    ],
)
def test_parts_are_of_one_family(
    target: str,
    objective: FlowMatching | NextScale,
    guidance: ClassifierFree | ScaleGuidance | Unguided,
    sampler: Euler | Decoding | None,
    words: list[str],
) -> None:
    model = OmegaConf.create({"_target_": target})
    problems = family_problems(model, objective, guidance, sampler)
    assert len(problems) == len(words)
    assert all(word in problem for word, problem in zip(words, problems, strict=True))
    assert combination_problems(model, objective, guidance, sampler) == problems


def test_parts_that_could_not_be_built_are_told_of_elsewhere() -> None:
    model = OmegaConf.create({"_target_": DIT, "learn_sigma": True})
    assert combination_problems(model, None, None, None) == []
