"""Rollover budget forcing: every prompt at its own step, saving what easy steps leave."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from genscale.errors import ConfigError
from genscale.samplers.ode import Euler
from genscale.samplers.sde import DDIM
from genscale.search.budget import Budget
from genscale.search.plain import PlainSampling
from genscale.search.rollover import Rollover
from genscale.search.svdd import SVDD
from tests.search.conftest import Brightness
from tests.search.families import world as world_of

STOCHASTIC = ["dit-ddpm", "var"]  # with their usual samplers
UNBEATABLE, BEATEN = 10.0, -10.0  # bars: Brightness lies in [0, 1]


@pytest.mark.parametrize("family", STOCHASTIC)
def test_one_start_and_one_proposal_is_plain_sampling(family: str) -> None:
    world = world_of(family)
    plain = PlainSampling().run(world.engine())
    result = Rollover(1, quota=1).run(world.engine())
    torch.testing.assert_close(result.latents, plain.latents, atol=1e-5, rtol=1e-5)
    assert result.cost.nfe.tolist() == plain.cost.nfe.tolist()


@pytest.mark.parametrize("family", STOCHASTIC)
def test_an_unbeatable_bar_gives_the_best_of_the_quota_at_every_step(family: str) -> None:
    world = world_of(family)
    result = Rollover(1, quota=4, bar=UNBEATABLE).run(world.engine())
    stepwise = SVDD(4).run(world.engine())
    torch.testing.assert_close(result.latents, stepwise.latents, atol=1e-4, rtol=1e-4)
    assert result.cost.nfe.tolist() == stepwise.cost.nfe.tolist()
    assert result.cost.reward_calls.tolist() == stepwise.cost.reward_calls.tolist()


class TestCosts:
    @pytest.mark.parametrize("bar", [None, UNBEATABLE, BEATEN])
    def test_of_diffusion(self, engines: Any, bar: float | None) -> None:
        """Whoever saves spends it later: the sum is the same whatever happens on the way."""
        result = Rollover(5, quota=4, bar=bar).run(engines(prompts=6, sampler=DDIM(5, eta=1.0)))
        assert result.cost.nfe.tolist() == [5.0 + 4 * 4] * 6  # n_0 + Q (T - 1)
        assert result.cost.reward_calls.tolist() == [5.0 + 4 * 4 + 1] * 6

    def test_of_guided_diffusion(self) -> None:
        result = Rollover(3, quota=2).run(world_of("dit-ddpm").engine())
        assert result.cost.nfe.tolist() == [2 * (3.0 + 2 * 3)] * 3

    def test_of_scales(self) -> None:
        world = world_of("var")
        result = Rollover(3, quota=2).run(world.engine())
        first = float(world.costs.evaluate[0])
        assert result.cost.nfe.tolist() == [2 * first + world.costs.total] * 3
        assert result.cost.reward_calls.tolist() == [3.0 + 2 * 4] * 3


class TestRollingOver:
    def test_what_beats_the_bar_at_once_leaves_its_quota_to_the_last_step(
        self, engines: Any
    ) -> None:
        steps, quota = 5, 4

        class Rising(Brightness):
            """Each look is brighter than all before: every first proposal beats the bar."""

            looks = 0

            def score(self, images: Any, handle: Any, index: Any) -> Any:
                output = super().score(images, handle, index)
                self.looks += 1
                output.value = torch.full_like(output.value, float(self.looks))
                return output

        engine = engines(prompts=1, sampler=DDIM(steps, eta=1.0), reward=Rising())
        Rollover(1, quota=quota).run(engine)
        moves = engine.genealogy.generations[2:]
        # the start is look 1; then one proposal for each of three steps, 13 at the last noisy one
        assert [float(each.value[0]) for each in moves[:4]] == [2.0, 3.0, 4.0, 4.0 + 13]
        assert engine.meter.nfe.tolist() == [1.0 + quota * (steps - 1)]

    def test_the_bar_rises_to_what_was_taken(self, engines: Any) -> None:
        engine = engines(prompts=5, sampler=DDIM(6, eta=1.0))
        result = Rollover(4, quota=3).run(engine)
        _, begun, *moves = engine.genealogy.generations
        taken = torch.stack([begun.value, *(each.value for each in moves)])
        noisy = torch.stack([begun.step, *(each.step for each in moves)]) < 5  # before the last
        highest = taken.where(noisy & taken.isfinite(), -torch.inf).amax(0)
        torch.testing.assert_close(result.extra["bar"], highest)

    def test_prompts_stand_at_different_steps(self, engines: Any) -> None:
        engine = engines(prompts=6, sampler=DDIM(6, eta=1.0))
        Rollover(2, quota=4).run(engine)
        steps = [each.step for each in engine.genealogy.generations]
        assert max(int(each.max() - each.min()) for each in steps) > 0


class TestBudget:
    @pytest.mark.parametrize("nfe", [4, 5, 9, 17, 40])
    def test_null_spends_it_all(self, engines: Any, nfe: int) -> None:
        result = Rollover(4, quota=None).run(engines(prompts=3, budget=Budget(nfe=nfe)))
        assert result.cost.nfe.tolist() == [float(nfe)] * 3
        assert result.finished.all()

    @pytest.mark.parametrize("rewards", [6, 9, 20, 31])
    def test_rewards_are_not_exceeded(self, rewards: int) -> None:
        world = world_of("var")
        result = Rollover(4, quota=None).run(world.engine(budget=Budget(reward_calls=rewards)))
        assert result.cost.reward_calls.tolist() == [float(rewards)] * 3
        assert result.finished.all()

    def test_less_than_it_takes(self, engines: Any) -> None:
        with pytest.raises(ConfigError, match=r"budget.reward_calls=5 is smaller than the 6 that"):
            Rollover().run(engines(budget=Budget(reward_calls=5)))

    def test_no_end(self, engines: Any) -> None:
        with pytest.raises(ConfigError, match=r"neither search.quota nor a budget"):
            Rollover(quota=None).run(engines())


@pytest.mark.parametrize("family", STOCHASTIC)
def test_micro_batches_and_other_prompts_change_nothing(family: str) -> None:
    world, search = world_of(family), Rollover(3, quota=3)
    whole = search.run(world.engine())
    parts = search.run(world.engine(micro_batch=2))
    alone = search.run(world.engine(prompts=slice(1, 2)))
    torch.testing.assert_close(parts.latents, whole.latents, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(alone.latents, whole.latents[1:2], atol=1e-4, rtol=1e-4)


class TestRefusals:
    def test_deterministic_samplers(self, engines: Any) -> None:
        with pytest.raises(ConfigError, match="Rollover needs a sampler that draws noise"):
            Rollover().run(engines(sampler=Euler(4)))

    def test_ranks_say_nothing_across_steps(self, engines: Any) -> None:
        class Ranks(Brightness):
            potential = False

        with pytest.raises(ConfigError, match="compares rewards of different steps, but Ranks"):
            Rollover().run(engines(reward=Ranks()))

    def test_numbers_out_of_range(self) -> None:
        with pytest.raises(ConfigError, match="must be at least 1, but are 0 and 47"):
            Rollover(0)
