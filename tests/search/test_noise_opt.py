"""ReNO: the official loop for many prompts at once, any-time, within the budget."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from genscale import rng
from genscale.errors import ConfigError
from genscale.rewards.base import Request, RewardOutput
from genscale.samplers.adaptive import Adaptive
from genscale.samplers.next_scale import NextScale
from genscale.samplers.ode import Euler, Heun
from genscale.search.budget import Budget
from genscale.search.descent import Descent, NoiseDescent, clip_rows
from genscale.search.noise_modifier import NoiseModifier
from genscale.search.noise_opt import NoiseOptimisation
from genscale.search.noise_regularisers import norm_penalty
from genscale.search.plain import PlainSampling
from genscale.search.row_lbfgs import RowLBFGS
from tests.search.conftest import Brightness, Gaussian, squash
from tests.search.families import world

WAYS: dict[str, dict[str, Any]] = {
    "reno": {},
    "adam": {"optimiser": "adam", "rate": 0.1},
    "lbfgs": {"optimiser": "lbfgs"},
    "modifier": {"param": "modifier", "optimiser": "adam", "rate": 1e-2},
    "past the network": {"network_steps": 1},
}


def test_is_the_official_loop(engines: Any) -> None:
    """One prompt, torch's own optimiser and clip."""
    engine = engines(prompts=1, sampler=Euler(3))
    found = NoiseOptimisation(6).run(engine).extra["loss"][0]
    sampler, model = engine.sampler, Gaussian()
    noise = engine.noise(engine.seeds).requires_grad_()
    optimiser = torch.optim.SGD([noise], lr=5.0, momentum=0.9, nesterov=True)
    expected = []
    for _ in range(7):
        latents = sampler.run(model, engine.cond, engine.seeds, noise).x
        loss = -(squash(latents) * 0.5 + 0.5).mean() + 0.01 * norm_penalty(noise).sum()
        expected.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(noise, 0.1)
        optimiser.step()
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("way", WAYS)
class TestEveryWay:
    def test_without_steps_it_is_plain_sampling(self, engines: Any, way: str) -> None:
        plain = PlainSampling().run(engines(sampler=Euler(3)))
        for settings in ({"iterations": 0}, {"iterations": 2, "rate": 0.0}):
            result = NoiseOptimisation(**{**WAYS[way], **settings}).run(engines(sampler=Euler(3)))
            assert torch.equal(result.latents, plain.latents)

    def test_the_reward_rises(self, engines: Any, way: str) -> None:
        plain = PlainSampling().run(engines(sampler=Euler(3)))
        result = NoiseOptimisation(15, **WAYS[way]).run(engines(sampler=Euler(3)))
        assert (result.rewards["reward"] > plain.rewards["reward"] + 0.05).all()
        assert result.extra["iterations"].tolist() == [15, 15]

    def test_prompts_and_micro_batches_do_not_meet(self, engines: Any, way: str) -> None:
        asked = [Request(label=n) for n in (2, 9, 5)]
        search = NoiseOptimisation(8, **WAYS[way])
        whole = search.run(engines(prompts=3, sampler=Euler(3), requests=asked))
        parts = search.run(engines(prompts=3, sampler=Euler(3), requests=asked, micro_batch=2))
        alone = search.run(engines(prompts=1, sampler=Euler(3), requests=asked[:1]))
        torch.testing.assert_close(parts.latents, whole.latents, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(alone.latents, whole.latents[:1], atol=1e-4, rtol=1e-3)


def test_the_noise_keeps_its_norm(engines: Any) -> None:
    """The penalty holds |z| near sqrt(D - 1), or the brightest picture is that of endless noise."""
    norms: list[float] = []

    class Watching(Gaussian):
        def __call__(self, x: Tensor, level: Any, cond: Any, memory: Any = None) -> Any:
            if float(level.sigma[0]) == 1.0:
                norms.append(float(x.detach().norm()))
            return super().__call__(x, level, cond, memory)

    for regulariser in (0.0, 0.1):
        search = NoiseOptimisation(30, regulariser=regulariser, checkpoint=False)
        search.run(engines(prompts=1, model=Watching(), sampler=Euler(3)))
    free, held = norms[30], norms[-1]
    assert free > 6.0
    assert held == pytest.approx(math.sqrt(3), abs=1.2)


def test_the_best_is_kept_not_the_last(engines: Any) -> None:
    # steps so long that they lead past the light that was asked for, and back
    asked = [Request(label=5)] * 2
    search = NoiseOptimisation(12, rate=40.0, regulariser=0.0, clip=None)
    result = search.run(engines(sampler=Euler(3), requests=asked))
    losses = result.extra["loss"]
    assert (losses[:, -1] > losses.min(1).values).all()
    torch.testing.assert_close(-result.rewards["reward"], losses.min(1).values)


class TestBudget:
    """An iteration takes n evaluations there, n again and n back, worth two; the last sample n."""

    @pytest.mark.parametrize(
        ("nfe", "steps"), [(3, 0), (14, 0), (15, 1), (26, 1), (27, 2), (75, 6), (1000, 10)]
    )
    def test_evaluations(self, engines: Any, nfe: int, steps: int) -> None:
        engine = engines(sampler=Euler(3), budget=Budget(nfe=nfe))
        result = NoiseOptimisation(10).run(engine)
        assert result.extra["iterations"].tolist() == [steps] * 2
        spent = result.cost.nfe + 2 * result.cost.backward_calls
        assert spent.tolist() == [12.0 * steps + 3] * 2
        assert sum(engine.model.calls) == result.cost.nfe.sum()
        assert result.finished.all()

    def test_rewards(self, engines: Any) -> None:
        budget = Budget(reward_calls=4)
        result = NoiseOptimisation(None).run(engines(sampler=Heun(2), budget=budget))
        assert result.cost.reward_calls.tolist() == [4.0, 4.0]
        assert result.extra["iterations"].tolist() == [3, 3]

    def test_as_the_budget_allows(self, engines: Any) -> None:
        search = NoiseOptimisation(None, checkpoint=False)
        result = search.run(engines(sampler=Euler(3), budget=Budget(nfe=40)))
        assert result.extra["iterations"].tolist() == [4, 4]  # 4 * 9 + 3

    def test_no_number_and_no_budget(self, engines: Any) -> None:
        with pytest.raises(ConfigError, match="search has no end"):
            NoiseOptimisation(None).run(engines(sampler=Euler(3)))

    def test_less_than_one_sample(self, engines: Any) -> None:
        with pytest.raises(ConfigError, match=r"budget.nfe=2 is smaller than the 3 that one"):
            NoiseOptimisation(5).run(engines(sampler=Euler(3), budget=Budget(nfe=2)))


class Enough(Brightness):
    """Brightness, met above a half."""

    def score(self, images: Tensor, handle: Any, index: Tensor) -> RewardOutput:
        output = super().score(images, handle, index)
        output.parts["met"] = (output.value > 0.5).float()
        return output


def test_a_prompt_whose_request_is_met_ends_by_itself(engines: Any) -> None:
    search = NoiseOptimisation(40, patience=2)
    engine = engines(prompts=4, sampler=Euler(3), reward=Enough())
    result = search.run(engine)
    iterations, losses = result.extra["iterations"], result.extra["loss"]
    assert len(set(iterations.tolist())) > 1
    assert (iterations < 40).all()
    assert (result.rewards["reward"] > 0.5).all()
    for prompt, taken in enumerate(iterations.tolist()):
        assert losses[prompt, taken].isfinite()
        assert losses[prompt, taken + 1 :].isnan().all()
        spent = 6.0 * (taken + 1)  # each sample there and again: the last was not known to be it
        assert result.cost.nfe[prompt] == spent
    # the others go on as they would have
    alone = search.run(engines(prompts=1, sampler=Euler(3), reward=Enough()))
    torch.testing.assert_close(alone.latents, result.latents[:1])


def test_a_gradient_that_is_not_finite_ends_its_prompt_alone(engines: Any) -> None:
    class Torn(Brightness):
        def loss(self, images: Tensor, handle: Any, index: Tensor) -> Tensor:
            torn = torch.where(index == 0, torch.nan, 1.0)
            return -images.flatten(1).mean(1) * torn

    result = NoiseOptimisation(3).run(engines(sampler=Euler(3), reward=Torn()))
    assert result.extra["sound"].tolist() == [False, True]
    assert result.extra["iterations"].tolist() == [0, 3]
    plain = PlainSampling().run(engines(sampler=Euler(3)))
    assert torch.equal(result.latents[0], plain.latents[0])


def test_genealogy_tells_every_sample(engines: Any) -> None:
    result = NoiseOptimisation(3).run(engines(sampler=Euler(3)))
    generations = result.genealogy.generations
    assert [each.event for each in generations] == ["start", "move", "move", "move"]
    assert result.genealogy.alive().tolist() == [1, 1]
    best = torch.stack([each.value for each in generations]).max(0).values
    assert torch.equal(best, result.rewards["reward"])


class TestRealNetworks:
    def test_flow(self) -> None:
        """Conditions, weights and decoder of a network; every prompt gets brighter."""
        tiny = world("dimr-flow")
        weights = list(tiny.model.backbone.parameters())
        plain = PlainSampling().run(tiny.engine())
        result = NoiseOptimisation(6, regulariser=0.001).run(tiny.engine())
        assert (result.rewards["reward"] > plain.rewards["reward"]).all()
        assert all(p.grad is None for p in weights)
        parts = NoiseOptimisation(6, regulariser=0.001).run(tiny.engine(micro_batch=2))
        torch.testing.assert_close(parts.latents, result.latents, atol=1e-3, rtol=1e-3)

    def test_guidance_counts_both_branches(self) -> None:
        tiny = world("dit-ddpm")
        result = NoiseOptimisation(1).run(tiny.engine())
        assert result.cost.nfe.tolist() == [8.0 + 8.0 + 8.0] * 3  # 4 guided steps, thrice
        assert result.cost.backward_calls.tolist() == [8.0] * 3

    def test_scale_wise_models_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="works on diffusion models, but the model is scale-"):
            NoiseOptimisation(1).run(world("var").engine())
        assert len(NoiseOptimisation(1).problems(NextScale(4))) == 1


def test_what_it_cannot_go_back_through() -> None:
    class Blind(Brightness):
        differentiable = False

    search = NoiseOptimisation(1)
    problems = NoiseDescent.problems(search, Adaptive(2), Blind())
    assert problems == search.problems(Adaptive(2), Blind())
    assert "follows the gradient of the reward" in problems[0]
    assert "chooses its steps on the way" in problems[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterations": -1}, "search.iterations must be at least 0"),
        ({"optimiser": "adm"}, "search.optimiser must be one of sgd, adam, lbfgs.*'adm'.*adam"),
        ({"param": "noises"}, "search.param must be one of noise, modifier.*noise"),
        ({"rate": math.inf}, "search.rate must be at least 0.0 and finite, but is inf"),
        ({"network_steps": -1}, "search.network_steps must be at least 0"),
        ({"patience": 0}, "search.patience must be at least 1"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NoiseOptimisation(**settings)


def test_labels_tell_what_changes_results() -> None:
    assert NoiseOptimisation().label == "NoiseOptimisation(50, sgd 5, clip 0.1, regulariser 0.01)"
    labels = {NoiseOptimisation(**way).label for way in WAYS.values()}
    assert len(labels) == len(WAYS)
    # memory changes no number
    assert NoiseOptimisation(checkpoint=False).label == NoiseOptimisation().label
    assert Descent(None, "lbfgs", 1.0, None).words() == ["budget", "lbfgs 1", "clip none"]


def test_only_longer_rows_are_clipped() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.03, 0.04], [0.0, 0.0]])
    expected = torch.tensor([[0.06, 0.08], [0.03, 0.04], [0.0, 0.0]])
    torch.testing.assert_close(clip_rows(rows, 0.1), expected)


class TestModifier:
    def test_changes_nothing_at_first(self) -> None:
        for shape in ((2, 5), (3, 4, 4), (2, 3, 4, 4)):
            modifier, seeds = NoiseModifier(shape, 4), torch.arange(2)
            noise = rng.normal(rng.key(seeds, 9), shape)
            weights = modifier.initial(seeds)
            assert weights.shape == (2, modifier.size)
            assert torch.equal(modifier(weights, noise), noise)

    def test_gradients_reach_it(self) -> None:
        modifier, seeds = NoiseModifier((2, 4, 4), 4), torch.arange(3)
        weights = modifier.initial(seeds).requires_grad_()
        noise = rng.normal(rng.key(seeds, 9), (2, 4, 4))
        modifier(weights, noise).square().sum().backward()
        last = 4 * 2 * 9 + 2  # the zero layer: only it can move at first
        assert weights.grad is not None
        assert (weights.grad[:, -last:] != 0).any(1).all()
        assert (weights.grad[:, :-last] == 0).all()

    def test_every_particle_has_its_own(self) -> None:
        modifier, seeds = NoiseModifier((2, 4, 4), 4), torch.arange(3)
        weights = rng.normal(rng.key(seeds, 1), (modifier.size,))
        noise = rng.normal(rng.key(seeds, 9), (2, 4, 4))
        both = modifier(weights, noise)
        torch.testing.assert_close(modifier(weights[1:2], noise[1:2]), both[1:2])


class TestLBFGS:
    def test_quadratics_of_their_own(self) -> None:
        """Rows of other condition numbers and scales reach their minima in few evaluations."""
        scales = torch.tensor([[1.0, 1.0, 1.0], [1.0, 10.0, 100.0], [1e-2, 0.1, 1.0]]).double()
        goal = torch.tensor([[1.0, -2.0, 3.0]]).double()
        place = torch.zeros(3, 3, dtype=torch.float64)
        search = RowLBFGS(place, history=3)
        for _ in range(40):
            off = place - goal
            place = search.step(place, 0.5 * (scales * off.square()).sum(1), scales * off)
        torch.testing.assert_close(search.place, goal.expand(3, 3), atol=1e-3, rtol=1e-3)

    def test_a_step_that_does_not_fall_is_tried_shorter(self) -> None:
        search = RowLBFGS(torch.zeros(1, 1), rate=4.0)
        tried = search.step(torch.zeros(1, 1), torch.tensor([1.0]), torch.tensor([[-2.0]]))
        assert tried.item() == 4.0  # (x - 1)^2 rises to 9 there; its parabola is least at 1
        again = search.step(tried, torch.tensor([9.0]), torch.tensor([[6.0]]))
        assert again.item() == pytest.approx(1.0)
        assert search.place.item() == 0.0
