"""Rates that fall at milestones, once or in several equal periods."""

from __future__ import annotations

from typing import Any

import pytest

from genscale.errors import ConfigError
from genscale.training.lr_schedule import MultiStep


def test_the_rate_is_halved_at_shares_of_the_run() -> None:
    # LUA's stage: 125k steps, milestones at 62.5k, 93.75k and 112.5k
    schedule = MultiStep(milestones=[0.5, 0.75, 0.9])
    marks = [0, 62_499, 62_500, 93_749, 93_750, 112_499, 112_500, 124_999, 125_000]
    found = [schedule.factor(step, 125_000) for step in marks]
    assert found == [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.125]


def test_every_period_starts_at_the_peak() -> None:
    schedule = MultiStep(milestones=[0.5], gamma=0.1, periods=2, warmup_steps=2)
    found = [schedule.factor(step, 12) for step in range(12)]
    assert found == [0.5, 1, 1, 0.1, 0.1, 0.1, 1, 1, 1, 0.1, 0.1, 0.1]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"milestones": [0.9, 0.5]}, "rising shares"),
        ({"milestones": [1.0]}, "rising shares"),
        ({"gamma": 0.0}, "gamma must lie in"),
        ({"periods": 0}, "periods be at least 1"),
    ],
)
def test_what_is_out_of_range_is_told(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        MultiStep(**settings)
