"""Gradients of rewards by noises: exact, the same however they are stored, counted, allowed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from genscale.conditioning.base import Conditioning
from genscale.objectives.base import Level, Prediction, on
from genscale.objectives.schedule import LinearFlow
from genscale.samplers.adaptive import Adaptive
from genscale.samplers.base import Sampler
from genscale.samplers.diffusers_bridge import DiffusersSampler
from genscale.samplers.multistep import DPMSolverMultistep
from genscale.samplers.ode import Euler, Heun
from genscale.samplers.sde import DDIM
from genscale.search.budget import Budget, BudgetSpent
from genscale.search.cost import Work
from genscale.search.frozen import frozen, networks
from genscale.search.gradient import Differentiable, Judged, Noises, Trajectory, gradient_problems
from tests.search.conftest import Gaussian, squash

SHAPE = (1, 2, 2)


def from_start(parameters: Tensor, rows: Tensor) -> Noises:
    return Noises(parameters.unflatten(1, SHAPE))


def from_all(parameters: Tensor, rows: Tensor) -> Noises:
    parts = parameters.view(len(parameters), -1, *SHAPE)
    return Noises(parts[:, 0], parts[:, 1:])


def judged(engine: Any, build: Any = from_start, **settings: Any) -> Judged:
    trajectory, noise = Trajectory(engine, **settings), engine.noise(engine.seeds).double()
    if build is from_all:
        steps = [engine.noise(engine.seeds + 1 + i) for i in range(engine.sampler.num_steps)]
        noise = torch.stack([noise, *steps], 1)
    return trajectory.judge(engine.start(1), noise.flatten(1), build)


SAMPLERS = {
    "euler": Euler(4, precision="float64"),
    "heun": Heun(3, precision="float64"),
    "2m": DPMSolverMultistep(4, precision="float64"),
    "ddim": DDIM(4, eta=0.7, precision="float64"),
}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("build", [from_start, from_all])
def test_finite_differences(engines: Any, name: str, build: Any) -> None:
    engine = engines(sampler=SAMPLERS[name], model=Gaussian(0.3, 0.8))
    base, start = engine.start(1), engine.noise(engine.seeds).double()
    noise = start.flatten(1).repeat(1, 1 if build is from_start else engine.sampler.num_steps + 1)
    # float32 pictures: the step is where rounding and curvature are both small
    trajectory, step = Trajectory(engine), 1e-2
    found = trajectory.judge(base, noise, build).gradient
    assert found is not None
    for place in range(noise.shape[1]):
        shift = torch.zeros_like(noise)
        shift[:, place] = step
        up, down = (
            trajectory.judge(base, noise + sign * shift, build, gradient=False).loss
            for sign in (1, -1)
        )
        torch.testing.assert_close((up - down) / (2 * step), found[:, place], atol=1e-5, rtol=1e-3)


def test_the_loss_is_that_of_plain_sampling(engines: Any) -> None:
    engine = engines(sampler=Euler(4))
    scores = engines(sampler=Euler(4)).finish(engine.start(1))
    found = judged(engine)
    assert torch.equal(found.scores.latents, scores.latents)
    torch.testing.assert_close(found.loss, -scores.value)  # the reward's loss is minus its value


class TestMemory:
    """None of what saves memory changes a number."""

    @pytest.mark.parametrize("settings", [{"checkpoint": False}, {"network_steps": 4}])
    def test_checkpoints_change_nothing(self, engines: Any, settings: dict[str, Any]) -> None:
        whole = judged(engines(sampler=Euler(4)))
        other = judged(engines(sampler=Euler(4)), **settings)
        assert torch.equal(whole.loss, other.loss)
        torch.testing.assert_close(whole.gradient, other.gradient, atol=0, rtol=0)

    @pytest.mark.parametrize("network_steps", [0, 1, 3])
    def test_the_way_past_the_network(self, engines: Any, network_steps: int) -> None:
        """One factor a step: of the exact denoiser in the last steps, of a constant v before."""
        mean, std, steps = 0.3, 0.8, 4
        sampler = Euler(steps, precision="float64")
        found = judged(
            engines(sampler=sampler, model=Gaussian(mean, std)), network_steps=network_steps
        )
        levels = sampler.grid(LinearFlow())
        factor = 1.0
        for step in range(steps):
            (alpha, alpha_next) = levels.alpha[step : step + 2].tolist()
            (sigma, sigma_next) = levels.sigma[step : step + 2].tolist()
            variance = (alpha * std) ** 2 + sigma**2
            clean, noise = alpha * std**2 / variance, sigma / variance
            if step < steps - network_steps:
                clean, noise = (each / (alpha**2 + sigma**2) for each in (alpha, sigma))
            factor *= alpha_next * clean + sigma_next * noise
        latents = found.scores.latents.clone().requires_grad_()
        loss = -(squash(latents) * 0.5 + 0.5).mean((1, 2, 3)).sum()
        (own,) = torch.autograd.grad(loss, latents)
        torch.testing.assert_close(found.gradient, factor * own.flatten(1), atol=1e-7, rtol=1e-5)
        assert torch.equal(
            found.loss, judged(engines(sampler=sampler, model=Gaussian(0.3, 0.8))).loss
        )

    def test_values_past_the_network_are_the_views_own(self) -> None:
        view, x = Gaussian(0.3, 0.8), torch.linspace(-2, 2, 8).view(2, *SHAPE).requires_grad_()
        level = view.process.level(torch.tensor([0.4], dtype=torch.float64))
        own = view(x, level, Conditioning())
        past = Differentiable(view, through=False)(x, level, Conditioning())
        assert torch.equal(past.clean, own.clean)
        assert torch.equal(past.noise, own.noise)
        assert past.clean.requires_grad

    def test_activations_grow_with_the_micro_batch_alone(self, engines: Any) -> None:
        def peak(prompts: int, micro_batch: int, **settings: Any) -> int:
            model = Deep()
            engine = engines(
                prompts=prompts, micro_batch=micro_batch, model=model, sampler=Euler(4)
            )
            judged(engine, **settings)
            return model.peak

        one = peak(1, 1, checkpoint=False)
        assert one >= 4 * Deep.layers  # all activations of all steps, a picture each
        assert peak(6, 1, checkpoint=False) == one
        assert peak(6, 3, checkpoint=False) == 3 * one
        assert peak(12, 3, checkpoint=False) == 3 * one
        # one call's activations, and the input of each
        assert peak(12, 3) < 2 * 3 * Deep.layers
        assert peak(1, 1, network_steps=1, checkpoint=False) < 2 * Deep.layers


class Deep(Gaussian):
    """A network of many layers that counts the pictures of activations that are alive."""

    layers = 10

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[StorageWeakRef, int]] = []
        self.peak = 0

    def __call__(
        self, x: Tensor, level: Level, cond: Conditioning, memory: Any = None
    ) -> Prediction:
        kept = x
        for _ in range(self.layers):
            kept = torch.tanh(kept)  # keeps its output for the way back
            self.made.append((StorageWeakRef(kept.untyped_storage()), len(x)))
            alive = [(ref, count) for ref, count in self.made if not ref.expired()]
            self.peak, self.made = max(self.peak, sum(count for _, count in alive)), alive
        noise = (x - on(level.alpha, x) * kept) / on(level.sigma, x)
        return Prediction(kept, noise, None, torch.ones(len(x), dtype=torch.float64))


def test_results_do_not_depend_on_the_micro_batch(engines: Any) -> None:
    whole = judged(engines(prompts=5, sampler=Euler(4)))
    parts = judged(engines(prompts=5, sampler=Euler(4), micro_batch=2))
    torch.testing.assert_close(parts.gradient, whole.gradient)
    assert torch.equal(parts.state.seeds, whole.state.seeds)


class TestCounting:
    @pytest.mark.parametrize(
        ("settings", "nfe", "backward"),
        [
            ({"checkpoint": False}, 5, 5),  # Heun(3) takes 2 + 2 + 1
            ({"checkpoint": True}, 10, 5),
            ({"checkpoint": True, "network_steps": 2}, 8, 3),
            ({"checkpoint": True, "network_steps": 0}, 5, 0),
        ],
    )
    def test_evaluations_there_again_and_back(
        self, engines: Any, settings: dict[str, Any], nfe: int, backward: int
    ) -> None:
        flops = torch.full((3,), 100.0, dtype=torch.float64)
        engine = engines(sampler=Heun(3), work=Work(flops, flops / 10))
        judged(engine, **settings)
        meter = engine.meter
        assert sum(engine.model.calls) == 2 * nfe  # two prompts
        assert meter.nfe.tolist() == [nfe] * 2
        assert meter.backward_calls.tolist() == [backward] * 2
        # a way back is worth two evaluations
        assert meter.flops.tolist() == pytest.approx([100.0 * (nfe + 2 * backward)] * 2)
        assert meter.decodes.tolist() == meter.reward_calls.tolist() == [1.0] * 2
        price = Trajectory(engine, **settings).price(engine.start(1))
        assert price == nfe + 2 * backward

    def test_what_goes_on_from_a_state(self, engines: Any) -> None:
        engine = engines(sampler=DDIM(4, eta=1.0))
        base = engine.evaluate(engine.run(engine.start(1), 1))
        spent = engine.meter.nfe.clone()
        trajectory = Trajectory(engine)
        noise = torch.ones(2, 3 * 4)
        trajectory.judge(base, noise, lambda own, rows: Noises(None, own.view(len(own), 3, *SHAPE)))
        # steps 1, 2 and 3, the first of them evaluated already: nothing to go back to there
        assert (engine.meter.nfe - spent).tolist() == [4.0, 4.0]
        assert engine.meter.backward_calls.tolist() == [2.0, 2.0]
        assert trajectory.price(base) == 8.0

    def test_a_way_back_counts_as_two_evaluations_of_the_budget(self, engines: Any) -> None:
        engine = engines(sampler=Euler(4), budget=Budget(nfe=16))
        judged(engine)  # 4 there, 4 again, 4 back
        assert engine.nfe_left().tolist() == [0.0, 0.0]

    @pytest.mark.parametrize("budget", [Budget(nfe=15), Budget(reward_calls=1)])
    def test_a_call_beyond_the_budget_is_refused_before_it_is_made(
        self, engines: Any, budget: Budget
    ) -> None:
        engine = engines(sampler=Euler(4), budget=budget)
        engine.meter.add("reward_calls", torch.tensor([1]))
        with pytest.raises(BudgetSpent):
            judged(engine)
        assert engine.model.calls == []

    def test_time(self, engines: Any) -> None:
        engine = engines(sampler=Euler(4), budget=Budget(seconds=1e-9))
        with pytest.raises(BudgetSpent):
            engine.each(3, "gradient", lambda rows: rows)


def test_work_is_done_in_micro_batches(engines: Any) -> None:
    engine = engines(micro_batch=2)
    parts = engine.each(5, "gradient", lambda rows: rows.tolist())
    assert parts == [[0, 1], [2, 3], [4]]
    assert engine.meter.seconds["gradient"] > 0


def test_a_caller_without_gradients_gets_them_all_the_same(engines: Any) -> None:
    with torch.no_grad():
        without = judged(engines(sampler=Euler(4)))
    assert torch.equal(without.gradient, judged(engines(sampler=Euler(4))).gradient)
    assert not without.scores.images.requires_grad
    assert not without.state.x.requires_grad


def test_inference_mode_is_told(engines: Any) -> None:
    engine = engines(sampler=Euler(4))
    with torch.inference_mode(), pytest.raises(ValueError, match="Search outside it"):
        judged(engine)


def test_a_start_noise_for_particles_that_go_on(engines: Any) -> None:
    engine = engines()
    base = engine.evaluate(engine.start(1))
    with pytest.raises(ValueError, match="give one of the two"):
        Trajectory(engine).judge(base, torch.ones(2, 4), from_start)


def test_a_loss_without_gradients_is_told(engines: Any) -> None:
    engine = engines(decode=torch.no_grad()(squash))
    with pytest.raises(ValueError, match="No gradient reaches the noise from reward Brightness"):
        judged(engine)


class TestFrozen:
    def test_weights_learn_nothing_and_are_set_back(self) -> None:
        first, second = nn.Linear(2, 2), nn.Linear(2, 2)
        second.bias.requires_grad_(False)
        with frozen(first, [second]):
            assert not any(p.requires_grad for net in (first, second) for p in net.parameters())
        assert all(p.requires_grad for p in first.parameters())
        assert [p.requires_grad for p in second.parameters()] == [True, False]

    def test_networks_are_found_where_they_hide(self, engines: Any) -> None:
        inner, outer, held, bound = (nn.Linear(1, 1) for _ in range(4))

        def decode(latents: Tensor) -> Tensor:
            return squash(outer(latents))

        view = Differentiable(Gaussian())
        view.view.network = {"own": inner}  # type: ignore[attr-defined]
        where: list[Callable[..., Any]] = [decode, partial(decode, held), bound.forward]
        found = networks(view, *where, view)
        assert {id(each) for each in found} == {id(each) for each in (inner, outer, held, bound)}
        assert len(found) == 4


@pytest.mark.parametrize(
    ("sampler", "reason"),
    [
        (Adaptive(2), "chooses its steps on the way"),
        (DiffusersSampler("IPNDMScheduler", 4), "divides by an alpha of almost 0"),
    ],
)
def test_samplers_without_a_way_back(sampler: Sampler, reason: str) -> None:
    assert reason in gradient_problems("ReNO", sampler)[0]
    assert gradient_problems("ReNO", Euler(4)) == []
