"""Classifier-free guidance: what it computes, when, and what it costs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from genscale.conditioning.base import NULL_LABEL, Conditioning
from genscale.errors import ConfigError
from genscale.guidance.base import Unguided
from genscale.guidance.cfg import ClassifierFree
from genscale.objectives.base import Denoiser, Level, Prediction, on
from genscale.objectives.schedule import DiscreteVP, LinearFlow, NoiseProcess
from genscale.samplers.base import State
from genscale.samplers.dpm_fast import DPMSolverFast
from genscale.samplers.ode import Heun
from genscale.samplers.sde import DDIM

LABELS = torch.tensor([0, 1, 2])


class Toy(Denoiser):
    """Estimates shifted by the label, of sums, products and quotients: alike in any batch."""

    def __init__(self, process: NoiseProcess | None = None, *, remembers: bool = False) -> None:
        self.process = process or LinearFlow()
        self.sample_shape = (2, 2)
        self.device = torch.device("cpu")
        self.remembers = remembers
        self.calls: list[list[int]] = []  # labels of each call
        self.level_lengths: list[int] = []

    def __call__(
        self, x: Tensor, level: Level, cond: Conditioning, memory: Any = None
    ) -> Prediction:
        assert cond.labels is not None
        self.calls.append(cond.labels.tolist())
        self.level_lengths.append(len(level))
        shift = (cond.labels + 0.5).to(x).view(-1, 1, 1)
        clean = x / (1 + x * x) + 0.25 * shift
        if self.remembers:
            seen = torch.zeros_like(x) if memory is None else memory[0]
            clean, memory = clean + 0.5 * seen, (seen + clean,)
        noise = (x - on(level.alpha, x) * clean) / on(level.sigma, x)
        return Prediction(clean, noise, memory, torch.ones(len(x), dtype=torch.float64))


def _x(count: int = 3) -> Tensor:
    return torch.linspace(-2, 2, count * 4).view(count, 2, 2).double()


def _level(*times: float) -> Level:
    return LinearFlow().level(torch.tensor(times, dtype=torch.float64))


def _branches(x: Tensor, level: Level, cond: Conditioning) -> tuple[Prediction, Prediction]:
    toy = Toy()
    return toy(x, level, cond), toy(x, level, cond.null())


class TestScale:
    def test_scale_1_is_the_conditional_view_itself(self) -> None:
        toy = Toy()
        assert ClassifierFree(1.0).wrap(toy) is toy
        assert Unguided().wrap(toy) is toy

    @pytest.mark.parametrize("scale", [0.0, 0.5, 1.4, 7.5])
    def test_it_extrapolates_from_the_null_branch(self, scale: float) -> None:
        x, level, cond = _x(), _level(0.3), Conditioning(labels=LABELS)
        out = ClassifierFree(scale).wrap(Toy())(x, level, cond)
        own, null = _branches(x, level, cond)
        torch.testing.assert_close(out.clean, null.clean + scale * (own.clean - null.clean))
        torch.testing.assert_close(out.noise, null.noise + scale * (own.noise - null.noise))
        # both estimates still describe x
        alpha, sigma = on(level.alpha, x), on(level.sigma, x)
        torch.testing.assert_close(alpha * out.clean + sigma * out.noise, x)

    def test_dimr_counts_its_scale_from_the_conditional_branch(self) -> None:
        x, level, cond = _x(), _level(0.3), Conditioning(labels=LABELS)
        out = ClassifierFree(1.4).wrap(Toy())(x, level, cond)
        own, null = _branches(x, level, cond)
        # the published 0.4: c + 0.4 (c - u)
        torch.testing.assert_close(out.noise, own.noise + 0.4 * (own.noise - null.noise))

    def test_both_branches_are_one_call(self) -> None:
        toy = Toy()
        out = ClassifierFree(2.0).wrap(toy)(_x(), _level(0.3), Conditioning(labels=LABELS))
        assert toy.calls == [[0, 1, 2, NULL_LABEL, NULL_LABEL, NULL_LABEL]]
        assert toy.level_lengths == [1]  # a shared level stays shared
        assert out.cost.tolist() == [2.0, 2.0, 2.0]

    def test_rows_at_different_levels(self) -> None:
        toy, x, cond = Toy(), _x(), Conditioning(labels=LABELS)
        level = _level(0.2, 0.5, 0.8)
        out = ClassifierFree(2.0).wrap(toy)(x, level, cond)
        assert toy.level_lengths == [6]
        for i in range(3):
            alone = ClassifierFree(2.0).wrap(Toy())(
                x[i : i + 1], level.select(torch.tensor([i])), cond.select(torch.tensor([i]))
            )
            assert torch.equal(out.clean[i], alone.clean[0])


class TestInterval:
    @pytest.mark.parametrize(
        ("time", "calls", "cost"),
        # (0.2, 0.6]: open below, closed above
        [(0.2, 3, 1.0), (0.3, 6, 2.0), (0.6, 6, 2.0), (0.61, 3, 1.0)],
    )
    def test_outside_only_the_conditional_branch_runs(
        self, time: float, calls: int, cost: float
    ) -> None:
        toy, cond = Toy(), Conditioning(labels=LABELS)
        out = ClassifierFree(3.0, interval=[0.2, 0.6]).wrap(toy)(_x(), _level(time), cond)
        assert [len(call) for call in toy.calls] == [calls]
        assert out.cost.tolist() == [cost] * 3
        own, _ = _branches(_x(), _level(time), cond)
        assert torch.equal(out.clean, own.clean) is (cost == 1.0)

    def test_rows_on_both_sides_pay_for_themselves_alone(self) -> None:
        toy, x, cond = Toy(), _x(), Conditioning(labels=LABELS)
        guidance = ClassifierFree(3.0, interval=[0.2, 0.6])
        level = _level(0.1, 0.4, 0.9)
        out = guidance.wrap(toy)(x, level, cond)
        assert toy.calls == [[0, 1, 2, NULL_LABEL]]
        assert out.cost.tolist() == [1.0, 2.0, 1.0]
        for i in range(3):
            row = torch.tensor([i])
            alone = guidance.wrap(Toy())(x[row], level.select(row), cond.select(row))
            assert torch.equal(out.clean[i], alone.clean[0])
            assert torch.equal(out.noise[i], alone.noise[0])

    def test_a_level_of_another_process_is_placed_by_its_snr(self) -> None:
        toy, guidance = Toy(), ClassifierFree(3.0, interval=[0.2, 0.6])
        own = _level(0.4)
        guidance.wrap(toy)(_x(), Level(5 * own.alpha, 5 * own.sigma), Conditioning(labels=LABELS))
        assert len(toy.calls[0]) == 6

    def test_samples_count_what_they_cost(self) -> None:
        toy = Toy()
        view = ClassifierFree(3.0, interval=[0.2, 0.6]).wrap(toy)
        sampler = Heun(5)
        state = sampler.run(view, Conditioning(labels=LABELS), torch.arange(3))
        # evaluations at 1 0.8 | 0.8 0.6 | 0.6 0.4 | 0.4 0.2 | 0.2: 2 at 0.6, 0.6, 0.4 and 0.4
        assert state.nfe.tolist() == [9.0 + 4.0] * 3
        assert sum(len(call) for call in toy.calls) == 3 * 13


class TestPowerCosine:
    def test_it_grows_from_none_to_all(self) -> None:
        guidance = ClassifierFree(3.0, form="power_cosine", power=2.0)
        scale = guidance.scale_at(_level(1.0, 0.5, 0.0), LinearFlow())
        # 1 + 2 * (1 - cos(pi * 0.25)) / 2 = 1 + (1 - 0.7071068)
        expected = [1.0, 2.0 - math.sqrt(0.5), 3.0]
        assert scale.tolist() == pytest.approx(expected, abs=1e-12)

    def test_pure_noise_costs_one_evaluation(self) -> None:
        toy, cond = Toy(), Conditioning(labels=LABELS)
        view = ClassifierFree(3.0, form="power_cosine").wrap(toy)
        assert view(_x(), _level(1.0), cond).cost.tolist() == [1.0, 1.0, 1.0]

    def test_time_is_that_of_the_models_process(self) -> None:
        guidance = ClassifierFree(3.0, form="power_cosine")
        level = DiscreteVP().level(0.5)
        timeless = Level(level.alpha, level.sigma)
        # (1 - cos(pi / 2)) / 2 is one half
        for given in (level, timeless):
            assert guidance.scale_at(given, DiscreteVP()).item() == pytest.approx(2.0)


class TestMemory:
    def test_each_branch_keeps_its_own(self) -> None:
        x, cond = _x(), Conditioning(labels=LABELS)
        view, memory = ClassifierFree(2.0).wrap(Toy(remembers=True)), None
        apart, own_memory, null_memory = Toy(remembers=True), None, None
        for time in (0.9, 0.5, 0.1):
            out = view(x, _level(time), cond, memory)
            own = apart(x, _level(time), cond, own_memory)
            null = apart(x, _level(time), cond.null(), null_memory)
            memory, own_memory, null_memory = out.memory, own.memory, null.memory
            assert torch.equal(out.memory["conditional"][0], own.memory[0])
            assert torch.equal(out.memory["null"][0], null.memory[0])
            torch.testing.assert_close(out.clean, 2 * own.clean - null.clean)

    def test_guidance_that_begins_late_begins_with_a_fresh_null_branch(self) -> None:
        x, cond, toy = _x(), Conditioning(labels=LABELS), Toy(remembers=True)
        view = ClassifierFree(2.0, interval=[0.0, 0.5]).wrap(toy)
        first = view(x, _level(0.9), cond)
        assert first.memory["null"] is None
        second = view(x, _level(0.4), cond, first.memory)
        fresh = Toy(remembers=True)(x, _level(0.4), cond.null())
        assert torch.equal(second.memory["null"][0], fresh.memory[0])
        assert second.cost.tolist() == [2.0, 2.0, 2.0]

    def test_rows_on_both_sides_keep_what_they_have(self) -> None:
        x, cond = _x(), Conditioning(labels=LABELS)
        view = ClassifierFree(2.0, interval=[0.3, 1.0]).wrap(Toy(remembers=True))
        first = view(x, _level(0.9), cond)
        second = view(x, _level(0.1, 0.5, 0.1), cond, first.memory)
        changed = (second.memory["null"][0] != first.memory["null"][0]).flatten(1).all(1)
        assert changed.tolist() == [False, True, False]

    def test_memory_cannot_begin_in_some_rows_only(self) -> None:
        view = ClassifierFree(2.0, interval=[0.3, 1.0]).wrap(Toy(remembers=True))
        with pytest.raises(ValueError, match="Some particles were evaluated before others"):
            view(_x(), _level(0.1, 0.5, 0.1), Conditioning(labels=LABELS))


@pytest.mark.parametrize("process", [LinearFlow(), DiscreteVP()], ids=["flow", "vp"])
@pytest.mark.parametrize(
    "sampler", [Heun(6), DDIM(6, eta=1.0), DPMSolverFast(8)], ids=["heun", "ddim", "dpm"]
)
def test_guided_particles_at_different_steps_go_together(
    sampler: Any, process: NoiseProcess
) -> None:
    guidance = ClassifierFree(2.0, interval=[0.2, 0.7])
    view = guidance.wrap(Toy(process))
    start = sampler.start(view, Conditioning(labels=LABELS), torch.arange(3))
    whole = start
    while int(whole.step.min()) < sampler.num_steps:
        whole = sampler.advance(view, whole)
    parts = []
    for row in range(3):
        part = start.select(torch.tensor([row]))
        for _ in range(row):
            part = sampler.advance(view, part)
        parts.append(part)
    mixed = State.cat(parts)
    while int(mixed.step.min()) < sampler.num_steps:
        mixed = sampler.advance(view, mixed)
    assert torch.equal(mixed.x, whole.x)
    assert torch.equal(mixed.nfe, whole.nfe)


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ({}, "ClassifierFree"),
        ({"channels": 3}, "ClassifierFree on 3 channels"),
        ({"form": "power_cosine", "power": 2}, "ClassifierFree growing with power 2"),
        ({"rescale": 0.7}, "ClassifierFree rescaled by 0.7"),
    ],
)
def test_protocols_tell_guidances_of_one_scale_apart(settings: dict, label: str) -> None:
    assert ClassifierFree(4.0, **settings).label == label


class TestErrors:
    def test_an_unconditional_model_cannot_be_guided(self) -> None:
        view = ClassifierFree(2.0).wrap(Toy())
        with pytest.raises(ConfigError, match=r"guidance.scale=2 needs .* Use guidance=none"):
            view(_x(), _level(0.5), Conditioning())

    @pytest.mark.parametrize(
        ("settings", "sentence"),
        [
            ({"scale": -1.0}, "guidance.scale must be finite and not negative, but is -1.0"),
            ({"scale": math.nan}, "guidance.scale must be finite"),
            ({"interval": [0.5]}, r"guidance.interval must be \[lo, hi\] .* but is \[0.5\]"),
            ({"interval": [0.6, 0.2]}, r"with 0 <= lo < hi <= 1, but is \[0.6, 0.2\]"),
            ({"interval": [0.0, 1.61]}, r"but is \[0.0, 1.61\]"),
            ({"form": "cosine"}, r"guidance.form .* Did you mean 'power_cosine'\?"),
            ({"power": 0.0}, "guidance.power must be positive, but is 0.0"),
        ],
    )
    def test_impossible_settings_are_refused(self, settings: dict, sentence: str) -> None:
        with pytest.raises(ConfigError, match=sentence):
            ClassifierFree(**settings)
