"""VAR's schedules of learning rate and weight decay (held to its numbers in the golden cases)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from genscale.errors import ConfigError
from genscale.training.lr_schedule import Annealed, Constant
from genscale.training.optim import AdamW


def test_it_rises_stays_and_falls_to_the_last_step() -> None:
    schedule = Annealed(warmup_steps=10, initial_scale=0.1, flat_fraction=0.25, final_scale=0.2)
    steps = 10 + 101  # 101 after the warm-up: progress in hundredths
    assert schedule.factor(0, steps) == pytest.approx(0.1)
    assert schedule.factor(5, steps) == pytest.approx(0.55)
    assert [schedule.factor(10 + i, steps) for i in (0, 25)] == [1.0, 1.0]
    assert schedule.factor(10 + 40, steps) == pytest.approx(0.2 + 0.8 * 60 / 75)
    assert schedule.factor(10 + 100, steps) == pytest.approx(0.2)
    assert schedule.factor(10 + 500, steps) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("settings", "middle"),
    [
        ({"shape": "cosine", "flat_fraction": 0.0}, 0.2 + 0.8 * 0.5),
        ({"shape": "exponential", "flat_fraction": 0.0}, math.sqrt(0.2)),
        ({"shape": "linear", "flat_fraction": 0.0}, 0.6),
        # the line would be at 0.6; the knee is halfway from there to the peak
        ({"shape": "broken_linear", "flat_fraction": 0.5}, 0.8),
    ],
)
def test_shapes(settings: dict[str, Any], middle: float) -> None:
    schedule = Annealed(final_scale=0.2, **settings)
    assert schedule.factor(0, 101) == 1.0
    assert schedule.factor(50, 101) == pytest.approx(middle)
    assert schedule.factor(100, 101) == pytest.approx(0.2)


def test_weight_decay_follows_half_a_cosine_and_spares_what_it_spared() -> None:
    class Spared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 2))

    model = Spared()
    optimizer = AdamW(lr=0.1, weight_decay=0.2, final_weight_decay=0.6).build(model)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "weight_decay": 0.0})
    scheduler = Constant().build(optimizer, 5)
    found = []
    for _ in range(5):
        found.append([group["weight_decay"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    expected = [0.6 - 0.4 * 0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(5)]
    assert [row[0] for row in found] == pytest.approx(expected)
    assert [row[1] for row in found] == [0.0] * 5
    constant = AdamW(lr=0.1, weight_decay=0.2).build(model)
    assert "weight_decay_range" not in constant.param_groups[0]


def test_an_interrupted_schedule_goes_on_where_it_was() -> None:
    def started() -> tuple[torch.optim.Optimizer, Any]:
        law = AdamW(lr=0.1, weight_decay=0.2, final_weight_decay=0.6)
        optimizer = law.build(nn.Linear(2, 2))
        return optimizer, Annealed(warmup_steps=2).build(optimizer, 9)

    def walk(optimizer: torch.optim.Optimizer, scheduler: Any, steps: int) -> list[Any]:
        found = []
        for _ in range(steps):
            group = optimizer.param_groups[0]
            found.append((group["lr"], group["weight_decay"]))
            optimizer.step()
            scheduler.step()
        return found

    whole = walk(*started(), 9)
    optimizer, scheduler = started()
    first = walk(optimizer, scheduler, 4)
    again, resumed = started()
    again.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    assert first + walk(again, resumed, 5) == whole


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"shape": "linaer"}, "lr_schedule.shape must be one of linear, .* Did you mean 'linear'"),
        ({"flat_fraction": 1.0}, r"lr_schedule.flat_fraction must lie in \[0, 1\), .* is 1.0"),
        ({"shape": "broken_linear", "flat_fraction": 0.0}, "above 0 for shape=broken_linear"),
        ({"final_scale": -0.1}, "lr_schedule.final_scale must not be negative"),
        ({"final_scale": 0.0, "shape": "exponential"}, "above 0 for shape=exponential"),
        ({"warmup_steps": -1}, "lr_schedule.warmup_steps must be 0 or more"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Annealed(**settings)
