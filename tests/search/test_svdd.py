"""SVDD and beam search: chosen proposals, of which the first is the plain step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from genscale.errors import ConfigError
from genscale.samplers.next_scale import NextScale
from genscale.samplers.ode import Euler
from genscale.samplers.reverse_sde import ReverseSDEHeun
from genscale.samplers.sde import DDIM
from genscale.search.budget import Budget
from genscale.search.plain import PlainSampling
from genscale.search.proposals import (
    StepPrices,
    afforded,
    beats,
    check_end,
    judge,
    propose,
    random_steps,
    reunited,
    unburdened,
    ways_afforded,
)
from genscale.search.svdd import SVDD
from tests.search.conftest import Brightness
from tests.search.families import world as world_of

STOCHASTIC = ["dit-ddpm", "var"]  # with their usual samplers


class TestProposals:
    @pytest.mark.parametrize("family", STOCHASTIC)
    def test_the_first_is_the_plain_step_and_the_others_part(self, family: str) -> None:
        engine = world_of(family).engine()
        state = engine.evaluate(engine.run(engine.start(1), 2))
        plain = engine.advance(state)
        ways = propose(engine, state, 3)
        assert ways.group.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        torch.testing.assert_close(ways.x[::3], plain.x)
        assert len({tuple(x.flatten().tolist()) for x in ways.x}) == 9

    @pytest.mark.parametrize("family", STOCHASTIC)
    @pytest.mark.parametrize("given", [False, True])
    def test_a_steps_own_noise_changes_nothing(self, family: str, given: bool) -> None:
        engine = world_of(family).engine()
        sampler, noise = engine.sampler, engine.noise(engine.seeds + 1) if given else None
        state = engine.start(1, noise=noise)
        one, two = torch.tensor([1]), torch.tensor([2])  # rows of other steps
        state = state.put(one, engine.run(state.select(one), 1))
        state = state.put(two, engine.run(state.select(two), 2))
        own = sampler.step_noise(engine.model, state)
        assert torch.equal(engine.advance(state, own).x, engine.advance(state).x)
        assert not torch.equal(engine.advance(state, -own).x, engine.advance(state).x)

    def test_proposals_of_a_scale_leave_memory_behind_and_take_it_up_when_kept(self) -> None:
        engine = world_of("var").engine()
        state = engine.evaluate(engine.run(engine.start(1), 1))
        assert unburdened(engine, state).pending is None
        children = propose(engine, state, 2)
        assert children.memory is None
        rows = torch.tensor([2, 0, 1])
        kept = reunited(engine, children.select(2 * rows), state, rows)
        plain = engine.advance(state.select(rows))
        torch.testing.assert_close(engine.evaluate(kept).clean, engine.evaluate(plain).clean)
        # with a winner of every parent in order, nothing is copied
        alone = reunited(engine, children.select(torch.tensor([0, 2, 4])), state, torch.arange(3))
        assert alone.memory is state.pending

    def test_diffusion_particles_keep_their_memory(self) -> None:
        engine = world_of("dit-ddpm").engine()
        state = engine.evaluate(engine.start(1))
        assert unburdened(engine, state) is state
        assert reunited(engine, state, state, torch.arange(3)) is state

    def test_scale_wise_models_draw_again_without_the_network(self) -> None:
        world = world_of("var")
        engine = world.engine()
        state = engine.evaluate(engine.start(1))
        judge(engine, propose(engine, state, 5))
        assert engine.meter.nfe.tolist() == [float(world.costs.evaluate[0])] * 3
        assert engine.meter.reward_calls.tolist() == [5.0] * 3

    def test_numbered_proposals_are_those_of_one_call(self, engines: Any) -> None:
        engine = engines()
        state = engine.evaluate(engine.start(1))
        together = propose(engine, state, 3)
        third = propose(engine, state, 1, torch.tensor([2, 2]))
        assert torch.equal(third.x, together.x[2::3])

    def test_judging_mixed_particles_keeps_their_order_and_offers_the_finished(
        self, engines: Any
    ) -> None:
        engine = engines(prompts=3)
        state = engine.start(1)
        done = engine.run(state)
        rows = torch.tensor([1])
        mixed = state.put(rows, done.select(rows))
        state, scores = judge(engine, mixed)
        assert scores.group.tolist() == [0, 1, 2]
        torch.testing.assert_close(scores.latents[1], done.x[1])
        assert state.clean is not None
        assert engine.meter.nfe.tolist() == [5.0, 4.0, 5.0]

    def test_which_steps_draw_noise(self, engines: Any) -> None:
        def of(sampler: Any) -> list[bool]:
            engine = engines(sampler=sampler)
            return random_steps(sampler, engine.evaluate(engine.start(1))).tolist()

        assert of(DDIM(4, eta=1.0)) == [True, True, True, False]
        assert of(Euler(3)) == [False] * 3
        assert of(ReverseSDEHeun(3)) == [True] * 3  # steps without a known density
        engine = world_of("var").engine()
        state = engine.evaluate(engine.start(1))
        greedy = NextScale(4, temperature=[1.0, 0.0, 1.0, 0.0])
        assert random_steps(greedy, state).tolist() == [True, False, True, False]

    def test_prices_of_guided_steps(self) -> None:
        engine = world_of("dit-ddpm").engine()
        prices = StepPrices.of(engine)
        assert prices.first == 2.0
        assert prices.proposal.tolist() == [2.0, 2.0, 2.0, 0.0]
        assert prices.kept.tolist() == [0.0] * 4
        engine = world_of("var").engine()
        prices = StepPrices.of(engine)
        assert prices.proposal.tolist() == [0.0] * 4
        assert prices.kept.tolist() == [*engine.costs.evaluate[1:].tolist(), 0.0]

    def test_rounding_does_not_beat(self) -> None:
        bar = torch.tensor([1.0, 1.0, 100.0, -torch.inf, torch.inf], dtype=torch.float64)
        value = bar + torch.tensor([1e-7, 1e-3, 1e-4, 0.0, 0.0])
        value[3] = 0.0
        assert beats(value, bar).tolist() == [False, True, False, True, False]

    def test_what_a_budget_affords(self, engines: Any) -> None:
        engine = engines(budget=Budget(nfe=20, reward_calls=9))
        assert afforded(engine, None, each=(3, 1), fixed=(2, 0), setting="n") == 6
        assert afforded(engine, None, each=(3, 2), fixed=(2, 0), setting="n") == 4
        assert afforded(engine, 3, each=(3, 2), setting="n") == 3
        assert afforded(engine, 3, each=(1, 0), fixed=(30, 0), setting="n") == -10
        random = torch.tensor([True, True, True, False])
        assert ways_afforded(engine, None, random, setting="n") == 2  # 3 n + 1 <= 9 rewards
        assert ways_afforded(engine, None, random, particles=9, setting="n") == 1
        check_end(engine, None, "n")
        with pytest.raises(ConfigError, match=r"neither search.n nor a budget"):
            check_end(engines(), None, "search.n")


@pytest.mark.parametrize("family", STOCHASTIC)
@pytest.mark.parametrize("temperature", [0.0, 0.1])
def test_one_proposal_is_plain_sampling(family: str, temperature: float) -> None:
    world = world_of(family)
    plain = PlainSampling().run(world.engine())
    result = SVDD(1, temperature=temperature).run(world.engine())
    assert torch.equal(result.latents, plain.latents)
    assert result.cost.nfe.tolist() == plain.cost.nfe.tolist()
    assert result.cost.reward_calls.tolist() == [1.0] * 3


@pytest.mark.parametrize("beam", [1, 2])
class TestCosts:
    def test_of_diffusion(self, engines: Any, beam: int) -> None:
        result = SVDD(3, beam=beam).run(engines(sampler=DDIM(5, eta=1.0)))
        assert result.cost.nfe.tolist() == [beam * (1.0 + 3 * 4)] * 2  # B (1 + M (T - 1))
        assert result.cost.reward_calls.tolist() == [beam * (3.0 * 4 + 1)] * 2

    def test_of_guided_diffusion(self, beam: int) -> None:
        result = SVDD(3, beam=beam).run(world_of("dit-ddpm").engine())
        assert result.cost.nfe.tolist() == [2 * beam * (1.0 + 3 * 3)] * 3

    def test_of_scales(self, beam: int) -> None:
        world = world_of("var")
        result = SVDD(3, beam=beam).run(world.engine())
        assert result.cost.nfe.tolist() == [beam * world.costs.total] * 3  # rewards only
        assert result.cost.reward_calls.tolist() == [beam * 3.0 * 4] * 3


class TestBudget:
    @pytest.mark.parametrize(
        ("nfe", "ways"), [(4, [1, 1, 1]), (6, [1, 2, 2]), (7, [2, 2, 2]), (9, [2, 3, 3])]
    )
    def test_null_takes_what_it_allows(self, engines: Any, nfe: int, ways: list[int]) -> None:
        engine = engines(budget=Budget(nfe=nfe))
        result = SVDD(None).run(engine)
        assert engine.model.calls == [2, *(2 * m for m in ways)]
        assert result.cost.nfe.tolist() == [float(nfe)] * 2
        assert result.finished.all()

    def test_a_number_is_the_most(self, engines: Any) -> None:
        result = SVDD(10).run(engines(budget=Budget(reward_calls=8)))
        assert result.cost.reward_calls.tolist() == [2.0 + 2 + 3 + 1] * 2

    def test_a_beam_that_it_does_not_reach(self, engines: Any) -> None:
        with pytest.raises(ConfigError, match=r"budget.nfe=10 is smaller than the 12 that one"):
            SVDD(4, beam=3).run(engines(budget=Budget(nfe=10)))

    def test_no_end(self) -> None:
        with pytest.raises(ConfigError, match=r"neither search.proposals nor a budget"):
            SVDD(None).run(world_of("var").engine(budget=Budget(nfe=100)))  # nfe do not limit it


def test_more_proposals_give_more_reward(engines: Any) -> None:
    rewards = [float(SVDD(m).run(engines(prompts=16)).rewards["reward"].mean()) for m in (1, 4, 16)]
    assert rewards[0] + 0.05 < rewards[1] < rewards[2]


def test_of_several_proposals_the_best_is_kept(engines: Any) -> None:
    engine = engines(prompts=3)
    SVDD(4).run(engine)
    twin = engines(prompts=3)
    state = twin.evaluate(twin.start(1))
    for generation in engine.genealogy.generations[1:]:
        children, scores = judge(twin, propose(twin, state, 4))
        best = scores.value.view(3, 4).argmax(1) + 4 * torch.arange(3)
        assert torch.equal(generation.value, scores.value[best])
        assert generation.parents.tolist() == [0, 1, 2]
        state = children.select(best)


class TestTemperature:
    def test_a_small_one_keeps_the_best(self, engines: Any) -> None:
        cold, best = (SVDD(4, temperature=t).run(engines()) for t in (1e-9, 0.0))
        assert torch.equal(cold.latents, best.latents)

    def test_a_large_one_draws_evenly(self, engines: Any) -> None:
        engine = engines(prompts=400, sampler=DDIM(2, eta=1.0))
        SVDD(2, temperature=1e9).run(engine)
        plain = engine.genealogy.generations[-1].lineage == 0
        assert abs(float(plain.double().mean()) - 0.5) < 4 * 0.5 / 20  # four standard errors

    def test_it_follows_the_soft_maximum(self, engines: Any) -> None:
        prompts, temperature = 600, 0.2
        engine = engines(prompts=prompts, sampler=DDIM(2, eta=1.0))
        SVDD(2, temperature=temperature).run(engine)
        twin = engines(prompts=prompts, sampler=DDIM(2, eta=1.0))
        _, scores = judge(twin, propose(twin, twin.start(1), 2))
        chance = (scores.value.view(-1, 2) / temperature).softmax(1)[:, 0]
        plain = (engine.genealogy.generations[-1].lineage == 0).double()
        error = float((chance * (1 - chance)).sum().sqrt()) / prompts
        assert abs(float((plain - chance).mean())) < 4 * error


@pytest.mark.parametrize("family", STOCHASTIC)
def test_micro_batches_and_other_prompts_change_nothing(family: str) -> None:
    world, search = world_of(family), SVDD(3, beam=2, temperature=0.05)
    whole = search.run(world.engine())
    parts = search.run(world.engine(micro_batch=4))
    alone = search.run(world.engine(prompts=slice(1, 2)))
    torch.testing.assert_close(parts.latents, whole.latents, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(alone.latents, whole.latents[1:2], atol=1e-4, rtol=1e-4)


class TestRefusals:
    def test_deterministic_samplers(self, engines: Any) -> None:
        with pytest.raises(ConfigError, match="search SVDD needs a sampler that draws noise"):
            SVDD().run(engines(sampler=Euler(4)))
        with pytest.raises(ConfigError, match=r"positive sampler.temperature"):
            SVDD().run(world_of("var").engine(sampler=NextScale(4, top_k=1)))

    def test_ranks_have_no_soft_maximum(self) -> None:
        class Ranks(Brightness):
            potential = False

        assert SVDD(4).problems(DDIM(4, eta=1.0), Ranks()) == []
        (sentence,) = SVDD(4, temperature=1.0).problems(DDIM(4, eta=1.0), Ranks())
        assert sentence.endswith("Use search.temperature=0.")

    def test_numbers_out_of_range(self) -> None:
        with pytest.raises(ConfigError, match="must be at least 1, but are 4 and 0"):
            SVDD(4, beam=0)
        with pytest.raises(ConfigError, match=r"search.temperature must be a finite number"):
            SVDD(temperature=-1.0)
