"""Parameterisations: each determines clean and noise, and agrees with the others."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from genscale.objectives.conversion import (
    Target,
    clean_and_noise,
    clean_from_noise,
    noise_from_clean,
    target_of,
)
from genscale.objectives.time_input import time_input_of

CLEAN = torch.linspace(-1, 1, 24, dtype=torch.float64).view(2, 3, 2, 2)
NOISE = torch.linspace(2, -1.5, 24, dtype=torch.float64).view(2, 3, 2, 2).sin()
# a flow, a VP and a VE level; each coefficient is (1, 1, 1, 1)
LEVELS = [(0.3, 0.7), (0.6, 0.8), (1.0, 14.6)]


def _level(level: tuple[float, float]) -> tuple[torch.Tensor, torch.Tensor]:
    alpha, sigma = (torch.full((1, 1, 1, 1), value, dtype=torch.float64) for value in level)
    return alpha, sigma


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("target", get_args(Target))
def test_the_true_target_gives_back_clean_and_noise(target: Target, level: tuple) -> None:
    alpha, sigma = _level(level)
    x = alpha * CLEAN + sigma * NOISE
    prediction = target_of(target, CLEAN, NOISE, alpha, sigma)
    clean, noise = clean_and_noise(target, prediction, x, alpha, sigma)
    torch.testing.assert_close(clean, CLEAN)
    torch.testing.assert_close(noise, NOISE)


def test_x0_to_v_and_back() -> None:
    alpha, sigma = _level((0.6, 0.8))
    x = alpha * CLEAN + sigma * NOISE
    estimate = CLEAN + 0.3  # not the truth: the conversion must hold for any estimate
    noise = noise_from_clean(x, estimate, alpha, sigma)
    v = target_of("v", estimate, noise, alpha, sigma)
    back, _ = clean_and_noise("v", v, x, alpha, sigma)
    torch.testing.assert_close(back, estimate)


def test_clean_and_noise_estimates_are_each_others_inverse() -> None:
    alpha, sigma = _level((0.6, 0.8))
    x = alpha * CLEAN + sigma * NOISE
    noise = noise_from_clean(x, CLEAN, alpha, sigma)
    torch.testing.assert_close(clean_from_noise(x, noise, alpha, sigma), CLEAN)


def test_velocity_is_defined_at_pure_noise_and_at_clean_data() -> None:
    for level, x in (((0.0, 1.0), NOISE), ((1.0, 0.0), CLEAN)):
        clean, noise = clean_and_noise("velocity", NOISE - CLEAN, x, *_level(level))
        torch.testing.assert_close(clean, CLEAN)
        torch.testing.assert_close(noise, NOISE)


@pytest.mark.parametrize(
    ("kind", "number"),
    # at t = 0.25 with alpha 0.8, sigma 0.6
    [
        ("dimr_linear", -2.0),
        ("unit", 0.25),
        ("one_minus", 0.75),
        ("index", 250.0),
        ("log_snr", math.log(0.64 / 0.36)),
        ("quarter_log_sigma", math.log(0.6 / 0.8) / 4),
    ],
)
def test_what_a_network_is_fed(kind: str, number: float) -> None:
    time, alpha, sigma = (torch.tensor([value], dtype=torch.float64) for value in (0.25, 0.8, 0.6))
    code = time_input_of(kind, time, alpha, sigma)
    assert code.dtype == torch.float32
    assert code.item() == pytest.approx(number, abs=1e-6)


def test_the_log_snr_of_clean_data_and_of_pure_noise_is_finite() -> None:
    time = torch.tensor([0.0, 1.0], dtype=torch.float64)
    code = time_input_of("log_snr", time, 1 - time, time)
    # DiMR's continuous recipe clamps to [log 1e-12, log 1e6]
    torch.testing.assert_close(code, torch.tensor([math.log(1e6), math.log(1e-12)]))
