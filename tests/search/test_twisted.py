"""Twisted particle filters: exact weights, gradients, and what they cost."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from genscale.errors import ConfigError
from genscale.rewards.base import Request, Reward, RewardOutput
from genscale.samplers.reverse_sde import ReverseSDE
from genscale.samplers.sde import DDIM
from genscale.search.budget import Budget
from genscale.search.frozen import networks
from genscale.search.particles import FeynmanKac
from genscale.search.plain import PlainSampling
from genscale.search.twisted import TwistedSMC, pulled, reward_slopes
from tests.search.closed_form import TILT, TILTED_MEAN, gaussian, plane, weighted_means
from tests.search.conftest import Brightness, squash
from tests.search.families import world

NEVER = 1e-9  # a threshold at which nothing is resampled


class TestKnownTarget:
    @pytest.mark.parametrize("tempering", [None, "geometric", "adaptive"])
    def test_the_weighted_mean_is_that_of_the_target(self, tempering: Any) -> None:
        search = TwistedSMC(32, strength=1.0, tempering=tempering, returns="all")
        means, result = weighted_means(search, plane(120))
        # measured 0.05, 0.07 and 0.04; 64 particles without gradients: 0.11
        assert float((means.mean(0) - TILTED_MEAN).norm()) <= 0.2
        assert bool((result.extra["share"][:, -1] == 1.0).all())

    def test_weights_of_a_linear_reward_on_a_gaussian_become_even_as_steps_grow(self) -> None:
        """There the twist is the value function itself, up to the error of a step."""
        spread = []
        for steps in (12, 24, 48, 96):
            search = TwistedSMC(512, strength=1.0, threshold=NEVER, returns="all")
            result = search.run(plane(1, steps, model=gaussian()))
            spread.append(float(result.extra["log_weights"].var()))
        # measured 0.056, 0.020, 0.0064, 0.0018
        assert all(fine < 0.5 * coarse for coarse, fine in pairwise(spread))
        plain = FeynmanKac(512, strength=1.0, potential="is", returns="all")
        without = plain.run(plane(1, 48, model=gaussian())).extra["log_weights"].var()
        # lambda^2 |a|^2 std^2 = 1.8 * 0.64
        assert float(without) == pytest.approx(1.15, rel=0.2)
        assert spread[2] < 0.01 * float(without)

    def test_its_particles_are_draws_from_the_target_themselves(self) -> None:
        """A Gaussian tilted by a x: the same spread, moved by std^2 a."""
        search = TwistedSMC(512, strength=1.0, threshold=NEVER, returns="all")
        result = search.run(plane(1, 96, model=gaussian()))
        moved = torch.tensor([0.5, -0.3]) + 0.64 * TILT
        torch.testing.assert_close(result.latents.mean(0), moved, atol=0.15, rtol=0.0)


class TestSteps:
    def test_the_gradient_is_that_of_the_reward_of_the_clean_estimate(self) -> None:
        engine = plane(1, 10, model=gaussian())
        state = engine.run(engine.start(5), until=4)
        after, scores, slopes = reward_slopes(engine, state)
        # clean = m + alpha s^2 / v (x - alpha m), v = alpha^2 s^2 + sigma^2, at alpha = 0.4
        factor = 0.4 * 0.64 / (0.16 * 0.64 + 0.36)
        torch.testing.assert_close(slopes, (factor * TILT).expand(5, -1), rtol=1e-4, atol=1e-5)
        assert after.clean is not None
        expected = (after.clean @ TILT).double()
        torch.testing.assert_close(scores.value, expected, rtol=1e-4, atol=1e-5)
        assert not after.clean.requires_grad
        assert torch.equal(after.x, state.x)

    @pytest.mark.parametrize(
        "sampler", [DDIM(6, eta=1.0), DDIM(6, eta=0.4), ReverseSDE(6)], ids=["1", "0.4", "sde"]
    )
    def test_the_log_ratio_is_that_of_the_densities(self, engines: Any, sampler: Any) -> None:
        engine = engines(sampler=sampler)
        state = engine.evaluate(engine.run(engine.start(3), until=2))
        mean, std = sampler.transition(state)
        push = torch.linspace(-2.0, 2.0, state.x.numel()).view_as(state.x)
        after, log_ratio = pulled(engine, state, push)
        width = std.view(-1, 1, 1, 1)
        moved = torch.distributions.Normal(mean + width**2 * push, width)
        log_p = sampler.log_prob(state, after.x)
        log_q = moved.log_prob(after.x.double()).flatten(1).sum(1)
        torch.testing.assert_close(log_ratio, log_p - log_q, rtol=1e-4, atol=1e-4)

    def test_a_step_without_a_push_is_the_samplers(self, engines: Any) -> None:
        engine = engines()
        state = engine.evaluate(engine.start(3))
        after, log_ratio = pulled(engine, state, torch.zeros_like(state.x))
        assert torch.equal(after.x, engine.advance(state).x)
        assert log_ratio.abs().max() == 0.0

    def test_what_is_not_finite_pulls_nothing(self, engines: Any) -> None:
        class Broken(Brightness):
            def loss(self, images: Tensor, handle: Any, index: Tensor) -> Tensor:
                return -torch.sqrt(images.flatten(1).mean(1) - 0.5)  # NaN for dark pictures

        engine = engines(reward=Broken())
        _, _, slopes = reward_slopes(engine, engine.run(engine.start(8), until=2))
        assert bool(slopes.isfinite().all())
        dark = slopes.flatten(1).abs().sum(1) == 0
        assert 0 < int(dark.sum()) < 16


class TestPlain:
    def test_no_strength(self, engines: Any) -> None:
        plain = PlainSampling().run(engines())
        result = TwistedSMC(3, strength=0.0).run(engines())
        assert torch.equal(result.latents, plain.latents)
        assert result.cost.backward_calls.tolist() == [0.0, 0.0]

    def test_a_strength_too_small_to_matter_comes_near_it(self, engines: Any) -> None:
        plain = PlainSampling().run(engines())
        search = TwistedSMC(1, strength=1e-6)
        torch.testing.assert_close(search.run(engines()).latents, plain.latents)


class TestCost:
    def test_evaluations_ways_back_and_rewards(self, engines: Any) -> None:
        result = TwistedSMC(3).run(engines())
        assert result.cost.nfe.tolist() == [12.0, 12.0]  # 3 particles of 4 steps
        assert result.cost.backward_calls.tolist() == [12.0, 12.0]
        assert result.cost.reward_calls.tolist() == result.cost.decodes.tolist() == [15.0, 15.0]

    def test_a_way_back_counts_as_two_evaluations(self, engines: Any) -> None:
        result = TwistedSMC(None).run(engines(budget=Budget(nfe=30)))
        assert result.cost.nfe.tolist() == [8.0, 8.0]  # two particles of 4 + 8
        assert result.finished.all()
        with pytest.raises(ConfigError, match=r"budget.nfe=11 is smaller than the 12"):
            TwistedSMC().run(engines(budget=Budget(nfe=11)))

    @pytest.mark.parametrize("micro_batch", [1, 4])
    def test_micro_batches_change_nothing_but_memory(self, engines: Any, micro_batch: int) -> None:
        whole = TwistedSMC(5, strength=30.0).run(engines(prompts=3))
        engine = engines(prompts=3, micro_batch=micro_batch)
        parts = TwistedSMC(5, strength=30.0).run(engine)
        torch.testing.assert_close(parts.latents, whole.latents)
        torch.testing.assert_close(parts.extra["log_weights"], whole.extra["log_weights"])
        assert max(engine.model.calls) <= micro_batch

    def test_graphs_are_those_of_one_micro_batch(self, engines: Any) -> None:
        """The next way forward begins when nothing of the last graph is left."""
        alive: list[int] = []
        graphs: list[int] = []

        def decode(latents: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return squash(latents)

            def packed(tensor: Tensor) -> Tensor:
                graphs.append(1)
                return tensor

            alive.append(len(graphs))
            with torch.autograd.graph.saved_tensors_hooks(packed, lambda x: (graphs.clear(), x)[1]):
                return squash(latents)

        TwistedSMC(6).run(engines(prompts=1, micro_batch=2, decode=decode))
        assert len(alive) == 3 * 4  # micro-batches of all steps
        assert set(alive) == {0}


def test_weights_that_may_learn_get_no_gradients() -> None:
    made = world("dit-ddpm")
    weights = [weight for network in networks(made.model) for weight in network.parameters()]
    assert weights
    for weight in weights:
        weight.requires_grad_(True)
    try:
        result = TwistedSMC(2, strength=5.0).run(made.engine())
        assert all(weight.requires_grad and weight.grad is None for weight in weights)
    finally:  # other tests share the model
        for weight in weights:
            weight.requires_grad_(False)
    assert result.cost.backward_calls.tolist() == [2 * made.costs.total] * 3  # both branches
    assert bool(result.latents.isfinite().all())


class TestRefusals:
    def test_scale_wise_models(self) -> None:
        with pytest.raises(ConfigError, match="works on diffusion models, but the model is scale"):
            TwistedSMC().run(world("var").engine())

    def test_samplers_without_a_density(self) -> None:
        with pytest.raises(ConfigError, match="needs steps of known density"):
            TwistedSMC().run(world("dimr-flow").engine())

    def test_samplers_without_noise(self, engines: Any) -> None:
        with pytest.raises(ConfigError, match="DDIM is deterministic"):
            TwistedSMC().run(engines(sampler=DDIM(4)))

    def test_rewards_without_a_gradient(self, engines: Any) -> None:
        class Blunt(Reward):
            def score(self, images: Tensor, handle: tuple[Request, ...], index: Tensor) -> Any:
                return RewardOutput(images.flatten(1).mean(1))

        with pytest.raises(ConfigError, match="follows the gradient of the reward, but Blunt"):
            TwistedSMC().run(engines(reward=Blunt()))

    def test_decoders_that_keep_gradients_back(self, engines: Any) -> None:
        with pytest.raises(ConfigError, match="does not reach the sample: the decoder"):
            TwistedSMC().run(engines(decode=lambda latents: squash(latents.detach())))

    def test_settings(self) -> None:
        with pytest.raises(ConfigError, match=r"search.strength must be a number, but is 'auto'"):
            TwistedSMC(strength="auto")  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"search.gamma must be positive"):
            TwistedSMC(gamma=0.0)


def test_labels_tell_what_changes_the_results() -> None:
    assert TwistedSMC().label == "TwistedSMC(4, strength 10, ESS 0.5, ssp)"
    das = TwistedSMC(strength=100, tempering="geometric", returns="argmax_weight")
    assert das.label == (
        "TwistedSMC(4, strength 100, ESS 0.5, ssp, geometric 0.008 tempering, argmax_weight)"
    )
