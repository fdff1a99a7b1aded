"""Zero-order search walks on the sphere, starts at the plain sample, and never gets worse."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from genscale.errors import ConfigError
from genscale.samplers.next_scale import NextScale
from genscale.samplers.ode import Euler
from genscale.samplers.sde import DDIM
from genscale.search.budget import Budget
from genscale.search.neighbours import cosine_of_step, deaf_to_noise, neighbours
from genscale.search.noises import own_noises, run_noises
from genscale.search.plain import PlainSampling
from genscale.search.zero_order import ZeroOrder
from tests.search.families import world as world_of


class TestNeighbours:
    def test_angle_and_norm_are_kept(self) -> None:
        generator = torch.Generator().manual_seed(0)
        pivot = torch.randn(3, 4, 2, 2, generator=generator)
        directions = torch.randn(3, 5, 4, 2, 2, generator=generator)
        around = neighbours(pivot, directions, 0.9).flatten(2)
        old = pivot.flatten(1)[:, None]
        torch.testing.assert_close(
            torch.cosine_similarity(around, old, dim=-1), torch.full((3, 5), 0.9)
        )
        torch.testing.assert_close(around.norm(dim=-1), old.norm(dim=-1).expand(3, 5))

    def test_a_cosine_of_one_stays_and_each_may_have_its_own(self) -> None:
        pivot, directions = torch.randn(2, 6), torch.randn(2, 2, 6)
        around = neighbours(pivot, directions, torch.tensor([[1.0, 0.0], [0.5, 1.0]]))
        torch.testing.assert_close(around[0, 0], pivot[0])
        torch.testing.assert_close(around[1, 1], pivot[1])
        assert abs(float((around[0, 1] * pivot[0]).sum())) < 1e-5

    def test_a_single_number_is_mixed_with_its_direction(self) -> None:
        around = neighbours(torch.tensor([[2.0]]), torch.tensor([[[-1.0]]]), 0.6)
        torch.testing.assert_close(around, torch.tensor([[[0.6 * 2.0 - 0.8]]]))

    def test_a_step_along_the_tangent(self) -> None:
        pivot = torch.randn(2, 9)
        cosine = cosine_of_step(pivot, torch.tensor([[0.0], [0.5]]))
        assert cosine[0] == 1.0
        tangent = 1.0 / cosine[1] ** 2 - 1.0  # tan^2
        torch.testing.assert_close(tangent.sqrt() * pivot[1].norm(), torch.tensor([1.5]).double())


@pytest.mark.parametrize("family", ["dimr-flow", "dit-ddpm", "var"])
def test_the_noise_of_the_seeds_gives_the_plain_sample(family: str) -> None:
    engine = world_of(family).engine()
    plain = engine.run(engine.start(1)).x
    own = engine.noise(engine.seeds)
    assert torch.equal(engine.run(engine.start(1, noise=own)).x, plain)
    assert not torch.equal(engine.run(engine.start(1, noise=-own)).x, plain)


@pytest.mark.parametrize("family", ["dimr-flow", "var"])
def test_a_budget_of_one_sample_gives_the_plain_one(family: str) -> None:
    world = world_of(family)
    plain = PlainSampling().run(world.engine())
    result = ZeroOrder().run(world.engine(budget=Budget(nfe=world.costs.total)))
    assert torch.equal(result.latents, plain.latents)
    assert result.cost.nfe.tolist() == [world.costs.total] * 3


@pytest.mark.parametrize("family", ["dimr-flow", "dit-ddpm", "var"])
def test_it_costs_what_its_formula_says(family: str) -> None:
    world = world_of(family)
    result = ZeroOrder(3, rounds=2).run(world.engine())
    assert result.cost.nfe.tolist() == [(1 + 2 * 3) * world.costs.total] * 3
    assert result.cost.reward_calls.tolist() == [1 + 2 * 3] * 3


def test_improve_never_gets_worse_with_rounds(engines: Any) -> None:
    best = [
        ZeroOrder(2, rounds=rounds, accept="improve")
        .run(engines(prompts=4, sampler=Euler(4)))
        .rewards["reward"]
        for rounds in range(1, 8)
    ]
    assert all(bool((later >= earlier).all()) for earlier, later in pairwise(best))
    assert bool((best[-1] > best[0]).any())


@pytest.mark.parametrize("family", ["dimr-flow", "dit-ddpm", "var"])
def test_all_noise_behind_a_sample_gives_it_again(family: str) -> None:
    engine = world_of(family).engine()
    plain = engine.run(engine.start(1)).x
    own = own_noises(engine, engine.seeds)
    assert own.shape[:2] == (3, 5 if family == "dit-ddpm" else 1)  # of the start, and of four steps
    wanted = torch.tensor([[True, False], [True, True], [False, True]])
    both = torch.stack((own, -own), 1)
    state = run_noises(engine, both, engine.seeds, wanted)
    assert state.group.tolist() == [0, 1, 1, 2]
    torch.testing.assert_close(state.x[:2], plain[:2], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(state.x[2:], plain[1:], atol=1e-3)
    other = run_noises(engine, both, engine.seeds + 1, wanted)  # nothing else is drawn
    torch.testing.assert_close(other.x, state.x)


def test_steps_that_draw_noise_are_searched_too(engines: Any) -> None:
    """On a flow, eta 1 forgets the start at once: moving it alone would change nothing."""
    sampler = DDIM(4, eta=1.0)
    plain = PlainSampling().run(engines(prompts=8, sampler=sampler))
    result = ZeroOrder(4, rounds=6, cosine=0.8).run(engines(prompts=8, sampler=sampler))
    gain = result.rewards["reward"] - plain.rewards["reward"]
    assert float(gain.mean()) > 0.1


class TestPivots:
    def rows(self, accept: Any, engines: Any, rounds: int = 6) -> Any:
        engine = engines(prompts=3, sampler=Euler(4))
        ZeroOrder(2, rounds=rounds, accept=accept).run(engine)
        return engine.genealogy.generations

    def test_always_goes_on_from_the_best_neighbour(self, engines: Any) -> None:
        before, *later = self.rows("always", engines)
        for after in later:
            for prompt in range(3):
                mine = (before.group == prompt).nonzero()[:, 0][-2:]  # the neighbours
                best = mine[before.value[mine].argmax()]
                assert set(after.parents[after.group == prompt].tolist()) == {int(best)}
            before = after

    def test_improve_begins_again_where_no_neighbour_beats_the_pivot(self, engines: Any) -> None:
        generations = self.rows("improve", engines)
        pivot = {g: float(generations[0].value[generations[0].group == g][0]) for g in range(3)}
        restarts = 0
        for before, after in pairwise(generations):
            for prompt in range(3):
                mine = (before.group == prompt).nonzero()[:, 0]
                near = before.value[mine[-2:]]
                if len(mine) == 3:
                    pivot[prompt] = float(before.value[mine[0]])
                children = after.group == prompt
                if float(near.max()) > pivot[prompt]:
                    assert int(children.sum()) == 2  # the pivot's score is remembered
                    pivot[prompt] = float(near.max())
                else:
                    restarts += 1
                    assert int(children.sum()) == 3  # a fresh pivot is sampled too
                    assert after.parents[children].tolist() == [-1] * 3
        assert restarts > 0

    def test_a_fresh_pivot_is_a_particle_of_best_of_n(self, engines: Any) -> None:
        generations = self.rows("improve", engines)
        engine = engines(prompts=3, sampler=Euler(4))
        seeds = set(engine.particle_seeds(8).tolist())
        assert {int(s) for each in generations for s in each.seeds} <= seeds


def test_prompts_that_begin_again_do_not_disturb_the_others(engines: Any) -> None:
    def search(prompts: int) -> Any:
        engine = engines(prompts=prompts, sampler=Euler(4), budget=Budget(nfe=4 * 17))
        return ZeroOrder(3, rounds=None, accept="improve").run(engine)

    many, one = search(5), search(1)
    torch.testing.assert_close(many.latents[:1], one.latents)
    assert many.cost.nfe.tolist() == [4.0 * 17] * 5  # to the last sample, whoever began again


def test_it_walks_to_the_brightest_noise_of_its_sphere(engines: Any) -> None:
    # four pixels: pictures are noises times a number, the brightest noise has equal pixels
    search = ZeroOrder(4, rounds=12, cosine=0.9)
    result = search.run(engines(prompts=6, sampler=Euler(4)))
    pixels = result.latents.flatten(1)
    assert bool((torch.cosine_similarity(pixels, torch.ones_like(pixels)) > 0.9).all())


@pytest.mark.parametrize("family", ["dimr-flow", "dit-ddpm", "var"])
def test_micro_batches_change_nothing(family: str) -> None:
    world = world_of(family)
    whole, parts = (ZeroOrder(3, rounds=2).run(world.engine(micro_batch=n)) for n in (64, 4))
    torch.testing.assert_close(parts.latents, whole.latents, atol=1e-4, rtol=1e-4)


class TestRefusals:
    def test_likeliest_tokens_know_no_noise(self) -> None:
        world, sampler = world_of("var"), NextScale(4, temperature=0.0)
        assert deaf_to_noise("x", NextScale(4)) == []
        with pytest.raises(ConfigError, match="takes the likeliest tokens whatever the noise"):
            ZeroOrder(rounds=1).run(world.engine(sampler=sampler))

    def test_numbers_out_of_range(self) -> None:
        with pytest.raises(ConfigError, match=r"must be at least 1, but are 0 and 8"):
            ZeroOrder(0)
        with pytest.raises(ConfigError, match=r"search.cosine must lie in \[0, 1\), but is 1"):
            ZeroOrder(cosine=1.0)
        with pytest.raises(ConfigError, match=r"but is 'alway'. Did you mean 'always'"):
            ZeroOrder(accept="alway")  # type: ignore[arg-type]

    def test_no_end(self, engines: Any) -> None:
        with pytest.raises(ConfigError, match=r"neither search.rounds nor a budget was given"):
            ZeroOrder(rounds=None).run(engines(sampler=Euler(4)))
