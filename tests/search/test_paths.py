"""Search over paths: noise a little, solve further, keep the best; levels on any process's grid."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from genscale.errors import ConfigError
from genscale.samplers.churn import ChurnSampler
from genscale.samplers.dpm_fast import DPMSolverFast
from genscale.samplers.ode import Euler, Heun
from genscale.samplers.sde import DDIM
from genscale.search.best_of_n import BestOfN
from genscale.search.budget import Budget
from genscale.search.paths import SearchOverPaths
from genscale.search.plain import PlainSampling
from tests.search.families import world as world_of

DIFFUSION = ["dimr-flow", "dit-ddpm"]  # with their usual samplers: an ODE, and an SDE with guidance


@pytest.mark.parametrize("family", DIFFUSION)
def test_one_path_that_is_not_noised_is_plain_sampling(family: str) -> None:
    world = world_of(family)
    plain = PlainSampling().run(world.engine())
    result = SearchOverPaths(1, width=1, forward=0.0).run(world.engine())
    torch.testing.assert_close(result.latents, plain.latents, atol=1e-6, rtol=1e-6)
    assert result.cost.nfe.tolist() == plain.cost.nfe.tolist()
    assert result.cost.reward_calls.tolist() == [1.0] * 3


def test_several_such_paths_are_best_of_n(engines: Any) -> None:
    paths = SearchOverPaths(5, width=1, forward=0.0).run(engines(sampler=Euler(6)))
    best = BestOfN(5).run(engines(sampler=Euler(6)))
    torch.testing.assert_close(paths.latents, best.latents, atol=1e-6, rtol=1e-6)
    assert paths.cost.nfe.tolist() == best.cost.nfe.tolist()


class TestRounds:
    def test_on_a_flow(self, engines: Any) -> None:
        # levels 1, 0.9, ..., 0: begin at 0.8; back 0.1, on 0.2
        rounds = SearchOverPaths().rounds(engines(sampler=Euler(10)))
        assert rounds == [(i, i - 1, i + 1) for i in range(2, 10)]

    def test_on_another_process_they_mean_equal_signal_to_noise(self) -> None:
        engine = world_of("dit-ddpm").engine(sampler=DDIM(40, eta=1.0))
        level = engine.sampler.levels(engine.model.process)
        ratio = level.sigma / level.alpha  # 4 at t = 0.8 of the flow, 1.5 at 0.6
        rounds = SearchOverPaths(start=0.8, forward=0.0, backward=0.2).rounds(engine)
        at, _, down = rounds[0]
        for step, wanted in ((at, 4.0), (down, 1.5)):
            assert ratio[step + 1] < wanted < ratio[step - 1]

    @pytest.mark.parametrize("steps", [1, 2, 3, 7, 50])
    @pytest.mark.parametrize("forward", [0.0, 0.02, 0.3])
    def test_each_goes_back_and_gains(self, engines: Any, steps: int, forward: float) -> None:
        search = SearchOverPaths(forward=forward, backward=forward + 0.05)
        rounds = search.rounds(engines(sampler=Euler(steps)))
        for at, up, down in rounds:
            assert (up < at) if forward else (up == at)
            assert at < down
        assert [at for at, _, _ in rounds[1:]] == [down for _, _, down in rounds[:-1]]
        assert (rounds[-1][2] if rounds else 1) == steps

    def test_grids_that_end_before_clean(self, engines: Any) -> None:
        sampler = DPMSolverFast(9)
        rounds = SearchOverPaths().rounds(engines(sampler=sampler))
        assert rounds[-1][2] == sampler.num_steps


class TestCosts:
    @pytest.mark.parametrize("elite", [False, True])
    @pytest.mark.parametrize("forward", [0.0, 0.1])
    @pytest.mark.parametrize("width", [1, 3])
    @pytest.mark.parametrize("sampler", [DDIM(10, eta=1.0), Heun(10)])
    def test_its_price_is_what_it_spends(
        self, engines: Any, sampler: Any, width: int, forward: float, elite: bool
    ) -> None:
        search = SearchOverPaths(2, width=width, forward=forward, elite=elite)
        if search.problems(sampler):
            return  # copies that would stay equal
        engine = engines(sampler=sampler)
        nfe, rewards = search.price(engine, 2, width)
        result = search.run(engine)
        assert result.cost.nfe.tolist() == [nfe] * 2
        assert result.cost.reward_calls.tolist() == [rewards] * 2

    def test_its_formula(self, engines: Any) -> None:
        engine = engines(sampler=Euler(10))
        search = SearchOverPaths(2, width=3)
        rounds = search.rounds(engine)
        result = search.run(engine)
        solved = sum(down - up for _, up, down in rounds)
        looks = len(rounds) - 1
        assert result.cost.nfe.tolist() == [2 * rounds[0][0] + 2 * 3 * (solved + looks)] * 2
        assert result.cost.reward_calls.tolist() == [2 * 3 * len(rounds)] * 2

    def test_of_guided_steps(self) -> None:
        engine = world_of("dit-ddpm").engine()
        search = SearchOverPaths(2, width=2, elite=True)
        nfe, _ = search.price(engine, 2, 2)
        assert search.run(engine).cost.nfe.tolist() == [nfe] * 3


class TestBudget:
    def test_null_takes_what_it_allows(self, engines: Any) -> None:
        search = SearchOverPaths(2, width=None)
        engine = engines(sampler=Euler(10), budget=Budget(nfe=300))
        one, two = (search.price(engine, 2, m)[0] for m in (5, 6))
        spent = float(search.run(engine).cost.nfe[0])
        assert spent <= 300 < spent + (two - one)

    def test_a_small_one_takes_fewer_copies_and_then_fewer_paths(self, engines: Any) -> None:
        """One copy alone comes last: there would be nothing to choose."""
        search = SearchOverPaths(3, width=4)
        engine = engines(sampler=Euler(10))
        for paths, width in ((3, 3), (3, 2), (2, 2), (1, 2), (1, 1)):
            nfe = search.price(engine, paths, width)[0]
            result = search.run(engines(sampler=Euler(10), budget=Budget(nfe=nfe)))
            assert result.cost.nfe.tolist() == [nfe] * 2
            assert result.finished.all()

    def test_less_than_it_takes(self, engines: Any) -> None:
        least = SearchOverPaths().price(engines(sampler=Euler(10)), 1, 1)[0]
        with pytest.raises(ConfigError, match=rf"is smaller than the {least:g} that one sample"):
            SearchOverPaths().run(engines(sampler=Euler(10), budget=Budget(nfe=least - 1)))


def test_each_generation_descends_from_the_kept_paths(engines: Any) -> None:
    engine = engines(prompts=3, sampler=Euler(10))
    result = SearchOverPaths(2, width=4).run(engine)
    generations = engine.genealogy.generations
    assert [each.event for each in generations] == ["start", *["keep"] * 8]
    for before, after in pairwise(generations):
        assert after.group.tolist() == [0, 0, 1, 1, 2, 2]
        assert torch.equal(before.group[after.parents], after.group)
    last = generations[-1].value.view(3, 2)
    assert torch.equal(last[:, 0], result.rewards["reward"])
    assert bool((last[:, 0] >= last[:, 1]).all())


def test_elites_keep_a_path_that_noise_would_only_harm(engines: Any) -> None:
    """Un-noised paths of an ODE end at the plain sample, so that the result is never worse."""
    plain = PlainSampling().run(engines(prompts=12, sampler=Heun(10)))
    search = SearchOverPaths(1, width=1, elite=True)
    kept = search.run(engines(prompts=12, sampler=Heun(10)))
    engine = engines(prompts=12, sampler=Heun(10))
    bold = SearchOverPaths(1, width=1).run(engine)
    assert float(kept.rewards["reward"].mean()) > float(plain.rewards["reward"].mean())
    assert bool((bold.rewards["reward"] < plain.rewards["reward"]).any())


def test_more_copies_give_more_reward(engines: Any) -> None:
    rewards = [
        float(
            SearchOverPaths(2, width=m)
            .run(engines(prompts=12, sampler=Euler(10)))
            .rewards["reward"]
            .mean()
        )
        for m in (1, 4, 16)
    ]
    assert rewards[0] + 0.02 < rewards[1] < rewards[2]


@pytest.mark.parametrize("family", DIFFUSION)
def test_micro_batches_and_other_prompts_change_nothing(family: str) -> None:
    world, search = world_of(family), SearchOverPaths(2, width=3, elite=True)
    whole = search.run(world.engine())
    parts = search.run(world.engine(micro_batch=4))
    alone = search.run(world.engine(prompts=slice(1, 2)))
    torch.testing.assert_close(parts.latents, whole.latents, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(alone.latents, whole.latents[1:2], atol=1e-4, rtol=1e-4)


class TestRefusals:
    def test_scales_have_no_noise_levels(self) -> None:
        with pytest.raises(ConfigError, match="works on diffusion models, but the model is scale-"):
            SearchOverPaths().run(world_of("var").engine())

    def test_copies_that_stay_equal(self, engines: Any) -> None:
        assert issubclass(Euler, ChurnSampler)
        with pytest.raises(ConfigError, match=r"forward=0 makes copies that stay equal"):
            SearchOverPaths(forward=0.0).run(engines(sampler=Euler(10)))

    def test_numbers_out_of_range(self) -> None:
        with pytest.raises(ConfigError, match="must be at least 1, but are 2 and 0"):
            SearchOverPaths(width=0)
        with pytest.raises(ConfigError, match=r"they are start=0.8, forward=0.2, backward=0.1"):
            SearchOverPaths(forward=0.2, backward=0.1)
