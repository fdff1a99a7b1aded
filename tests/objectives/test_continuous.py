"""DDPM in continuous time, targets other than noise, and variances that do or do not fit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genscale import rng
from genscale.backbones.base import BackboneOutput
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.objectives.base import Batch, on
from genscale.objectives.ddpm import DDPM
from genscale.objectives.edm import EDM
from genscale.objectives.flow import FlowMatching
from genscale.objectives.paths import ContinuousVP
from genscale.objectives.time_input import time_input_of
from genscale.rng import Purpose
from genscale.samplers.base import Sampler
from genscale.samplers.dpm_fast import DPMSolverFast
from genscale.samplers.multistep import DPMSolverMultistep
from genscale.samplers.sde import DDIM

STD = 0.5  # of the data: normal, so that the best network is known


class BestNetwork(nn.Module):
    """The minimiser of the loss for data of N(0, STD^2): E[target | x], linear in x."""

    def __init__(self, objective: DDPM) -> None:
        super().__init__()
        self.objective = objective
        self.gain = nn.Parameter(torch.ones(()))
        self.sample_shape = (1, 4, 4)

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning, memory: Any = None) -> Any:
        alpha, sigma = (on(c, x) for c in self.objective.process.coefficients(t.double()))
        total = (alpha * STD) ** 2 + sigma**2
        clean, noise = alpha * STD**2 / total, sigma / total
        gain = {"epsilon": noise, "x0": clean, "v": alpha * noise - sigma * clean}
        return BackboneOutput(self.gain * gain[self.objective.target] * x)


@pytest.mark.parametrize("betas", ["continuous", "linear"])
@pytest.mark.parametrize("target", ["epsilon", "x0", "v"])
class TestTargets:
    def objective(self, target: Any, betas: Any) -> DDPM:
        return DDPM(target=target, betas=betas, time_input="unit")

    def test_training_finds_the_best_network(self, target: str, betas: str) -> None:
        objective = self.objective(target, betas)
        network = BestNetwork(objective)
        with torch.no_grad():
            network.gain.fill_(0.5)
        position = torch.arange(4096)
        clean = STD * rng.normal(rng.key(1, position), (1, 4, 4))
        batch = Batch(clean, Conditioning(), position)
        optimizer = torch.optim.LBFGS(network.parameters(), max_iter=10)

        def loss() -> Any:
            optimizer.zero_grad()
            value = objective.loss(network, batch, rng.for_step(0, position)).loss  # type: ignore[arg-type]
            value.backward()
            return value

        optimizer.step(loss)
        assert network.gain.item() == pytest.approx(1.0, abs=0.02)

    @pytest.mark.parametrize(
        "sampler",
        [DDIM(200), DDIM(200, eta=1.0), DPMSolverFast(30), DPMSolverMultistep(30)],
        ids=["ddim", "ancestral", "dpm-fast", "dpmpp-2m"],
    )
    def test_samples_are_distributed_as_the_data(
        self, target: str, betas: str, sampler: Sampler
    ) -> None:
        objective = self.objective(target, betas)
        view = objective.view(BestNetwork(objective))  # type: ignore[arg-type]
        with torch.no_grad():
            state = sampler.run(view, Conditioning(), rng.sample_seeds(0, 0, 1000))
        samples = sampler.finish(state)
        # 16,000 numbers: the standard error of their deviation is 0.003
        assert float(samples.std()) == pytest.approx(STD, abs=0.02)
        assert abs(float(samples.mean())) < 0.02


class TestContinuousTime:
    def test_levels_are_those_of_the_equation(self) -> None:
        # alpha^2 = exp(-(0.1 t + 9.95 t^2)), arXiv:2011.13456, eq. 33 with beta 0.1 .. 20
        process = DDPM(betas="continuous").process
        for t in (0.1, 0.5, 1.0):
            alpha, sigma = process.coefficients(torch.tensor([t]).double())
            assert float(alpha) ** 2 == pytest.approx(math.exp(-(0.1 * t + 9.95 * t * t)))
            assert float(alpha**2 + sigma**2) == pytest.approx(1.0)
        assert (process.t_min, process.t_max) == (1e-4, 1.0)
        assert DDPM(betas="continuous", beta_range=[0.2, 10.0]).process == ContinuousVP(
            0.2, 10.0, t_min=1e-4
        )

    def test_time_is_uniform_and_has_no_steps(self) -> None:
        u = torch.tensor([0.0, 0.12345, 0.999]).double()
        assert torch.equal(DDPM(betas="continuous").sample_time(u), u)
        steps = DDPM().sample_time(u) * 1000
        torch.testing.assert_close(steps, torch.tensor([1.0, 124.0, 1000.0]).double())

    def test_times_are_keyed(self) -> None:
        objective, position = DDPM(betas="continuous", time_input="vp_index"), torch.arange(3)
        network = Recorder()
        batch = Batch(torch.ones(3, 1, 4, 4), Conditioning(), position)
        out = objective.loss(network, batch, rng.for_step(5, position))  # type: ignore[arg-type]
        drawn = rng.for_step(5, position).uniform(Purpose.TIME)
        torch.testing.assert_close(out.t, drawn.float())
        torch.testing.assert_close(network.time, 999.0 * drawn.float())

    def test_networks_are_fed_999_t_or_the_clamped_log_snr(self) -> None:
        process = DDPM(betas="continuous").process
        time = torch.tensor([0.0, 0.25, 1.0]).double()
        alpha, sigma = process.coefficients(time)
        assert time_input_of("vp_index", time, alpha, sigma).tolist() == [0.0, 249.75, 999.0]
        log_snr = time_input_of("log_snr", time, alpha, sigma)
        assert float(log_snr[0]) == pytest.approx(math.log(1e6))  # infinite without the clamp
        expected = math.log(math.exp(-0.646875) / (1 - math.exp(-0.646875)))  # at t = 1/4
        assert float(log_snr[1]) == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize("settings", [{"learn_sigma": True}, {"num_timesteps": 500}])
    def test_settings_of_steps_are_refused(self, settings: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match="about noise steps, but objective"):
            DDPM(betas="continuous", **settings)

    def test_an_unknown_schedule_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="Did you mean 'continuous'"):
            DDPM(betas="continous")  # type: ignore[arg-type]


class Recorder(nn.Module):
    """Predicts zero, with a variance or without, and keeps the time it was fed."""

    def __init__(self, *, variance: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.sample_shape, self.variance = (1, 4, 4), variance
        self.time = torch.zeros(0)

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning, memory: Any = None) -> Any:
        self.time = t
        aux = {"variance": self.weight * x} if self.variance else {}
        return BackboneOutput(self.weight * x, aux=aux)


class TestVariance:
    def loss(self, objective: Any, *, variance: bool) -> Any:
        batch = Batch(torch.ones(2, 1, 4, 4), Conditioning(), torch.arange(2))
        network: Any = Recorder(variance=variance)
        return objective.loss(network, batch, rng.for_step(0, batch.position))

    @pytest.mark.parametrize(
        "objective", [FlowMatching(), DDPM(), EDM()], ids=["flow", "ddpm", "edm"]
    )
    def test_one_that_nobody_trains_is_refused(self, objective: Any) -> None:
        with pytest.raises(ConfigError, match=r"does not train it. Pass model.learn_sigma=false"):
            self.loss(objective, variance=True)
        assert torch.isfinite(self.loss(objective, variance=False).loss)

    def test_one_that_is_ignored_on_purpose_is_not(self) -> None:
        out = self.loss(FlowMatching(ignore_variance=True), variance=True)
        assert torch.isfinite(out.loss)

    def test_one_that_is_missing_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"Pass model.learn_sigma=true"):
            self.loss(DDPM(learn_sigma=True), variance=False)
        assert set(self.loss(DDPM(learn_sigma=True), variance=True).terms) == {"mse", "vb"}
