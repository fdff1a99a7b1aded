"""EDM with an input scale: the target, the weight and the way back, and every sampler's result."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genscale import rng
from genscale.backbones.base import BackboneOutput
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.objectives.base import Batch, Denoiser, Level, Prediction, on
from genscale.objectives.edm import EDM
from genscale.samplers.base import Sampler
from genscale.samplers.multistep import DPMSolverMultistep
from genscale.samplers.ode import Euler, Heun
from genscale.samplers.runge_kutta import RungeKutta
from genscale.samplers.schedules import Karras
from genscale.samplers.sde import DDIM

SHAPE = (3, 4, 2, 2)  # a clip of 4 frames
SIGMA_IN = 4.0


class Network(nn.Module):
    """Predicts what it is told to, and keeps what it was fed."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = nn.Parameter(answer, requires_grad=False)
        self.sample_shape = SHAPE

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning, memory: Any = None) -> Any:
        self.fed = (x, t)
        return BackboneOutput(self.answer)


def batch_of(clean: Tensor) -> tuple[Batch, rng.StepRandom]:
    position = torch.arange(len(clean))
    return Batch(clean, Conditioning(), position), rng.for_step(0, position)


class TestTraining:
    def test_the_network_is_fed_unit_variance_and_told_of_s(self) -> None:
        objective = EDM(sigma_data=1.0, sigma_in=SIGMA_IN)
        clean = rng.normal(rng.key(1, torch.arange(600)), SHAPE)
        network = Network(torch.zeros_like(clean))
        out = objective.loss(network, *batch_of(clean))  # type: ignore[arg-type]
        x, number = network.fed
        assert float(x.std()) == pytest.approx(1.0, abs=0.01)
        # ln s ~ N(-1.2, 1.2^2), unaltered: the network is told of ln(s) / 4
        log_s = 4.0 * number
        assert float(log_s.mean()) == pytest.approx(-1.2, abs=0.15)
        assert float(log_s.std()) == pytest.approx(1.2, abs=0.1)
        # of unit data, the target has unit variance; the weight at s is w
        s = torch.exp(log_s)
        w = ((s**2 + 1) / (s**2 + 1 / SIGMA_IN)) ** 2
        assert torch.allclose(out.per_sample / w, torch.ones(600), atol=0.9)
        assert float((out.per_sample / w).mean()) == pytest.approx(1.0, abs=0.02)

    def test_without_scale_it_is_edm_to_the_bit(self) -> None:
        clean = rng.normal(rng.key(2, torch.arange(5)), SHAPE)
        answer = rng.normal(rng.key(3, torch.arange(5)), SHAPE)
        losses = [
            EDM(**settings).loss(Network(answer), *batch_of(clean)).per_sample  # type: ignore[arg-type]
            for settings in ({}, {"sigma_in": 1.0})
        ]
        assert torch.equal(*losses)
        assert EDM(sigma_in=1.0).error_scale(*[torch.ones(1)] * 3) is None

    def test_the_target_stays_finite_where_noise_vanishes(self) -> None:
        # a scale put outside the preconditioning would give a target of order 1 / s
        objective = EDM(sigma_data=1.0, sigma_in=32.0, log_sigma_mean=-9.0, log_sigma_std=0.1)
        clean = rng.normal(rng.key(4, torch.arange(50)), SHAPE)
        network = Network(torch.zeros_like(clean))
        out = objective.loss(network, *batch_of(clean))  # type: ignore[arg-type]
        # w -> sigma_in^2 there, on a target that is the noise
        assert float(out.loss) == pytest.approx(32.0**2, rel=0.05)

    def test_weights_are_taken_in_float32_whatever_the_network_puts_out(self) -> None:
        objective = EDM(sigma_data=1.0, sigma_in=SIGMA_IN)
        clean = rng.normal(rng.key(5, torch.arange(4)), SHAPE)
        answer = rng.normal(rng.key(6, torch.arange(4)), SHAPE).bfloat16()
        half = objective.loss(Network(answer), *batch_of(clean))  # type: ignore[arg-type]
        full = objective.loss(Network(answer.float()), *batch_of(clean))  # type: ignore[arg-type]
        assert torch.equal(half.per_sample, full.per_sample)

    def test_a_weighted_error_of_the_network_is_the_error_of_d(self) -> None:
        objective = EDM(sigma_data=0.7, sigma_in=SIGMA_IN)
        clean = rng.normal(rng.key(7, torch.arange(4)), SHAPE).double()
        answer = rng.normal(rng.key(8, torch.arange(4)), SHAPE).double()
        network = Network(answer)
        batch, draws = batch_of(clean)
        out = objective.loss(network, batch, draws)  # type: ignore[arg-type]
        level = objective.process.level(objective.sample_time(draws.uniform(rng.Purpose.TIME)))
        noise = draws.normal(rng.Purpose.NOISE, SHAPE).double()
        noisy = on(level.alpha, clean) * clean + on(level.sigma, clean) * noise
        denoised = objective.view(network)(noisy, level, Conditioning()).clean  # type: ignore[arg-type]
        s = level.sigma / SIGMA_IN
        weight = 1.0 / 0.7**2 + 1.0 / s**2
        expected = weight * (denoised - clean).square().flatten(1).mean(1)
        assert torch.allclose(out.per_sample.double(), expected, rtol=1e-5)

    @pytest.mark.parametrize("scale", [0.0, -1.0, math.inf])
    def test_a_scale_must_be_positive(self, scale: float) -> None:
        with pytest.raises(ConfigError, match=r"objective\.sigma_in must be positive.* 1 is usual"):
            EDM(sigma_in=scale)


class Gaussian(Denoiser):
    """The exact network of normal data N(mu, sd^2), seen through an objective's own view."""

    def __init__(self, objective: EDM, mean: float, std: float) -> None:
        self.process = objective.process
        self.sample_shape = SHAPE
        self.device = torch.device("cpu")
        self.objective, self.mean, self.std = objective, mean, std

    def __call__(
        self, x: Tensor, level: Level, cond: Conditioning, memory: Any = None
    ) -> Prediction:
        sigma = on(level.sigma / level.alpha, x)
        square = self.std**2
        clean = (square * x + sigma**2 * self.mean) / (square + sigma**2)
        # what the network must answer for that, and what the view makes of the answer
        zero, one = (
            self.objective.view(Network(torch.full_like(x, value)))(x, level, cond).clean  # type: ignore[arg-type]
            for value in (0.0, 1.0)
        )
        view = self.objective.view(Network((clean - zero) / (one - zero)))  # type: ignore[arg-type]
        return view(x, level, cond)


class TestSampling:
    """Data of normals: sigma_in z, and so x, moves about the mean as sqrt(sd^2 + sigma^2)."""

    @pytest.mark.parametrize(
        ("kind", "settings", "order"),
        [
            (Heun, {"schedule": Karras()}, 2),
            (Heun, {}, 2),
            (Euler, {"schedule": Karras()}, 1),
            (DDIM, {}, 1),
            (DPMSolverMultistep, {}, 2),
            (RungeKutta, {"method": "rk4"}, 4),
        ],
        ids=["heun-karras", "heun", "euler", "ddim", "2m", "rk4"],
    )
    def test_every_sampler_converges_to_data(
        self, kind: Any, settings: dict[str, Any], order: int
    ) -> None:
        mean, std = 0.3, 0.6
        model = Gaussian(EDM(sigma_data=1.0, sigma_in=SIGMA_IN), mean, std)
        noise = rng.normal(rng.key(9, torch.arange(3)), SHAPE, dtype=torch.float64)
        first = SIGMA_IN * 80.0  # sigma_in z starts at sigma_in s_max, z at s_max
        expected = mean + (first * noise - mean) * std / math.hypot(std, first)
        errors = []
        for steps in (40, 80):
            sampler: Sampler = kind(steps, precision="float64", **settings)
            state = sampler.run(model, Conditioning(), torch.arange(3), noise)
            assert torch.equal(state.x, sampler.finish(state))
            errors.append(float((state.x - expected).abs().max()))
        assert errors[1] < 0.2  # of data of spread 0.6, from noise of 320
        assert errors[0] / errors[1] > 0.8 * 2**order

    def test_heun_is_the_published_loop_in_z(self) -> None:
        mean, std, steps = 0.3, 0.6, 9
        objective = EDM(sigma_data=1.0, sigma_in=SIGMA_IN)
        model = Gaussian(objective, mean, std)
        noise = rng.normal(rng.key(10, torch.arange(2)), SHAPE, dtype=torch.float64)
        sampler = Heun(steps, schedule=Karras(), precision="float64")
        ours = sampler.finish(sampler.run(model, Conditioning(), torch.arange(2), noise))

        def denoised(z: Tensor, s: Tensor) -> Tensor:
            level = Level(torch.full((1,), 1.0 / SIGMA_IN).double(), s.view(1))
            clean = (std**2 * SIGMA_IN * z + (SIGMA_IN * s) ** 2 * mean) / (
                std**2 + (SIGMA_IN * s) ** 2
            )
            assert torch.allclose(
                model(
                    SIGMA_IN * z,
                    Level(torch.ones(1).double(), SIGMA_IN * level.sigma),
                    Conditioning(),
                ).clean,
                clean,
            )
            return clean / SIGMA_IN

        i = torch.arange(steps, dtype=torch.float64) / (steps - 1)
        times = (80.0 ** (1 / 7) + i * (0.002 ** (1 / 7) - 80.0 ** (1 / 7))) ** 7
        times = torch.cat((times, torch.zeros(1, dtype=torch.float64)))
        z = times[0] * noise
        for now, then in pairwise(times):
            slope = (z - denoised(z, now)) / now
            moved = z + (then - now) * slope
            if then > 0:
                slope = 0.5 * (slope + (moved - denoised(moved, then)) / then)
                moved = z + (then - now) * slope
            z = moved
        assert torch.allclose(ours, SIGMA_IN * z, rtol=1e-9, atol=1e-10)
