"""The door for black-box optimisers, and the cross-entropy method behind it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from genscale.errors import ConfigError
from genscale.samplers.next_scale import NextScale
from genscale.samplers.ode import Euler
from genscale.search.ask_tell import AskTell, Method, Optimiser
from genscale.search.budget import Budget
from genscale.search.cross_entropy import CrossEntropy, CrossEntropyRun
from genscale.search.plain import PlainSampling
from tests.search.families import world as world_of


class Climber:
    """An optimiser of ten lines: twice the best noise so far."""

    def __init__(self, first: Tensor, seed: int) -> None:
        self.best, self.score = first, -torch.inf
        self.seed, self.told = seed, 0

    def ask(self, count: int) -> Tensor:
        return torch.stack([self.best * (i + 2) for i in range(count)])

    def tell(self, noises: Tensor, scores: Tensor) -> None:
        self.told += len(scores)
        row = int(scores.argmax())
        if float(scores[row]) > self.score:
            self.best, self.score = noises[row], float(scores[row])


class Climbing:
    label = "Climbing"

    def __init__(self) -> None:
        self.begun: list[Climber] = []

    def begin(self, first: Tensor, seed: int) -> Optimiser:
        self.begun.append(Climber(first, seed))
        return self.begun[-1]


class TestDoor:
    def test_any_object_with_the_two_methods_is_driven(self, engines: Any) -> None:
        climbing = Climbing()
        method: Method = climbing
        engine = engines(prompts=8, sampler=Euler(4), decode=lambda latents: latents / 1000)
        result = AskTell(method, population=2, rounds=3).run(engine)
        plain = engine.run(engine.start(1))
        begun = climbing.begun
        assert [each.seed for each in begun] == engine.seeds.tolist()
        assert [each.told for each in begun] == [6] * 8
        # bright noises grow: the best of each round is three times the best before it
        bright = plain.x.flatten(1).mean(1) > 0
        assert bool(bright.any())
        expected = torch.where(bright, 27.0, 1.0).view(-1, 1, 1, 1) * plain.x
        torch.testing.assert_close(result.latents, expected)

    @pytest.mark.parametrize("family", ["dimr-flow", "var"])
    def test_the_plain_sample_is_judged_too(self, family: str) -> None:
        world = world_of(family)
        plain = PlainSampling().run(world.engine())
        result = AskTell(CrossEntropy()).run(world.engine(budget=Budget(nfe=world.costs.total)))
        assert torch.equal(result.latents, plain.latents)

    @pytest.mark.parametrize("family", ["dit-ddpm", "var"])
    def test_it_costs_what_its_formula_says(self, family: str) -> None:
        world = world_of(family)
        result = AskTell(CrossEntropy(), population=3, rounds=2).run(world.engine())
        assert result.cost.nfe.tolist() == [(1 + 2 * 3) * world.costs.total] * 3
        assert result.cost.reward_calls.tolist() == [7.0] * 3

    def test_the_last_round_takes_what_the_budget_leaves(self, engines: Any) -> None:
        method = Climbing()
        engine = engines(sampler=Euler(4), budget=Budget(nfe=4 * 8 + 3))
        result = AskTell(method, population=3, rounds=None).run(engine)
        assert result.cost.nfe.tolist() == [32.0] * 2  # 1 + 3 + 3 + 1 samples
        assert [each.told for each in method.begun] == [7, 7]

    @pytest.mark.parametrize(
        "wrong", [torch.zeros(3, 1, 1, 2, 2), torch.full((2, 1, 1, 2, 2), torch.nan)]
    )
    def test_answers_that_do_not_fit_are_refused(self, engines: Any, wrong: Tensor) -> None:
        class Wrong(Climber):
            def ask(self, count: int) -> Tensor:
                return wrong

        class Method(Climbing):
            def begin(self, first: Tensor, seed: int) -> Optimiser:
                return Wrong(first, seed)

        with pytest.raises(ValueError, match=r"Wrong.ask\(2\) must return finite noises of shape"):
            AskTell(Method(), population=2).run(engines(sampler=Euler(4)))


class TestCrossEntropy:
    def run(self, **settings: Any) -> CrossEntropyRun:
        return CrossEntropy(**settings).begin(torch.zeros(1, 8, 8), 5)

    def test_it_begins_with_noise_and_never_repeats_itself(self) -> None:
        run = self.run()
        first, second = run.ask(200), run.ask(200)
        assert abs(float(first.mean())) < 0.04
        assert abs(float(first.std()) - 1.0) < 0.03
        assert not torch.equal(first[:1], second[:1])
        assert torch.equal(self.run().ask(3), first[:3])

    def test_it_moves_part_of_the_way_to_the_best(self) -> None:
        run = self.run(elite=0.5, rate=0.25, least_std=0.01)
        noises = run.ask(4)
        run.tell(noises, torch.tensor([0.0, 3.0, -torch.inf, 2.0]))
        best = noises[[1, 3]]
        torch.testing.assert_close(run.mean, 0.25 * best.mean(0))
        torch.testing.assert_close(run.variance, 0.75 + 0.25 * best.var(0, correction=0))

    def test_what_it_asks_for_has_the_norms_of_noise(self) -> None:
        run = self.run()
        for _ in range(6):
            noises = run.ask(8)
            run.tell(noises, noises.flatten(1).sum(1))
        norms = run.ask(400).flatten(1).norm(dim=1)
        assert abs(float(norms.mean()) - 8.0) < 0.15  # sqrt(64)
        assert float(run.mean.mean()) > 0.2

    def test_a_spread_has_a_floor(self) -> None:
        run = self.run(rate=1.0, least_std=0.3)
        run.tell(run.ask(2), torch.tensor([1.0, 0.0]))  # one elite: no variance
        torch.testing.assert_close(run.variance, torch.full_like(run.variance, 0.09))

    def test_it_finds_the_brightest_noise(self, engines: Any) -> None:
        search = AskTell(CrossEntropy(), population=8, rounds=8)
        result = search.run(engines(prompts=6, sampler=Euler(4)))
        pixels = result.latents.flatten(1)
        assert bool((torch.cosine_similarity(pixels, torch.ones_like(pixels)) > 0.8).all())

    @pytest.mark.parametrize("family", ["dimr-flow", "var"])
    def test_micro_batches_and_other_prompts_change_nothing(self, family: str) -> None:
        world, search = world_of(family), AskTell(CrossEntropy(), population=4, rounds=3)
        whole = search.run(world.engine())
        parts = search.run(world.engine(micro_batch=4))
        alone = search.run(world.engine(prompts=slice(1, 2)))
        torch.testing.assert_close(parts.latents, whole.latents, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(alone.latents, whole.latents[1:2], atol=1e-4, rtol=1e-4)


class TestRefusals:
    def test_likeliest_tokens_know_no_noise(self) -> None:
        engine = world_of("var").engine(sampler=NextScale(4, top_k=1))
        with pytest.raises(ConfigError, match="AskTell looks for better noise, but sampler"):
            AskTell(CrossEntropy()).run(engine)

    def test_numbers_out_of_range(self, engines: Any) -> None:
        with pytest.raises(ConfigError, match="must be at least 1, but are 0 and 8"):
            AskTell(CrossEntropy(), population=0)
        with pytest.raises(ConfigError, match=r"must lie in \(0, 1\] and least_std be positive"):
            CrossEntropy(elite=0.0)
        with pytest.raises(ConfigError, match=r"neither search.rounds nor a budget"):
            AskTell(CrossEntropy(), rounds=None).run(engines(sampler=Euler(4)))
