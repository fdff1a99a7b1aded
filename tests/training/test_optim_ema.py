"""Optimizers, schedules and averages against their closed forms."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from genscale.backbones.base import Backbone
from genscale.errors import ConfigError
from genscale.training.ema import ConstantEMA, HalfLifeEMA, PowerEMA
from genscale.training.lr_schedule import Constant, Cosine, WarmupStableDecay
from genscale.training.optim import AdamW


class Tiny(Backbone):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.gate = nn.Parameter(torch.ones(2))

    def no_weight_decay(self) -> set[str]:
        return {"gate"}


class TestAdamW:
    def test_named_parameters_get_no_decay(self) -> None:
        model = Tiny()
        optimizer = AdamW(lr=0.1, weight_decay=0.5).build(model)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        # with zero gradients only decay moves a weight: w (1 - lr * decay)
        torch.testing.assert_close(model.linear.weight, before["linear.weight"] * (1 - 0.1 * 0.5))
        assert torch.equal(model.gate, before["gate"])

    def test_a_marked_step_is_skipped_whole(self) -> None:
        model = Tiny()
        optimizer = AdamW(lr=0.1, weight_decay=0.5).build(model)
        before = copy.deepcopy(model.state_dict())
        for p in model.parameters():
            p.grad = torch.full_like(p, float("nan"))
        optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
        optimizer.step()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_a_rate_of_zero_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"optim.lr must be positive, but 0 was given"):
            AdamW(lr=0)


class TestSchedules:
    def test_warmup_is_linear_and_ends_at_the_peak(self) -> None:
        schedule = Constant(warmup_steps=4)
        assert [schedule.factor(step, 100) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]

    def test_cosine_is_half_way_down_in_the_middle(self) -> None:
        schedule = Cosine(warmup_steps=0, final_scale=0.1)
        assert schedule.factor(0, 100) == pytest.approx(1.0)
        assert schedule.factor(50, 100) == pytest.approx(0.55)
        assert schedule.factor(100, 100) == pytest.approx(0.1)
        assert schedule.factor(500, 100) == pytest.approx(0.1)

    def test_stable_then_decay_over_the_last_part(self) -> None:
        schedule = WarmupStableDecay(warmup_steps=10, decay_fraction=0.5)
        assert schedule.factor(49, 100) == 1.0
        assert schedule.factor(75, 100) == pytest.approx(0.5)
        assert schedule.factor(100, 100) == pytest.approx(0.0)


class TestAverages:
    def test_constant_average_is_the_geometric_sum(self) -> None:
        model, law = nn.Linear(1, 1, bias=False), ConstantEMA(decay=0.9)
        average = copy.deepcopy(model)
        start = average.weight.item()
        values = [3.0, -1.0, 2.0]
        for step, value in enumerate(values, 1):
            model.weight.data.fill_(value)
            law.update(average, model, step)
        expected = 0.9**3 * start + 0.1 * (0.81 * 3.0 + 0.9 * -1.0 + 2.0)
        assert average.weight.item() == pytest.approx(expected, rel=1e-6)

    def test_warmup_forgets_the_start(self) -> None:
        law = ConstantEMA(decay=0.998, warmup=True)
        assert law.decay_at(1) == pytest.approx(2 / 11)
        assert law.decay_at(10**6) == 0.998

    def test_after_a_half_life_weights_count_half(self) -> None:
        law = HalfLifeEMA(half_life=6000)
        assert law.decay_at(1) ** 6000 == pytest.approx(0.5)
        assert law.decay_at(1) == pytest.approx(0.99988448, abs=1e-8)  # Snap Video's
        assert law.name == "ema_6000"
        assert HalfLifeEMA(half_life=6000, warmup=True).decay_at(1) == pytest.approx(2 / 11)
        with pytest.raises(ConfigError, match=r"ema.half_life must be positive, but 0 was given"):
            HalfLifeEMA(half_life=0)

    def test_power_profile_has_the_width_asked_for(self) -> None:
        # EDM2 (arXiv:2312.02696) states gamma 16.97 and 6.94 for widths 0.05 and 0.10
        assert PowerEMA(sigma_rel=0.05).gamma == pytest.approx(16.97, abs=0.01)
        assert PowerEMA(sigma_rel=0.10).gamma == pytest.approx(6.94, abs=0.01)
        # the first step takes the weights as they are
        assert PowerEMA(sigma_rel=0.05).decay_at(1) == 0.0

    def test_the_average_stays_float32_where_weights_are_bfloat16(self) -> None:
        # at decay 0.9999 a bfloat16 average would not move at all
        model = nn.Linear(1, 1, bias=False)
        average = copy.deepcopy(model)
        average.weight.data.fill_(1.0)
        model.weight.data.fill_(0.0)
        model.to(torch.bfloat16)
        ConstantEMA(decay=0.9999).update(average, model, 1)
        assert average.weight.dtype == torch.float32
        assert average.weight.item() == pytest.approx(0.9999, abs=1e-7)

    def test_a_decay_of_one_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"ema.decay must be in \[0, 1\), but 1.0"):
            ConstantEMA(decay=1.0)
