"""Oscillating guidance and dynamic thresholding: when they act, on what, and together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from genscale import rng
from genscale.assembly import build
from genscale.conditioning.base import NULL_LABEL, Conditioning
from genscale.errors import ConfigError
from genscale.guidance.apg import ProjectedGuidance
from genscale.guidance.base import Guidance, Unguided
from genscale.guidance.cfg import ClassifierFree
from genscale.guidance.cfg_plus_plus import ClassifierFreePlusPlus
from genscale.guidance.dynamic_threshold import DynamicThreshold, ThresholdedView, thresholded
from genscale.guidance.oscillating import Oscillating
from genscale.objectives.base import Denoiser, Level, Prediction, on
from genscale.objectives.paths import VarianceExploding
from genscale.objectives.schedule import LinearFlow, NoiseProcess
from genscale.samplers.grid import GridSampler
from genscale.samplers.ode import Euler, Heun
from genscale.samplers.schedules import Karras

LABELS = Conditioning(labels=torch.tensor([0, 1, 2]))


class Toy(Denoiser):
    """The conditional estimate is the label plus 2, the unconditional one 1, whatever x."""

    def __init__(self, process: NoiseProcess, shape: tuple[int, ...] = (2, 3)) -> None:
        self.process, self.sample_shape, self.device = process, shape, torch.device("cpu")
        self.block_size = 5

    def __call__(
        self, x: Tensor, level: Level, cond: Conditioning, memory: Any = None
    ) -> Prediction:
        assert cond.labels is not None
        value = torch.where(cond.labels == NULL_LABEL, 1, cond.labels + 2)
        clean = on(value, x).expand_as(x)
        noise = (x - on(level.alpha, x) * clean) / on(level.sigma, x)
        seen = torch.zeros(len(x)) if memory is None else memory
        return Prediction(clean, noise, seen + 1, torch.ones(len(x), dtype=torch.float64))


def weights_of(guidance: Guidance, sampler: GridSampler, process: NoiseProcess) -> list[float]:
    """Return the weight at every level at which a step begins, read off the estimates."""
    levels = sampler.levels(process)
    view = guidance.along(levels).wrap(Toy(process))
    found = []
    for i in range(sampler.num_steps):
        out = view(torch.ones(3, 2, 3), levels.select(torch.tensor([i])), LABELS)
        found.append(float(out.clean[2, 0, 0] - 1.0) / 3.0)  # of u = 1 and c = 4
    return found


class TestTurns:
    @pytest.mark.parametrize(
        ("sampler", "process"),
        [
            (Euler(7), LinearFlow()),
            (Heun(7, schedule=Karras()), VarianceExploding()),
            (Euler(7, churn=3.0, schedule=Karras()), VarianceExploding()),
        ],
        ids=["flow", "ve", "churn"],
    )
    def test_weights_take_turns_after_the_warm_phase(
        self, sampler: GridSampler, process: NoiseProcess
    ) -> None:
        once = weights_of(Oscillating(6.0, low=2.0, warm_up=3), sampler, process)
        assert once == pytest.approx([6, 6, 6, 2, 6, 2, 6])
        twice = weights_of(Oscillating(6.0, low=2.0, warm_up=1, every=2), sampler, process)
        assert twice == pytest.approx([6, 2, 2, 6, 6, 2, 2])

    def test_a_low_weight_of_1_costs_one_evaluation(self) -> None:
        sampler, toy = Euler(6, schedule=Karras()), Toy(VarianceExploding())
        guidance = Oscillating(6.0, low=1.0, warm_up=2).along(sampler.levels(toy.process))
        state = sampler.run(guidance.wrap(toy), LABELS, torch.arange(3))
        # weights 6 6 1 6 1 6
        assert state.nfe.tolist() == [2 + 2 + 1 + 2 + 1 + 2] * 3

    def test_a_level_between_belongs_to_the_step_it_lies_in(self) -> None:
        sampler, process = Euler(4), LinearFlow()
        guidance = Oscillating(6.0, low=2.0, warm_up=1).along(sampler.levels(process))
        times = torch.tensor([1.0, 0.76, 0.75, 0.6, 0.5, 0.26, 0.25, 0.0], dtype=torch.float64)
        weights = guidance.scale_at(process.level(times), process)
        assert weights.tolist() == [6, 6, 2, 2, 6, 6, 2, 6]
        # of two axes, one level a frame
        frames = guidance.scale_at(process.level(times.view(2, 4)), process)
        assert frames.tolist() == [[6, 6, 2, 2], [6, 6, 2, 6]]

    def test_outside_of_the_interval_nothing_guides(self) -> None:
        guidance = Oscillating(6.0, low=2.0, warm_up=1, interval=[0.3, 0.8])
        assert weights_of(guidance, Euler(5), LinearFlow()) == pytest.approx([1, 2, 6, 2, 1])

    def test_steps_may_be_taken_again_and_in_any_company(self) -> None:
        """The weight is that of the level: nothing is counted, so nothing can be miscounted."""
        sampler, toy = Euler(6, schedule=Karras()), Toy(VarianceExploding())
        view = Oscillating(6.0, low=2.0, warm_up=2).along(sampler.levels(toy.process)).wrap(toy)
        state = sampler.start(view, LABELS, torch.arange(3))
        for _ in range(4):
            state = sampler.advance(view, state)
        mixed = sampler.renoise(state, torch.tensor([2, 4, 3]))
        again = sampler.evaluate(view, mixed).clean
        assert again is not None
        # steps 2 and 4 have weight 2, step 3 has 6; u = 1, c = 2, 3, 4
        assert again[:, 0, 0].tolist() == [1 + 2 * 1, 1 + 2 * 2, 1 + 6 * 3]

    def test_without_the_samplers_steps_it_says_so(self) -> None:
        with pytest.raises(ConfigError, match=r"does not know the sampler's steps yet"):
            Oscillating(6.0).wrap(Toy(LinearFlow()))
        with pytest.raises(ConfigError, match=r"no grid of levels\. Use guidance=cfg"):
            Oscillating(6.0).along(None)
        toy = Toy(LinearFlow())
        assert Oscillating(1.0, low=1.0).wrap(toy) is toy

    def test_impossible_numbers_are_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"guidance.low must be finite and not negative"):
            Oscillating(low=-1.0)
        with pytest.raises(ConfigError, match=r"guidance.warm_up must be a whole number of at le"):
            Oscillating(warm_up=-1)
        with pytest.raises(ConfigError, match=r"guidance.every must be a whole number"):
            Oscillating(every=0)


class TestThreshold:
    @pytest.mark.parametrize("quantile", [0.5, 0.9, 0.995, 1.0])
    def test_it_is_the_written_rule_sample_by_sample(self, quantile: float) -> None:
        clean = 3.0 * rng.normal(rng.key(1, torch.arange(4)), (3, 2, 8, 8))
        clean[1] *= 0.1  # its quantile is below 1: it stays as it is
        found = thresholded(clean, quantile)
        for row, own in zip(clean, found, strict=True):
            q = max(float(torch.quantile(row.abs().flatten(), quantile)), 1.0)
            assert torch.allclose(own, row.clamp(-q, q) / q, atol=1e-6)
        assert float(found.abs().max()) <= 1.0
        if quantile < 1.0:
            assert torch.equal(found[1], clean[1].clamp(-1, 1))

    def test_estimates_still_describe_x(self) -> None:
        process = VarianceExploding()
        view = DynamicThreshold(7.0).wrap(Toy(process))
        x = 2.0 * rng.normal(rng.key(2, torch.arange(3)), (2, 3))
        level = process.level(torch.tensor([0.6], dtype=torch.float64))
        out = view(x, level, LABELS)
        assert float(out.clean.abs().max()) == 1.0  # of 1 + 7 (label + 1)
        torch.testing.assert_close(
            on(level.alpha, x) * out.clean + on(level.sigma, x) * out.noise, x
        )
        assert out.cost.tolist() == [2.0] * 3

    def test_it_goes_around_any_guidance(self) -> None:
        process, sampler = LinearFlow(), Euler(4)
        x = rng.normal(rng.key(3, torch.arange(3)), (2, 3))
        level = sampler.levels(process).select(torch.tensor([2]))
        inside: list[Guidance] = [
            Unguided(), ClassifierFree(4.0), ProjectedGuidance(5.0), Oscillating(6.0, low=3.0)
        ]  # fmt: skip
        for guidance in inside:
            along = guidance.along(sampler.levels(process))
            plain = along.wrap(Toy(process))(x, level, LABELS)
            outer = DynamicThreshold(guidance=guidance).along(sampler.levels(process))
            out = outer.wrap(Toy(process))(x, level, LABELS)
            assert torch.equal(out.clean, thresholded(plain.clean, 0.995))
            assert torch.equal(out.cost, plain.cost)

    def test_memories_pass_through_and_so_does_everything_else(self) -> None:
        view = DynamicThreshold(guidance=Unguided()).wrap(Toy(LinearFlow()))
        assert isinstance(view, ThresholdedView)
        state = Euler(5).run(view, LABELS, torch.arange(3))
        assert state.memory.tolist() == [5.0] * 3
        assert view.block_size == 5
        with pytest.raises(AttributeError, match="no_such_thing"):
            view.no_such_thing  # noqa: B018

    def test_a_run_builds_it_with_what_is_inside(self) -> None:
        node = {
            "_target_": "genscale.guidance.dynamic_threshold.DynamicThreshold",
            "quantile": 0.99,
            "guidance": {"_target_": "genscale.guidance.oscillating.Oscillating", "scale": 5.0},
        }
        guidance = build(node, path="guidance")
        assert isinstance(guidance.guidance, Oscillating)
        assert guidance.scale == 5.0
        assert guidance.interval is None

    def test_impossible_settings_are_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"guidance.quantile must lie in \(0, 1\]"):
            DynamicThreshold(quantile=0.0)
        with pytest.raises(ConfigError, match=r"guidance.guidance=Oscillating was given too"):
            DynamicThreshold(3.0, guidance=Oscillating())


def test_protocols_tell_them_apart() -> None:
    labels = [
        ClassifierFree(4.0).label,
        DynamicThreshold(4.0).label,
        DynamicThreshold(4.0, quantile=0.9).label,
        Oscillating(4.0, warm_up=5).label,
        Oscillating(4.0, low=2.0, warm_up=5).label,
        DynamicThreshold(guidance=Oscillating(4.0, warm_up=5)).label,
    ]
    assert len(set(labels)) == len(labels)
    assert labels[1] == "ClassifierFree within the 0.995 quantile"
    assert labels[3] == "Oscillating and 1 in turns of 1 after 5 steps"


def test_whether_samples_are_other_ones() -> None:
    inactive: list[Guidance] = [Unguided(), ClassifierFree(1.0), Oscillating(1.0, low=1.0)]
    assert not any(guidance.active for guidance in inactive)
    active: list[Guidance] = [
        ClassifierFree(1.5), Oscillating(1.0, low=2.0), DynamicThreshold(1.0),
        ClassifierFreePlusPlus(1.0),
    ]  # fmt: skip
    assert all(guidance.active for guidance in active)
