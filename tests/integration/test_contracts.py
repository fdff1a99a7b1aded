"""Whatever conf/ names keeps the contract of its room; a new option is checked by being there."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

from genscale import rng
from genscale.autoencoders.base import Autoencoder, Variational
from genscale.backbones.base import Backbone
from genscale.cli.app import conf_directory
from genscale.cli.building import instantiate
from genscale.cli.resolvers import register_resolvers
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.guidance.autoguidance import Autoguidance
from genscale.guidance.base import Guidance
from genscale.metrics.features import FeatureNetwork
from genscale.metrics.suite import EvaluationSuite
from genscale.objectives.base import Batch, Denoiser, LossOutput, Objective
from genscale.rng import StepRandom
from genscale.samplers.base import Sampler
from genscale.training.ema import EMA
from genscale.training.lr_schedule import Schedule

CONF = conf_directory()
CONTRACTS = {
    "autoencoder": Autoencoder,
    "objective": Objective,
    "sampler": Sampler,
    "guidance": Guidance,
    "ema": EMA,
    "lr_schedule": Schedule,
    "metrics": EvaluationSuite,
}
# name nothing of their own
FROM_A_RUN = {(group, "run") for group in ("sampler", "guidance", "autoencoder", "metrics")}


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def build(group: str, option: str, *words: str) -> Any:
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides=[f"{group}={option}", *words])
    return instantiate(cfg[group], group)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    words = ("data.resolution=8", "model.hidden_sizes=[16,8]", "model.depths=[1,1]")
    return build("model", "dimr", *words, "model.num_heads=2").eval()


@pytest.mark.parametrize(
    ("group", "option"),
    [(g, o) for g in CONTRACTS for o in options(g) if (g, o) not in FROM_A_RUN],
)
def test_an_option_is_what_its_group_promises(group: str, option: str) -> None:
    built = build(group, option)
    assert isinstance(built, CONTRACTS[group])
    if isinstance(built, EvaluationSuite):
        assert built.networks
        assert all(isinstance(network, FeatureNetwork) for network in built.networks)


class TestAutoencoders:
    @pytest.mark.parametrize("option", [o for o in options("autoencoder") if o != "run"])
    def test_pictures_come_back(self, option: str) -> None:
        autoencoder: Autoencoder = build("autoencoder", option)
        if isinstance(autoencoder, Variational):  # weights are files: tests/autoencoders/test_kl.py
            assert autoencoder.check(encodes=True, decodes=True)
            return
        side = 8 * autoencoder.downsample
        images = torch.linspace(-1, 1, side * side).view(1, 1, side, side)
        latents = autoencoder.encode(images)
        assert latents.shape == (1, autoencoder.latent_channels, 8, 8)
        assert autoencoder.decode(latents).shape[-2:] == images.shape[-2:]


class TestObjectives:
    @pytest.mark.parametrize("option", options("objective"))
    def test_a_loss_is_a_function_of_seed_and_positions(
        self, option: str, backbone: Backbone
    ) -> None:
        objective: Objective = build("objective", option)
        clean = torch.linspace(-1, 1, 4 * 64).view(4, 1, 8, 8)
        batch = Batch(
            clean=clean,
            cond=Conditioning(labels=torch.arange(4)),
            position=torch.arange(4) + 100,
        )
        numbers = rng.for_step(0, batch.position)
        assert isinstance(numbers, StepRandom)
        first = objective.loss(backbone, batch, numbers)
        torch.rand(10)  # torch's own generator plays no part
        again = objective.loss(backbone, batch, rng.for_step(0, batch.position))
        assert isinstance(first, LossOutput)
        assert torch.equal(first.loss, again.loss)
        assert first.loss.ndim == 0
        assert first.loss.requires_grad
        assert first.per_sample.shape == (4,)
        assert all(not term.requires_grad for term in first.terms.values())
        other = objective.loss(backbone, batch, rng.for_step(1, batch.position))
        assert not torch.equal(first.loss, other.loss)

    @pytest.mark.parametrize("option", options("objective"))
    def test_samplers_see_a_denoiser(self, option: str, backbone: Backbone) -> None:
        view = build("objective", option).view(backbone)
        assert isinstance(view, Denoiser)
        assert tuple(view.sample_shape) == (1, 8, 8)


# samplers whose levels are those of one process, with the objective that has it
SUITS = {
    "ancestral": ("ddpm", "sampler.variance=upper"),
    "edm": ("edm",),
    "dopri5": ("flow", "sampler.rtol=0.1", "sampler.atol=0.01"),
}


@pytest.fixture(scope="module")
def weak(backbone: Backbone) -> Backbone:
    """Stands for an earlier checkpoint."""
    earlier = copy.deepcopy(backbone)
    with torch.no_grad():
        for parameter in earlier.parameters():
            parameter *= 0.9
    return earlier


class TestGuidance:
    @pytest.mark.parametrize("option", [o for o in options("guidance") if o != "run"])
    @pytest.mark.parametrize("sampler", [o for o in options("sampler") if o != "run"])
    def test_every_sampler_runs_with_every_guidance(
        self, option: str, sampler: str, backbone: Backbone, weak: Backbone
    ) -> None:
        guidance: Guidance = build("guidance", option)
        objective, *settings = SUITS.get(sampler, ("flow",))
        solver: Sampler = build("sampler", sampler, "sampler.steps=4", *settings)
        unguided = build("objective", objective).view(backbone)
        if objective == "ddpm" and option == "cfg_zero_star":
            with pytest.raises(ConfigError, match="guides the velocity of a flow"):
                guidance.wrap(unguided)
            return
        if isinstance(guidance, Autoguidance):  # its config names a model, here is one
            guidance = guidance.led_by(build("objective", objective).view(weak), "weak")
        view = guidance.wrap(unguided)
        with torch.no_grad():
            state = solver.run(
                view, Conditioning(labels=torch.arange(2)), rng.sample_seeds(0, 0, 2)
            )
        samples = solver.finish(state)
        assert samples.shape == (2, 1, 8, 8)
        assert torch.isfinite(samples).all()
        # one branch costs the closed form; guidance at most the double
        branches = state.nfe / solver.nfe(0, solver.num_steps)
        assert bool(((branches >= 1) | solver.nfe_is_bound).all())
        assert bool((branches <= 2).all())


class TestSchedules:
    @pytest.mark.parametrize("option", options("lr_schedule"))
    def test_factors_lie_between_nothing_and_the_peak(self, option: str) -> None:
        schedule: Schedule = build("lr_schedule", option)
        factors = [schedule.factor(step, 3000) for step in range(3000)]
        assert all(0 <= factor <= 1 for factor in factors)
        assert max(factors) == 1
        assert factors[0] > 0  # the first step moves, too

    @pytest.mark.parametrize("option", options("ema"))
    def test_an_average_keeps_a_share_below_one(self, option: str) -> None:
        main: EMA = build("ema", option)
        assert main.laws()[0].name == main.name  # the others are kept beside it
        assert len({law.name for law in main.laws()}) == len(main.laws())
        for law in (main, *main.laws()):
            shares = [law.decay_at(step) for step in (1, 2, 10, 1000, 10**6)]
            assert all(0 <= share < 1 for share in shares)
            assert shares == sorted(shares)  # an average remembers longer and longer


def test_every_group_of_contracts_has_options() -> None:
    assert all(options(group) for group in CONTRACTS)
    assert Path(CONF).is_dir()
