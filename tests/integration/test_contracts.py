"""Whatever conf/ names keeps the contract of its room; a new option is checked by being there."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

from genscale import rng
from genscale.autoencoders.base import Autoencoder
from genscale.autoencoders.msvq import MSVQ
from genscale.backbones.base import Backbone
from genscale.backbones.causal_video import CausalVideo
from genscale.backbones.var import VAR
from genscale.cli.app import conf_directory
from genscale.cli.building import instantiate
from genscale.cli.resolvers import register_resolvers
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.guidance.autoguidance import Autoguidance
from genscale.guidance.base import Guidance
from genscale.guidance.oscillating import Oscillating
from genscale.metrics.features import FeatureNetwork
from genscale.metrics.suite import EvaluationSuite
from genscale.objectives.base import Batch, Denoiser, LossOutput, Objective, ScaleDecoder
from genscale.rng import StepRandom
from genscale.samplers.base import Sampler
from genscale.samplers.blocks import Blocks
from genscale.samplers.grid import GridSampler
from genscale.training.ema import EMA
from genscale.training.lr_schedule import Schedule
from genscale.training.trainable import TrainableRecipe

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
BLOCK_OBJECTIVES = ("DiffusionForcing", "TeacherForcing", "SelfForcing")
# name nothing of their own
FROM_A_RUN = {(group, "run") for group in ("sampler", "guidance", "autoencoder", "metrics")}
FROM_A_RUN.add(("sampler", "none"))


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@cache
def family_of(group: str, option: str) -> str:
    """Return what an option is for: scale-wise, block-causal or other models, or autoencoders."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        target = str(compose(f"{group}/{option}")[group]._target_)
    if target.startswith("genscale.training."):
        return "autoencoder"
    name = target.rpartition(".")[2]
    if name in ("NextScale", "ScaleGuidance"):
        return "scale_wise"
    return "blocks" if name in ("Blocks", *BLOCK_OBJECTIVES) else "diffusion"


def of_family(group: str, family: str) -> list[str]:
    found = [o for o in options(group) if (group, o) not in FROM_A_RUN]
    return [o for o in found if family_of(group, o) == family]


def build(group: str, option: str, *words: str) -> Any:
    return instantiate(chosen(group, option, *words), group)


@cache  # the same few settings are built for every pair below
def chosen(group: str, option: str, *words: str) -> Any:
    register_resolvers()
    models = {"scale_wise": ("model=var",), "blocks": ("model=causal_video",)}
    model = models.get(family_of(group, option), ()) if group == "sampler" else ()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=[*model, f"{group}={option}", *words])[group]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    words = ("data.resolution=8", "model.hidden_sizes=[16,8]", "model.depths=[1,1]")
    return build("model", "dimr", *words, "model.num_heads=2").eval()


@pytest.fixture(scope="module")
def remembering() -> Backbone:
    """A backbone with self-conditioning."""
    torch.manual_seed(0)
    words = ("data.resolution=8", "model.tape_width=8", "model.latent_width=16", "model.depth=1")
    return build("model", "rin", *words, "model.num_heads=2", "model.head_size=8").eval()


@pytest.fixture(scope="module")
def causal() -> Backbone:
    """A block-causal backbone of clips of four frames."""
    torch.manual_seed(0)
    network = CausalVideo(
        input_size=[4, 8, 8], in_channels=1, patch_size=4, hidden_size=16, depth=1, num_heads=2,
        mlp_size=16, block_size=2, num_classes=5,
    )  # fmt: skip
    for parameter in network.parameters():  # the last layer starts at zero
        torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


@pytest.mark.parametrize(
    ("group", "option"),
    [(g, o) for g in CONTRACTS for o in options(g) if (g, o) not in FROM_A_RUN],
)
def test_an_option_is_what_its_group_promises(group: str, option: str) -> None:
    built = build(group, option)
    recipe = group == "objective" and family_of(group, option) == "autoencoder"
    assert isinstance(built, TrainableRecipe if recipe else CONTRACTS[group])
    if isinstance(built, EvaluationSuite):
        assert built.networks or built.single_measures
        assert all(isinstance(network, FeatureNetwork) for network in built.networks)


class TestAutoencoders:
    @pytest.mark.parametrize("option", [o for o in options("autoencoder") if o != "run"])
    def test_pictures_come_back(self, option: str) -> None:
        autoencoder: Autoencoder = build("autoencoder", option)
        if autoencoder.check(encodes=True, decodes=True):  # weights are files: tests/autoencoders
            assert option != "identity"
            return
        side = 8 * autoencoder.downsample
        images = torch.linspace(-1, 1, side * side).view(1, 1, side, side)
        latents = autoencoder.encode(images)
        assert latents.shape == (1, autoencoder.latent_channels, 8, 8)
        assert autoencoder.decode(latents).shape[-2:] == images.shape[-2:]


class TestObjectives:
    @pytest.mark.parametrize("option", of_family("objective", "diffusion"))
    def test_a_loss_is_a_function_of_seed_and_positions(
        self, option: str, backbone: Backbone, remembering: Backbone
    ) -> None:
        objective: Objective = build("objective", option)
        if getattr(objective, "self_conditioning", 0.0) > 0.0:
            backbone = remembering
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

    @pytest.mark.parametrize("option", of_family("objective", "blocks"))
    def test_a_loss_of_clips_is_one_too(self, option: str, causal: Backbone) -> None:
        objective: Objective = build("objective", option)
        batch = Batch(
            clean=torch.linspace(-1, 1, 4 * 256).view(4, 1, 4, 8, 8),
            cond=Conditioning(labels=torch.arange(4)),
            position=torch.arange(4) + 100,
        )
        if option == "self_forcing":  # trains two networks: tests/objectives/test_self_forcing.py
            with pytest.raises(ConfigError, match="trains a generator and a critic"):
                objective.loss(causal, batch, rng.for_step(0, batch.position))
            return
        first = objective.loss(causal, batch, rng.for_step(0, batch.position))
        torch.rand(10)
        again = objective.loss(causal, batch, rng.for_step(0, batch.position))
        assert torch.equal(first.loss, again.loss)
        assert first.loss.requires_grad
        assert first.per_sample.shape == (4,)
        other = objective.loss(causal, batch, rng.for_step(1, batch.position))
        assert not torch.equal(first.loss, other.loss)

    @pytest.mark.parametrize("option", of_family("objective", "blocks"))
    def test_samplers_see_a_denoiser_of_clips(self, option: str, causal: Backbone) -> None:
        view = build("objective", option).view(causal)
        assert isinstance(view, Denoiser)
        assert tuple(view.sample_shape) == (1, 4, 8, 8)

    @pytest.mark.parametrize("option", of_family("objective", "scale_wise"))
    def test_tokens_are_predicted(self, option: str, tokens: tuple[VAR, MSVQ]) -> None:
        network, tokenizer = tokens
        objective: Objective = build("objective", option)
        ids = torch.arange(3 * 5).view(3, 5)
        batch = Batch(
            clean=ids,
            cond=Conditioning(labels=torch.arange(3)),
            position=torch.arange(3),
            features=tokenizer.features(ids),
        )
        out = objective.loss(network, batch, rng.for_step(0, batch.position))
        assert isinstance(out, LossOutput)
        assert out.loss.requires_grad
        assert out.per_sample.shape == (3,)
        view = objective.view(network, tokenizer)
        assert isinstance(view, ScaleDecoder)
        assert tuple(view.sample_shape) == (4, 2, 2)

    @pytest.mark.parametrize("option", of_family("objective", "diffusion"))
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


@pytest.fixture(scope="module")
def tokens() -> tuple[VAR, MSVQ]:
    torch.manual_seed(0)
    sizes = {"scales": [1, 2], "latent_channels": 4, "vocab_size": 16}
    network = VAR(**sizes, num_classes=5, hidden_size=16, depth=1, num_heads=2)
    tokenizer = MSVQ(
        **sizes, hidden_size=8, channel_multipliers=(1, 2), num_blocks=1, norm_groups=4
    )
    return network.eval(), tokenizer.eval().requires_grad_(False)


class TestScaleWise:
    @pytest.mark.parametrize("option", ["none", *of_family("guidance", "scale_wise")])
    @pytest.mark.parametrize("sampler", of_family("sampler", "scale_wise"))
    def test_every_sampler_runs_with_every_guidance(
        self, option: str, sampler: str, tokens: tuple[VAR, MSVQ]
    ) -> None:
        words = () if option == "none" else ("guidance.scale=3",)
        guidance: Guidance = build("guidance", option, *words)
        solver: Sampler = build("sampler", sampler, "sampler.num_scales=2")
        view = guidance.wrap(build("objective", "next_scale").view(*tokens))
        with torch.no_grad():
            state = solver.run(
                view, Conditioning(labels=torch.arange(3)), rng.sample_seeds(0, 0, 3)
            )
        assert solver.finish(state).shape == (3, 4, 2, 2)
        branches = 1 if option == "none" else 2
        assert state.nfe.tolist() == [branches * solver.nfe(0, 2)] * 3


class TestGuidance:
    @pytest.mark.parametrize("option", of_family("guidance", "diffusion"))
    @pytest.mark.parametrize("sampler", of_family("sampler", "diffusion"))
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
        if isinstance(guidance, Oscillating):
            levels = solver.levels(unguided.process) if isinstance(solver, GridSampler) else None
            if levels is None:
                with pytest.raises(ConfigError, match="no grid of levels"):
                    guidance.along(None)
                return
            guidance = guidance.along(levels)
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

    @pytest.mark.parametrize("option", of_family("guidance", "diffusion"))
    def test_videos_are_guided_block_by_block(self, option: str, causal: Backbone) -> None:
        guidance: Guidance = build("guidance", option)
        if isinstance(guidance, Oscillating | Autoguidance):
            pytest.skip("needs a grid of levels, or a second network")
        solver = Blocks(steps=2, block_size=2, trained_frames=4, frames=6)
        unguided = build("objective", "diffusion_forcing").view(causal)
        with torch.no_grad():
            state = solver.run(
                guidance.wrap(unguided),
                Conditioning(labels=torch.arange(2)),
                rng.sample_seeds(0, 0, 2),
            )
        samples = solver.finish(state)
        assert samples.shape == (2, 1, 6, 8, 8)
        assert torch.isfinite(samples).all()


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
