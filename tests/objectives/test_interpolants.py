"""EDM, interpolants and learned variance: what a perfect network means, and what it costs."""

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
from genscale.objectives.conversion import Extras, target_of
from genscale.objectives.ddpm import DDPM
from genscale.objectives.edm import EDM
from genscale.objectives.flow import FlowMatching, score_diffusion
from genscale.objectives.paths import ContinuousVP, TrigonometricVP, VarianceExploding
from genscale.objectives.schedule import DiscreteVP, LinearFlow
from genscale.objectives.variational import discretised_log_likelihood, variational_bound

SHAPE = (2, 3, 3)
PATHS = [LinearFlow(), DiscreteVP(), TrigonometricVP(), ContinuousVP(), VarianceExploding()]
INTERPOLANTS = [
    FlowMatching(path=path, target=target, time_input="one_minus")
    for path in ("linear", "gvp", "vp")
    for target in ("velocity", "epsilon", "score")
]
CLEAN = rng.normal(rng.key(5, torch.arange(4)), SHAPE)
NOISE = rng.normal(rng.key(6, torch.arange(4)), SHAPE)


class Answer(nn.Module):
    """Returns what it was told to, and keeps what it was fed."""

    def __init__(self, sample: Tensor, variance: Tensor | None = None) -> None:
        super().__init__()
        self.sample, self.variance = nn.Parameter(sample), variance
        self.sample_shape = tuple(sample.shape[1:])

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning, memory: Any = None) -> Any:
        self.fed = (x, t)
        aux = {} if self.variance is None else {"variance": self.variance}
        return BackboneOutput(self.sample, aux=aux)


def _batch() -> Batch:
    return Batch(CLEAN, Conditioning(), torch.arange(4))


@pytest.mark.parametrize("process", PATHS, ids=lambda p: type(p).__name__)
def test_rates_are_the_derivatives_of_the_coefficients(process: Any) -> None:
    # off the knots of the discrete schedule, where its slopes jump
    time = torch.tensor([0.10005, 0.40005, 0.80005], dtype=torch.float64)
    with torch.inference_mode():
        rates = process.rates(time)
    up, down = process.coefficients(time + 1e-7), process.coefficients(time - 1e-7)
    for rate, high, low in zip(rates, up, down, strict=True):
        torch.testing.assert_close(rate, (high - low) / 2e-7, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("process", PATHS[2:], ids=lambda p: type(p).__name__)
def test_processes_begin_clean_and_invert(process: Any) -> None:
    level = process.level(0.0)
    assert (level.alpha.item(), level.sigma.item()) == (1.0, 0.0)
    time = torch.linspace(0.01, 0.99, 200, dtype=torch.float64)
    torch.testing.assert_close(process.time_of(process.level(time).log_snr), time)


def test_vp_diffusion_is_half_of_beta() -> None:
    time = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    torch.testing.assert_close(score_diffusion(ContinuousVP(), time), 0.5 * (0.1 + 19.9 * time))


@pytest.mark.parametrize("objective", INTERPOLANTS, ids=lambda o: f"{o.path}-{o.target}")
def test_a_perfect_prediction_gives_back_data_and_noise(objective: FlowMatching) -> None:
    time = torch.tensor([0.05, 0.3, 0.6, 0.9], dtype=torch.float64)
    process = objective.process
    alpha, sigma = (on(part, CLEAN) for part in process.coefficients(time))
    rates = tuple(on(rate, CLEAN) for rate in process.rates(time))
    target = target_of(objective.target, CLEAN, NOISE, alpha, sigma, Extras(rates))  # type: ignore[arg-type]
    if objective.target == "velocity":
        target = -target  # by the network's own time, which runs towards the data
    network: Any = Answer(target)
    guess = objective.view(network)(
        alpha * CLEAN + sigma * NOISE, process.level(time), Conditioning()
    )
    # the score at little noise says little of the data
    torch.testing.assert_close(guess.clean, CLEAN, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(guess.noise, NOISE, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("objective", INTERPOLANTS, ids=lambda o: f"{o.path}-{o.target}")
def test_training_times_stay_in_their_range(objective: FlowMatching) -> None:
    low, high = objective.time_range
    time = objective.sample_time(torch.tensor([0.0, 0.5, 1.0 - 2.0**-53], dtype=torch.float64))
    assert bool((time >= low).all())
    assert bool((time <= high).all())
    assert (low > 0.0) is (objective.path == "vp" or objective.target != "velocity")


def test_weights_multiply_the_error_of_the_noise() -> None:
    losses = {}
    for weighting in ("none", "velocity", "likelihood"):
        objective = FlowMatching(target="epsilon", weighting=weighting, time_law="uniform")
        network: Any = Answer(torch.zeros(4, *SHAPE))
        out = objective.loss(network, _batch(), rng.for_step(0, torch.arange(4)))
        losses[weighting], time = out.per_sample, out.t
    # on the linear flow D = sigma / alpha, so that (D / sigma)^2 = 1 / (1 - t)^2
    torch.testing.assert_close(losses["velocity"], losses["none"] / (1 - time) ** 2)
    torch.testing.assert_close(losses["likelihood"], losses["none"] / (time * (1 - time)))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"path": "gpv"}, r"objective.path .* Did you mean 'gvp'\?"),
        ({"target": "noise"}, "objective.target must be one of velocity, epsilon, score"),
        ({"weighting": "velocity"}, "weighting=velocity weighs errors of epsilon and score"),
    ],
)
def test_impossible_interpolants_are_refused(settings: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        FlowMatching(**settings)


class TestEDM:
    @pytest.mark.parametrize("sigma_data", [0.5, 1.0])
    def test_the_denoiser_is_the_papers(self, sigma_data: float) -> None:
        objective = EDM(sigma_data=sigma_data)
        sigma = torch.tensor([0.002, 0.1, 2.0, 80.0], dtype=torch.float64)
        x = CLEAN + on(sigma, CLEAN) * NOISE
        network: Any = Answer(NOISE + 1.0)
        level = objective.process.level(objective.process.time_of(-sigma.log()))
        out = objective.view(network)(x, level, Conditioning())
        s, data = on(sigma, x), sigma_data
        # table 1: c_skip, c_out, c_in, c_noise
        root = (s**2 + data**2).sqrt()
        expected = data**2 / root**2 * x + s * data / root * (NOISE + 1.0)
        torch.testing.assert_close(out.clean, expected)
        torch.testing.assert_close(network.fed[0], x / root)
        torch.testing.assert_close(network.fed[1], (sigma.log() / 4).float())
        torch.testing.assert_close(out.clean + s * out.noise, x, rtol=1e-5, atol=1e-4)

    def test_noise_levels_are_log_normal(self) -> None:
        objective = EDM()
        u = torch.tensor([0.5, torch.special.ndtr(torch.tensor(1.0)).item(), 0.0]).double()
        _, sigma = objective.process.coefficients(objective.sample_time(u))
        # exp(P_mean) and exp(P_mean + P_std)
        assert sigma[:2].tolist() == pytest.approx([math.exp(-1.2), 1.0], rel=1e-6)
        assert math.isfinite(sigma[2])

    def test_an_untrained_network_costs_about_one_at_every_level(self) -> None:
        # data of standard deviation sigma_data: the target has unit variance (eq. 119 of EDM)
        position = torch.arange(512)
        clean = 0.5 * rng.normal(rng.key(1, position), SHAPE)
        network: Any = Answer(torch.zeros(512, *SHAPE))
        out = EDM().loss(network, Batch(clean, Conditioning(), position), rng.for_step(0, position))
        assert out.loss.item() == pytest.approx(1.0, abs=0.05)  # 9216 squares of normals

    def test_impossible_numbers_are_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"objective.sigma_data must be positive, but is 0"):
            EDM(sigma_data=0)
        with pytest.raises(ConfigError, match=r"0 < sigma_min < sigma_max, but are 1.0 and 0.5"):
            EDM(sigma_min=1.0, sigma_max=0.5)
        with pytest.raises(ConfigError, match=r"rho must be positive, but is 0"):
            EDM(rho=0)
        with pytest.raises(ConfigError, match=r"0 < beta_min < beta_max, but are 2.0 and 1.0"):
            ContinuousVP(2.0, 1.0)


class TestLearnedVariance:
    def test_the_exact_posterior_costs_nothing(self) -> None:
        process = DiscreteVP("linear")
        time = torch.tensor([0.002, 0.1, 0.5, 1.0])
        alpha, sigma = (on(part, CLEAN) for part in process.coefficients(time))
        x = alpha * CLEAN + sigma * NOISE
        lower = torch.full_like(x, -1.0)  # the posterior's own variance
        bound = variational_bound(CLEAN, x, CLEAN, lower, process, time)
        torch.testing.assert_close(bound, torch.zeros(4), atol=1e-6, rtol=0)
        upper = variational_bound(CLEAN, x, CLEAN, -lower, process, time)
        assert bool((upper[:2] > 1e-5).all())  # at more noise both bounds are one number

    def test_the_bins_of_eight_bits_have_all_the_mass(self) -> None:
        values = torch.arange(256) * (2.0 / 255.0) - 1.0
        for mean, log_std in ((0.0, -1.0), (0.99, 0.0), (-0.3, -4.0)):
            log_p = discretised_log_likelihood(values, torch.tensor(mean), torch.tensor(log_std))
            assert log_p.exp().sum().item() == pytest.approx(1.0, abs=1e-5)

    def test_the_variance_learns_by_the_bound_and_the_mean_does_not(self) -> None:
        variance = torch.zeros(4, *SHAPE, requires_grad=True)
        network: Any = Answer(NOISE.clone(), variance)
        plain: Any = Answer(NOISE.clone())
        draws = rng.for_step(0, torch.arange(4))
        out = DDPM(betas="linear", learn_sigma=True).loss(network, _batch(), draws)
        alone = DDPM(betas="linear").loss(plain, _batch(), draws)
        torch.testing.assert_close(out.loss, alone.loss + out.terms["vb"])
        torch.testing.assert_close(out.terms["mse"], alone.loss)
        torch.autograd.backward([out.loss, alone.loss])
        torch.testing.assert_close(network.sample.grad, plain.sample.grad)
        assert variance.grad is not None
        assert bool((variance.grad != 0).any())

    def test_a_network_without_variance_is_refused(self) -> None:
        network: Any = Answer(NOISE)
        with pytest.raises(ConfigError, match=r"Pass model.learn_sigma=true"):
            DDPM(learn_sigma=True).loss(network, _batch(), rng.for_step(0, torch.arange(4)))

    def test_the_view_hands_the_variance_on(self) -> None:
        network: Any = Answer(NOISE, torch.full((4, *SHAPE), 0.25))
        view = DDPM(learn_sigma=True, time_input="timestep").view(network)
        out = view(CLEAN, view.process.level(0.5), Conditioning())
        assert out.variance is not None
        assert bool((out.variance == 0.25).all())
        assert network.fed[1].item() == 499.0  # the noise step 500, counted from 0
