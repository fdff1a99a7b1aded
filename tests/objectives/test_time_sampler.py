"""Laws of the training time."""

from __future__ import annotations

import pytest
import torch

from genscale import rng
from genscale.errors import ConfigError
from genscale.objectives.flow import FlowMatching
from genscale.objectives.time_sampler import check_law, logit_normal, shifted

U = rng.uniform(rng.key(0, torch.arange(20_000)))


def test_the_logit_has_the_asked_moments() -> None:
    logit = torch.logit(logit_normal(U, mean=0.5, std=1.5))
    # 20 000 draws: standard errors 0.011 and 0.008
    assert logit.mean().item() == pytest.approx(0.5, abs=0.045)
    assert logit.std().item() == pytest.approx(1.5, abs=0.035)


def test_quantiles_are_those_of_the_normal_law() -> None:
    # 0.8413447 is the normal law at one standard deviation; 1 / (1 + e^-1) = 0.7310586
    time = logit_normal(torch.tensor([0.5, 0.8413447460685429], dtype=torch.float64))
    torch.testing.assert_close(time, torch.tensor([0.5, 0.7310585786300049], dtype=torch.float64))


def test_the_least_uniform_gives_a_finite_time() -> None:
    time = logit_normal(torch.tensor([0.0, 1.0 - 2.0**-53], dtype=torch.float64))
    assert bool(((time > 0) & (time < 1)).all())


def test_shift_keeps_the_ends_and_moves_the_middle() -> None:
    # 3 * 0.5 / (1 + 2 * 0.5) = 0.75
    time = shifted(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), 3.0)
    assert time.tolist() == [0.0, 0.75, 1.0]
    assert torch.equal(shifted(U, 1.0), U)


def test_flow_matching_applies_law_and_shift() -> None:
    assert torch.equal(FlowMatching(time_law="uniform").sample_time(U), U)
    objective = FlowMatching(time_mean=-1.0, time_std=0.5, time_shift=2.0)
    expected = shifted(logit_normal(U, -1.0, 0.5), 2.0)
    assert torch.equal(objective.sample_time(U), expected)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("logitnormal", 1.0, 1.0), r"objective.time_law must be .* Did you mean 'logit_normal'"),
        (("uniform", 0.0, 1.0), "objective.time_std must be positive, but is 0.0"),
        (("uniform", 1.0, -1.0), "objective.time_shift must be positive, but is -1.0"),
    ],
)
def test_what_is_no_law_is_refused(arguments: tuple, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check_law(*arguments, path="objective")
