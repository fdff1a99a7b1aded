"""The engine: particles of many prompts, moved in micro-batches, judged, counted, limited."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from genscale.errors import ConfigError
from genscale.rewards.base import Request
from genscale.samplers.ode import Heun
from genscale.search.best_of_n import BestOfN
from genscale.search.budget import Budget, BudgetSpent
from genscale.search.engine import Engine
from genscale.search.plain import PlainSampling
from genscale.search.scorer import best_first


def test_one_particle_is_the_plain_sample(engines: Any) -> None:
    engine = engines()
    result = PlainSampling().run(engine)
    plain = engine.sampler.run(engine.model, engine.cond, engine.seeds)
    assert torch.equal(result.latents, plain.x)
    assert torch.equal(BestOfN(1).run(engines()).latents, plain.x)


@pytest.mark.parametrize("micro_batch", [1, 3, 64])
def test_results_do_not_depend_on_the_micro_batch(engines: Any, micro_batch: int) -> None:
    whole = BestOfN(5).run(engines(prompts=3))
    parts = BestOfN(5).run(engines(prompts=3, micro_batch=micro_batch))
    torch.testing.assert_close(parts.latents, whole.latents)
    assert torch.equal(parts.seeds, whole.seeds)


def test_results_do_not_depend_on_the_other_prompts(engines: Any) -> None:
    both, one = BestOfN(5).run(engines(prompts=2)), BestOfN(5).run(engines(prompts=1))
    torch.testing.assert_close(both.latents[:1], one.latents)


def test_calls_never_hold_more_rows_than_a_micro_batch(engines: Any) -> None:
    engine = engines(prompts=3, micro_batch=4)
    BestOfN(5).run(engine)
    assert max(engine.model.calls) <= 4


class TestCounting:
    def test_best_of_n(self, engines: Any) -> None:
        result = BestOfN(5).run(engines(prompts=3))
        assert result.cost.nfe.tolist() == [20.0] * 3  # 5 samples of 4 steps
        assert result.cost.decodes.tolist() == result.cost.reward_calls.tolist() == [5.0] * 3

    def test_what_is_told_beforehand_is_what_is_spent(self, engines: Any) -> None:
        engine = engines(sampler=Heun(4))
        PlainSampling().run(engine)
        assert engine.costs.total == float(engine.meter.nfe[0]) == 7.0  # 2 a step, 1 the last

    def test_held_out_rewards_are_counted_apart(self, engines: Any) -> None:
        from tests.search.conftest import Brightness

        result = BestOfN(3).run(engines(held_out={"light": Brightness()}))
        assert result.cost.held_out_calls.tolist() == [1.0, 1.0]
        torch.testing.assert_close(result.held_out["light"], result.rewards["reward"])


class TestBudget:
    def test_nothing_is_spent_beyond_it(self, engines: Any) -> None:
        engine = engines(budget=Budget(nfe=15))
        result = BestOfN(None).run(engine)
        assert result.cost.nfe.tolist() == [12.0, 12.0]  # three samples of 4; a fourth is too many

    def test_rewards_too(self, engines: Any) -> None:
        result = BestOfN(8).run(engines(budget=Budget(reward_calls=2)))
        assert result.cost.reward_calls.tolist() == [2.0, 2.0]

    def test_a_call_beyond_it_is_refused_before_it_is_made(self, engines: Any) -> None:
        engine = engines(budget=Budget(nfe=3))
        state = engine.start(1)
        with pytest.raises(BudgetSpent):
            engine.run(state)
        assert engine.model.calls == []

    def test_less_than_one_sample(self, engines: Any) -> None:
        with pytest.raises(ConfigError, match=r"budget.nfe=3 is smaller than the 4 that one"):
            BestOfN(8).run(engines(budget=Budget(nfe=3)))

    def test_seconds_end_a_search_with_its_best_so_far(
        self, engines: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = iter(range(1000))
        monkeypatch.setattr(Engine, "seconds", property(lambda _: float(next(now))))
        result = BestOfN(100).run(engines(prompts=1, micro_batch=1, budget=Budget(seconds=10.0)))
        # the clock is read before each of a sample's three micro-batches: run, decode, judge
        assert result.cost.reward_calls.tolist() == [3.0]
        assert result.finished.all()

    def test_no_number_and_no_budget(self, engines: Any) -> None:
        with pytest.raises(ConfigError, match="search has no end"):
            BestOfN(None).run(engines())


def test_branches_part_and_the_first_goes_on_as_before(engines: Any) -> None:
    engine = engines(prompts=1)
    state = engine.evaluate(engine.start(1))
    alone = engine.run(state)
    copies = engine.run(engine.branch(state, torch.tensor([0, 0, 0])))
    assert torch.equal(copies.x[0], alone.x[0])
    assert len({tuple(x.flatten().tolist()) for x in copies.x}) == 3


def test_particles_of_different_steps_do_not_stop_together_on_the_way(engines: Any) -> None:
    engine = engines(prompts=2)
    state = engine.start(1)
    first = torch.tensor([0])
    state = state.put(first, engine.run(state.select(first), 1))
    with pytest.raises(ValueError, match=r"steps \[0, 1\] were to stop at step 2"):
        engine.run(state, 2)
    assert engine.run(state).step.tolist() == [4, 4]


def test_requests_reach_the_reward(engines: Any) -> None:
    dark, bright = Request(label=1), Request(label=9)
    result = BestOfN(16).run(engines(requests=[dark, bright]))
    light = (result.images * 0.5 + 0.5).mean((1, 2, 3))
    assert light[0] < 0.4 < 0.6 < light[1]


def test_rewards_that_are_not_finite_come_last_and_are_counted(engines: Any) -> None:
    from genscale.rewards.base import Reward, RewardOutput

    class Broken(Reward):
        def score(self, images: Any, handle: Any, index: Any) -> RewardOutput:
            mean = images.flatten(1).mean(1)
            return RewardOutput(torch.where(mean > mean.median(), torch.nan, mean))

    result = BestOfN(6).run(engines(prompts=1, reward=Broken()))
    assert result.invalid == 3
    assert torch.isfinite(result.rewards["reward"]).all()


def test_ties_go_to_the_lowest_row() -> None:
    values = torch.tensor([1.0, 2.0, 2.0, 5.0, 5.0, 0.0])
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    assert best_first(values, group, 1).tolist() == [1, 3]
    assert best_first(values, group, 2).tolist() == [1, 2, 3, 4]


def test_genealogy_of_a_selection(engines: Any) -> None:
    engine = engines(prompts=1)
    state = engine.start(3)
    engine.record("start", state)
    chosen = torch.tensor([2, 2, 0])
    state = engine.branch(engine.evaluate(state), chosen)
    engine.record("resample", state, parents=chosen)
    assert engine.genealogy.alive().tolist() == [2]
    trace = engine.genealogy.trace(1)
    assert [each["event"] for each in trace] == ["start", "resample"]
    assert trace[0]["seed"] == int(engine.particle_seeds(3)[2])
    assert engine.genealogy.record(0)[1]["parents"] == [2, 2, 0]
