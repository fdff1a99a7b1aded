"""Flow matching and DDPM: the loss is keyed, and the view inverts the forward process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genscale import rng
from genscale.backbones.base import BackboneOutput
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.objectives.base import Batch, Level, on
from genscale.objectives.conversion import target_of
from genscale.objectives.ddpm import DDPM
from genscale.objectives.denoising import DenoisingObjective
from genscale.objectives.flow import FlowMatching
from genscale.objectives.schedule import DiscreteVP, LinearFlow
from genscale.rng import Purpose

SHAPE = (2, 4, 4)
OBJECTIVES = [
    FlowMatching(),
    FlowMatching(time_input="one_minus", time_law="uniform"),
    FlowMatching(time_input="log_snr"),
    DDPM(),
    DDPM(target="x0", betas="linear"),
    DDPM(target="v", time_input="index"),
    DDPM(betas="continuous", time_input="vp_index"),
    DDPM(betas="continuous", target="x0", time_input="log_snr"),
    DDPM(betas="continuous", target="v", time_input="unit"),
]
IDS = [
    *("flow", "flow-one-minus", "flow-log-snr", "eps", "x0", "v"),
    *("eps-continuous", "x0-continuous", "v-continuous"),
]


class Network(nn.Module):
    """Predicts ``weight * x`` at two resolutions, and keeps what it was fed."""

    def __init__(self, *, pyramid: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.coarse_weight = nn.Parameter(torch.tensor(0.25))
        self.pyramid = pyramid
        self.sample_shape = SHAPE

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning, memory: Any = None) -> Any:
        self.fed = (x, t)
        sample = self.weight * x
        if not self.pyramid:
            return BackboneOutput(sample)
        coarse = self.coarse_weight * nn.functional.avg_pool2d(x, 2)
        return BackboneOutput(sample, aux={"pyramid": [coarse, sample]})


class WeightedNetwork(Network):
    pyramid_weights = (0.25, 1.0)


class Oracle(nn.Module):
    """Knows the data; answers with the true target of the x and time it is fed."""

    def __init__(self, objective: DenoisingObjective, clean: Tensor) -> None:
        super().__init__()
        self.objective, self.clean = objective, clean
        self.unused = nn.Parameter(torch.zeros(()))
        self.sample_shape = tuple(clean.shape[1:])
        self.times: Tensor | None = None

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning, memory: Any = None) -> Any:
        self.t = t
        time = self._time(t.double())
        alpha, sigma = (on(c, x) for c in self.objective.process.coefficients(time))
        noise = (x - alpha * self.clean.to(x)) / sigma
        target = target_of(self.objective.target, self.clean.to(x), noise, alpha, sigma)
        return BackboneOutput(-target if self.objective.time_input == "one_minus" else target)

    def _time(self, t: Tensor) -> Tensor:
        return {
            "dimr_linear": (t + 4) / 8,
            "one_minus": 1 - t,
            "index": t / 1000,
            "vp_index": t / 999,
            "unit": t,
            "log_snr": self.objective.process.time_of(t / 2),
        }[self.objective.time_input]


def _batch(positions: list[int], *, device: str = "cpu") -> Batch:
    position = torch.tensor(positions)
    clean = rng.normal(rng.key(99, position), SHAPE)
    return Batch(clean=clean, cond=Conditioning(labels=position % 3), position=position)


def _loss(objective: DenoisingObjective, network: nn.Module, batch: Batch) -> Any:
    return objective.loss(network, batch, rng.for_step(7, batch.position))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=IDS)
class TestEveryObjective:
    def test_a_position_has_one_loss_in_any_batch(self, objective: DenoisingObjective) -> None:
        whole = _loss(objective, Network(), _batch([3, 10, 4, 999]))
        for i, position in enumerate([3, 10, 4, 999]):
            alone = _loss(objective, Network(), _batch([position]))
            torch.testing.assert_close(alone.per_sample[0], whole.per_sample[i])
            assert alone.t[0] == whole.t[i]
        torch.testing.assert_close(whole.loss.detach(), whole.per_sample.mean())

    def test_the_global_generator_is_not_touched(self, objective: DenoisingObjective) -> None:
        before = torch.get_rng_state()
        _loss(objective, Network(), _batch([0, 1]))
        assert torch.equal(torch.get_rng_state(), before)

    def test_the_loss_of_an_oracle_is_0(self, objective: DenoisingObjective) -> None:
        batch = _batch([0, 1, 2])
        out = _loss(objective, Oracle(objective, batch.clean), batch)
        # float32 cancellation where sigma or alpha is small
        assert out.loss.item() < 1e-5

    def test_the_view_inverts_the_forward_process(self, objective: DenoisingObjective) -> None:
        clean, noise = (rng.normal(rng.key(i, torch.arange(3)), SHAPE).double() for i in (1, 2))
        level = objective.process.level(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
        x = on(level.alpha, clean) * clean + on(level.sigma, clean) * noise
        out = objective.view(Oracle(objective, clean))(x, level, Conditioning())
        assert out.clean.dtype == torch.float64
        # the network itself runs in float32
        torch.testing.assert_close(out.clean, clean, atol=2e-5, rtol=0)
        torch.testing.assert_close(out.noise, noise, atol=2e-5, rtol=0)
        assert out.cost.tolist() == [1.0, 1.0, 1.0]

    @pytest.mark.parametrize("other", [LinearFlow(), DiscreteVP()], ids=["on-flow", "on-vp"])
    def test_the_view_answers_at_the_levels_of_other_processes(
        self, objective: DenoisingObjective, other: Any
    ) -> None:
        clean, noise = (rng.normal(rng.key(i, torch.arange(3)), SHAPE).double() for i in (1, 2))
        alpha, sigma = other.coefficients(torch.tensor([0.1, 0.4, 0.8], dtype=torch.float64))
        x = on(alpha, clean) * clean + on(sigma, clean) * noise
        out = objective.view(Oracle(objective, clean))(x, Level(alpha, sigma), Conditioning())
        torch.testing.assert_close(out.clean, clean, atol=2e-5, rtol=0)
        torch.testing.assert_close(out.noise, noise, atol=2e-5, rtol=0)

    def test_a_shared_level_is_fed_as_one_time(self, objective: DenoisingObjective) -> None:
        network = Network()
        objective.view(network)(torch.ones(3, *SHAPE), objective.process.level(0.5), Conditioning())
        assert network.fed[1].shape == (1,)
        assert network.fed[1].dtype == torch.float32


class TestFlowMatching:
    def test_the_loss_is_that_of_the_keyed_noise_and_time(self) -> None:
        batch, network = _batch([5, 6]), Network()
        out = _loss(FlowMatching(time_law="uniform", time_input="unit"), network, batch)
        random = rng.for_step(7, batch.position)
        noise = random.normal(Purpose.NOISE, SHAPE)
        t = random.uniform(Purpose.TIME).float()
        x = on(1 - t, noise) * batch.clean + on(t, noise) * noise
        torch.testing.assert_close(network.fed[0], x)
        torch.testing.assert_close(network.fed[1], t)
        expected = (0.5 * x - (noise - batch.clean)).square().mean((1, 2, 3))
        torch.testing.assert_close(out.per_sample, expected.detach())
        torch.testing.assert_close(out.t, t)

    def test_a_reversed_time_reverses_the_velocity(self) -> None:
        network = Network()
        x, level = torch.ones(1, *SHAPE), LinearFlow().level(0.25)
        unit, reverse = (
            FlowMatching(time_input=kind).view(network)(x, level, Conditioning())
            for kind in ("unit", "one_minus")
        )
        # u_hat = 0.5 x: clean = x - 0.25 u; reversed, u_hat = -0.5 x
        torch.testing.assert_close(unit.clean, 0.875 * x)
        torch.testing.assert_close(reverse.clean, 1.125 * x)
        assert network.fed[1].item() == 0.75

    def test_at_pure_noise_the_view_is_finite(self) -> None:
        out = FlowMatching().view(Network())(
            torch.ones(1, *SHAPE), LinearFlow().level(1.0), Conditioning()
        )
        torch.testing.assert_close(out.clean, torch.full_like(out.clean, 0.5))
        torch.testing.assert_close(out.noise, torch.ones_like(out.noise))


class TestDDPM:
    def test_timesteps_are_the_whole_numbers_from_1_to_n(self) -> None:
        u = torch.tensor([0.0, 0.0009999, 0.001, 0.5, 1 - 2.0**-53], dtype=torch.float64)
        time = DDPM().sample_time(u)
        assert (time * 1000).round().tolist() == [1, 1, 2, 501, 1000]

    def test_dimr_is_fed_its_linear_code(self) -> None:
        network = Network()
        batch = _batch([5, 6])
        out = _loss(DDPM(), network, batch)
        torch.testing.assert_close(network.fed[1], 8 * out.t - 4)

    def test_own_betas_reach_the_process(self) -> None:
        assert DDPM(beta_range=[0.001, 0.02]).process == DiscreteVP(beta_range=(0.001, 0.02))


class TestPyramidWeights:
    def test_without_weights_only_the_finest_prediction_learns(self) -> None:
        network = Network(pyramid=True)
        out = _loss(FlowMatching(pyramid_weights=None), network, _batch([0, 1]))
        torch.autograd.backward(out.loss)
        assert network.weight.grad is not None
        assert network.weight.grad != 0
        # used, so that data-parallel training waits for no gradient, but not taught
        assert network.coarse_weight.grad is not None
        assert network.coarse_weight.grad == 0
        torch.testing.assert_close(out.loss.detach(), out.terms["loss_4x4"])

    def test_a_list_weighs_the_levels_coarse_first(self) -> None:
        out = _loss(FlowMatching(pyramid_weights=[0.5, 2.0]), Network(pyramid=True), _batch([0]))
        expected = 0.5 * out.terms["loss_2x2"] + 2.0 * out.terms["loss_4x4"]
        torch.testing.assert_close(out.loss.detach(), expected)
        assert not out.terms["loss_2x2"].requires_grad

    def test_auto_asks_the_backbone(self) -> None:
        own = _loss(FlowMatching(), WeightedNetwork(pyramid=True), _batch([0]))
        given = _loss(FlowMatching(pyramid_weights=[0.25, 1.0]), Network(pyramid=True), _batch([0]))
        assert own.loss == given.loss
        plain = _loss(FlowMatching(), Network(pyramid=True), _batch([0]))
        torch.testing.assert_close(plain.loss.detach(), plain.terms["loss_4x4"])

    def test_one_prediction_logs_no_levels(self) -> None:
        assert _loss(FlowMatching(), Network(), _batch([0])).terms == {}

    def test_a_list_needs_as_many_predictions(self) -> None:
        sentence = "objective.pyramid_weights has 2 entries but Network predicts at 1 resolution"
        with pytest.raises(ConfigError, match=sentence):
            _loss(FlowMatching(pyramid_weights=[0.25, 1.0]), Network(), _batch([0]))

    @pytest.mark.parametrize("weights", [[-1.0, 1.0], [0.0, 0.0], [float("nan"), 1.0]])
    def test_impossible_weights_are_refused(self, weights: list[float]) -> None:
        with pytest.raises(ConfigError, match="must be finite, not negative and not all 0"):
            FlowMatching(pyramid_weights=weights)

    def test_an_unknown_word_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="must be auto, null or a list, but is 'automatic'"):
            FlowMatching(pyramid_weights="automatic")


class TestNetworkView:
    def test_a_bfloat16_network_is_fed_its_own_dtype(self) -> None:
        network = Network().bfloat16()
        out = FlowMatching().view(network)(
            torch.ones(1, *SHAPE), LinearFlow().level(0.5), Conditioning()
        )
        assert network.fed[0].dtype == torch.bfloat16
        assert out.clean.dtype == torch.float32

    def test_autocast_meets_a_float64_state(self) -> None:
        network = Network()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = FlowMatching().view(network)(
                torch.ones(1, *SHAPE).double(), LinearFlow().level(0.5), Conditioning()
            )
        assert network.fed[0].dtype == torch.float32
        assert out.clean.dtype == torch.float64

    def test_a_level_noisier_than_training_is_refused(self) -> None:
        view = DDPM().view(Network())
        flow = LinearFlow().level(0.99)  # log(0.01 / 0.99) = -4.6; training ends at -2.68
        with pytest.raises(ValueError, match=r"is -4.595, but .* trained on -2.682 and more"):
            view(torch.ones(1, *SHAPE), Level(flow.alpha, flow.sigma), Conditioning())

    def test_a_level_of_another_length_is_refused(self) -> None:
        view = DDPM().view(Network())
        with pytest.raises(ValueError, match="A level of 2 rows was given for 3 samples"):
            view(torch.ones(3, *SHAPE), DiscreteVP().level(torch.ones(2)), Conditioning())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"time_input": "linear"}, r"objective.time_input must be one of .*'dimr_linear'"),
        ({"target": "epsilom"}, r"objective.target must be one of .* Did you mean 'epsilon'\?"),
        ({"beta_range": [0.1]}, r"objective.beta_range must be \[first, last\], but has 1 entries"),
    ],
)
def test_unknown_settings_are_refused(settings: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        DDPM(**settings)
