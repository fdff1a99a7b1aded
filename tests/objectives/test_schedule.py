"""Noising processes: exact at their knots, exactly clean at 0, invertible everywhere."""

from __future__ import annotations

import math

import pytest
import torch

from genscale.errors import ConfigError
from genscale.objectives.base import Level
from genscale.objectives.schedule import DiscreteVP, LinearFlow, NoiseProcess

PROCESSES = [LinearFlow(), DiscreteVP(), DiscreteVP("linear"), DiscreteVP("linear", 20)]


@pytest.mark.parametrize("process", PROCESSES, ids=str)
class TestEveryProcess:
    def test_time_0_is_exactly_clean(self, process: NoiseProcess) -> None:
        level = process.level(0.0)
        assert level.alpha.item() == 1.0
        assert level.sigma.item() == 0.0

    def test_noise_grows_with_time(self, process: NoiseProcess) -> None:
        alpha, sigma = process.coefficients(torch.linspace(0, 1, 4001, dtype=torch.float64))
        assert bool((alpha.diff() < 0).all())
        assert bool((sigma.diff() > 0).all())

    def test_time_of_inverts_the_level(self, process: NoiseProcess) -> None:
        # down to a hundredth of the first step of DDPM, and up to the noisiest time but pure noise
        time = torch.cat(
            (torch.logspace(-5, -2, 50), torch.linspace(0.01, 0.999, 500), torch.tensor([1e-3]))
        ).double()
        torch.testing.assert_close(
            process.time_of(process.level(time).log_snr), time, rtol=1e-9, atol=1e-12
        )

    def test_a_level_knows_its_time_or_is_matched_by_snr(self, process: NoiseProcess) -> None:
        level = process.level(torch.tensor([0.2, 0.7]))
        assert process.time_at(level) is level.time
        # the same SNR on any other path, here 3 times as large
        foreign = Level(3 * level.alpha, 3 * level.sigma)
        torch.testing.assert_close(process.time_at(foreign), level.time)

    def test_equal_processes_are_one_key_of_a_cache(self, process: NoiseProcess) -> None:
        import copy

        assert hash(copy.deepcopy(process)) == hash(process)
        assert copy.deepcopy(process) == process


class TestDiscreteVP:
    @pytest.mark.parametrize("betas", ["sd_scaled_linear", "linear"])
    def test_whole_steps_have_exactly_the_products_of_training(self, betas: str) -> None:
        if betas == "linear":
            beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        else:
            beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        abar = torch.cumprod(1.0 - beta, 0)
        alpha, sigma = DiscreteVP(betas).coefficients(torch.arange(1, 1001).double() / 1000.0)
        torch.testing.assert_close(alpha.square(), abar, rtol=1e-12, atol=0)
        torch.testing.assert_close(sigma.square(), 1.0 - abar, rtol=1e-9, atol=0)

    def test_log_alpha_is_linear_between_steps(self) -> None:
        alpha, _ = DiscreteVP().coefficients(
            torch.tensor([0.5, 0.50025, 0.501], dtype=torch.float64)
        )
        low, between, high = alpha.log()
        torch.testing.assert_close(between, 0.75 * low + 0.25 * high, rtol=1e-12, atol=0)

    def test_the_first_segment_continues_below_step_1(self) -> None:
        alpha, _ = DiscreteVP().coefficients(
            torch.tensor([0.0005, 0.001, 0.002], dtype=torch.float64)
        )
        half, one, two = alpha.log()
        torch.testing.assert_close(half, one - 0.5 * (two - one), rtol=1e-9, atol=0)

    def test_the_last_segment_continues_above_step_n(self) -> None:
        alpha, _ = DiscreteVP().coefficients(torch.tensor([0.999, 1.0, 1.001], dtype=torch.float64))
        assert alpha[2] < alpha[1]
        torch.testing.assert_close(alpha.log().diff()[1], alpha.log().diff()[0])

    def test_sampling_starts_at_the_last_step_and_may_stop_at_the_first(self) -> None:
        process = DiscreteVP()
        # sqrt(abar_1000) and sqrt(abar_1) of Stable Diffusion's schedule: 0.0682650, 0.9995749
        assert process.level(process.t_max).alpha.item() == pytest.approx(0.0682650, abs=1e-6)
        assert process.level(process.t_min).alpha.item() == pytest.approx(
            (1 - 0.00085) ** 0.5, abs=1e-12
        )

    def test_rates_at_whole_steps_are_those_beside_them(self) -> None:
        process, whole = DiscreteVP(), torch.tensor([0.001, 0.25, 0.5, 0.999, 1.0]).double()
        found, beside = process.rates(whole), process.rates(whole - 1e-6)
        for rate, other in zip(found, beside, strict=True):
            # betas change by 1 % from step to step
            torch.testing.assert_close(rate, other, rtol=0.02, atol=0)
        # d log alpha / dt = N / 2 log(1 - beta_N) at the last step
        alpha, _ = process.coefficients(whole[-1:])
        assert float(found[0][-1] / alpha) == pytest.approx(500 * math.log1p(-0.012))

    def test_own_ends_of_the_betas(self) -> None:
        alpha, _ = DiscreteVP("linear", 2, (0.1, 0.3)).coefficients(torch.tensor([0.5, 1.0]))
        torch.testing.assert_close(alpha**2, torch.tensor([0.9, 0.9 * 0.7], dtype=torch.float64))

    @pytest.mark.parametrize(
        ("settings", "sentence"),
        [
            ({"betas": "liner"}, r"objective.betas must be one of .* Did you mean 'linear'\?"),
            ({"num_timesteps": 1}, "objective.num_timesteps must be at least 2, but is 1"),
            ({"beta_range": (0.3, 0.1)}, r"0 < first < last < 1, but is \[0.3, 0.1\]"),
        ],
    )
    def test_impossible_settings_are_refused(self, settings: dict, sentence: str) -> None:
        with pytest.raises(ConfigError, match=sentence):
            DiscreteVP(**settings)


class TestStraightScale:
    def test_a_flow_is_straight_as_it_is(self) -> None:
        level = LinearFlow().level(torch.tensor([0.0, 0.3, 1.0]))
        scale = LinearFlow().straight_scale(level.alpha, level.sigma)
        assert scale.tolist() == [1.0, 1.0, 1.0]

    def test_a_vp_path_is_straight_after_division_by_alpha(self) -> None:
        process = DiscreteVP()
        level = process.level(torch.tensor([0.1, 0.9]))
        assert torch.equal(process.straight_scale(level.alpha, level.sigma), level.alpha)
