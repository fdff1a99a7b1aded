"""Epsilon-greedy search: each step's noise is improved, beginning with the plain one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from genscale.errors import ConfigError
from genscale.samplers.ode import Euler
from genscale.samplers.sde import DDIM
from genscale.search.budget import Budget
from genscale.search.epsilon_greedy import EpsilonGreedy
from genscale.search.plain import PlainSampling
from tests.search.families import world as world_of

STOCHASTIC = ["dit-ddpm", "var"]  # with their usual samplers


@pytest.mark.parametrize("family", STOCHASTIC)
def test_one_candidate_is_plain_sampling(family: str) -> None:
    world = world_of(family)
    plain = PlainSampling().run(world.engine())
    result = EpsilonGreedy(1, rounds=1).run(world.engine())
    assert torch.equal(result.latents, plain.latents)
    assert result.cost.nfe.tolist() == plain.cost.nfe.tolist()


@pytest.mark.parametrize("family", STOCHASTIC)
def test_the_plain_noise_competes(family: str) -> None:
    """A candidate that is never better than the plain noise changes nothing."""
    world = world_of(family)
    plain = PlainSampling().run(world.engine())
    still = EpsilonGreedy(3, rounds=2, epsilon=0.0, radius=1e-12).run(world.engine())
    torch.testing.assert_close(still.latents, plain.latents, atol=1e-4, rtol=1e-4)


class TestCosts:
    def test_of_diffusion(self, engines: Any) -> None:
        result = EpsilonGreedy(3, rounds=4).run(engines(sampler=DDIM(5, eta=1.0)))
        assert result.cost.nfe.tolist() == [1.0 + 3 * 4 * 4] * 2  # 1 + K N (T - 1)
        assert result.cost.reward_calls.tolist() == [3.0 * 4 * 4 + 1] * 2

    def test_of_guided_diffusion(self) -> None:
        result = EpsilonGreedy(2, rounds=2).run(world_of("dit-ddpm").engine())
        assert result.cost.nfe.tolist() == [2 * (1.0 + 2 * 2 * 3)] * 3

    def test_of_scales(self) -> None:
        world = world_of("var")
        result = EpsilonGreedy(3, rounds=2).run(world.engine())
        assert result.cost.nfe.tolist() == [world.costs.total] * 3
        assert result.cost.reward_calls.tolist() == [3.0 * 2 * 4] * 3


class TestBudget:
    @pytest.mark.parametrize("nfe", [4, 7, 18, 30])
    def test_null_takes_what_it_allows(self, engines: Any, nfe: int) -> None:
        result = EpsilonGreedy(4, rounds=None).run(engines(budget=Budget(nfe=nfe)))
        assert result.cost.nfe.tolist() == [float(nfe)] * 2  # the last round of a step is shorter
        assert result.finished.all()

    def test_rewards_too(self) -> None:
        world = world_of("var")
        result = EpsilonGreedy(3, rounds=None).run(world.engine(budget=Budget(reward_calls=23)))
        assert result.cost.reward_calls.tolist() == [23.0] * 3  # 5, 6, 6, 6


def test_more_rounds_never_lower_the_reward_of_a_step(engines: Any) -> None:
    # two steps, of which one draws noise: what is chosen there is what comes out
    best = [
        EpsilonGreedy(3, rounds=k).run(engines(prompts=8, sampler=DDIM(2, eta=1.0)))
        for k in (1, 2, 4, 8)
    ]
    rewards = torch.stack([each.rewards["reward"] for each in best])
    assert bool((rewards.diff(dim=0) >= 0).all())
    assert float(rewards[-1].mean()) > float(rewards[0].mean()) + 0.05


def test_candidates_near_the_best_keep_its_norm(engines: Any) -> None:
    seen = []

    class Watched(DDIM):
        def advance(self, model: Any, state: Any, noise: Any = None) -> Any:
            seen.append(noise)
            return super().advance(model, state, noise)

    EpsilonGreedy(3, rounds=3, epsilon=0.0, radius=0.5).run(
        engines(prompts=1, sampler=Watched(2, eta=1.0))
    )
    noises = torch.cat([noise for noise in seen if noise is not None]).flatten(1)
    norms = noises.norm(dim=1)
    torch.testing.assert_close(norms, norms[:1].expand(len(norms)))
    assert len({tuple(noise.tolist()) for noise in noises}) == 9


@pytest.mark.parametrize("family", STOCHASTIC)
def test_micro_batches_and_other_prompts_change_nothing(family: str) -> None:
    world, search = world_of(family), EpsilonGreedy(3, rounds=2)
    whole = search.run(world.engine())
    parts = search.run(world.engine(micro_batch=4))
    alone = search.run(world.engine(prompts=slice(1, 2)))
    torch.testing.assert_close(parts.latents, whole.latents, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(alone.latents, whole.latents[1:2], atol=1e-4, rtol=1e-4)


class TestRefusals:
    def test_deterministic_samplers(self, engines: Any) -> None:
        with pytest.raises(ConfigError, match="EpsilonGreedy needs a sampler that draws noise"):
            EpsilonGreedy().run(engines(sampler=Euler(4)))

    def test_numbers_out_of_range(self) -> None:
        with pytest.raises(ConfigError, match="must be at least 1, but are 4 and 0"):
            EpsilonGreedy(rounds=0)
        with pytest.raises(ConfigError, match=r"search.epsilon must lie in \[0, 1\]"):
            EpsilonGreedy(epsilon=1.5)
