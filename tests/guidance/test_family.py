"""Guidances beside the plain one: formulas, what they remember, what they cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from genscale import rng
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.guidance.apg import ProjectedGuidance, projected
from genscale.guidance.autoguidance import Autoguidance
from genscale.guidance.cfg import ClassifierFree, rescaled
from genscale.guidance.cfg_plus_plus import ClassifierFreePlusPlus
from genscale.guidance.zero_star import ZeroStar, projection
from genscale.objectives.base import Denoiser, Level, Prediction, on
from genscale.objectives.paths import TrigonometricVP
from genscale.objectives.schedule import LinearFlow, NoiseProcess
from genscale.samplers.base import State
from genscale.samplers.ode import Heun
from genscale.samplers.sde import DDIM

LABELS = torch.tensor([0, 1, 2])
SHAPE = (4, 2, 2)
X = rng.normal(rng.key(0, torch.arange(3)), SHAPE).double()
LEVEL = LinearFlow().level(0.4)
COND = Conditioning(labels=LABELS)


class Toy(Denoiser):
    """Estimates shifted by the label; ``gain`` makes another model of it."""

    def __init__(self, process: NoiseProcess | None = None, gain: float = 1.0) -> None:
        self.process = process or LinearFlow()
        self.sample_shape = SHAPE
        self.device = torch.device("cpu")
        self.gain = gain
        self.times: list[Tensor] = []

    def __call__(
        self, x: Tensor, level: Level, cond: Conditioning, memory: Any = None
    ) -> Prediction:
        self.times.append(self.process.time_at(level))
        assert cond.labels is not None
        shift = 0.25 * (cond.labels + 0.5).to(x).view(-1, 1, 1, 1)
        ramp = torch.arange(16, dtype=x.dtype).view(SHAPE) / 8
        clean = self.gain * (x / (1 + x * x) + shift * (1 + ramp * x))
        noise = (x - on(level.alpha, x) * clean) / on(level.sigma, x)
        return Prediction(clean, noise, None, torch.ones(len(x), dtype=torch.float64), x * 0 + 0.5)


def _branches(level: Level = LEVEL) -> tuple[Prediction, Prediction]:
    return Toy()(X, level, COND), Toy()(X, level, COND.null())


def _ties(out: Prediction, level: Level = LEVEL) -> None:
    x = on(level.alpha, X) * out.clean + on(level.sigma, X) * out.noise
    torch.testing.assert_close(x, X)


GUIDANCES = {
    "cfg": ClassifierFree(3.0, rescale=0.7),
    "channels": ClassifierFree(3.0, channels=3),
    "apg": ProjectedGuidance(3.0, max_norm=1.0),
    "zero-star": ZeroStar(3.0, interval=[0.1, 0.9]),
    "plus-plus": ClassifierFreePlusPlus(0.6),
    "auto": Autoguidance(Toy(gain=0.5), 2.0, interval=[0.3, 0.9]),
}


@pytest.fixture(params=GUIDANCES.values(), ids=GUIDANCES)
def guidance(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_rows_pay_and_count_for_themselves(guidance: Any) -> None:
    level = LinearFlow().level(torch.tensor([0.95, 0.5, 0.2]))
    out = guidance.wrap(Toy())(X, level, COND)
    guided = guidance.guides(level, LinearFlow())
    assert out.cost.tolist() == [2.0 if g else 1.0 for g in guided.tolist()]
    for i in range(3):
        row = torch.tensor([i])
        alone = guidance.wrap(Toy())(X[row], level.select(row), COND.select(row))
        torch.testing.assert_close(out.clean[i], alone.clean[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(out.noise[i], alone.noise[0], rtol=1e-12, atol=1e-12)


def test_the_variance_is_that_of_the_first_branch(guidance: Any) -> None:
    out = guidance.wrap(Toy())(X, LEVEL, COND)
    assert out.variance is not None
    assert bool((out.variance == 0.5).all())


@pytest.mark.parametrize("sampler", [Heun(5), DDIM(5, eta=1.0)], ids=["heun", "ddim"])
def test_guided_particles_follow_their_memory(guidance: Any, sampler: Any) -> None:
    view = guidance.wrap(Toy())
    whole = sampler.advance(view, sampler.start(view, COND, torch.arange(3)))
    part = whole.select(torch.tensor([2, 0]))
    later = sampler.advance(view, part.select(torch.tensor([1])))
    mixed = State.cat([part.select(torch.tensor([0])), later])
    while int(whole.step.min()) < sampler.num_steps:
        whole = sampler.advance(view, whole)
    while int(mixed.step.min()) < sampler.num_steps:
        mixed = sampler.advance(view, mixed)
    torch.testing.assert_close(mixed.x, whole.x[[2, 0]], rtol=1e-6, atol=1e-6)
    assert torch.equal(mixed.nfe, whole.nfe[[2, 0]])


def test_three_channels_are_guided_and_the_fourth_is_not() -> None:
    own, null = _branches()
    out = ClassifierFree(3.0, channels=3).wrap(Toy())(X, LEVEL, COND)
    expected = null.clean + 3.0 * (own.clean - null.clean)
    torch.testing.assert_close(out.clean[:, :3], expected[:, :3])
    assert torch.equal(out.clean[:, 3:], own.clean[:, 3:])
    _ties(out)


def test_rescaling_keeps_the_deviation_of_the_conditional_branch() -> None:
    own, null = _branches()
    guided = null.clean + 6.0 * (own.clean - null.clean)
    full = rescaled(guided, own.clean, 1.0)
    torch.testing.assert_close(full.flatten(1).std(1), own.clean.flatten(1).std(1))
    out = ClassifierFree(6.0, rescale=0.7).wrap(Toy())(X, LEVEL, COND)
    torch.testing.assert_close(out.clean, 0.7 * full + 0.3 * guided)
    _ties(out)


class TestProjected:
    def test_the_update_is_across_and_short(self) -> None:
        own, null = _branches()
        update = own.clean - null.clean
        across = projected(update, own.clean, 0.0, 0.0)
        inner = (across * own.clean).flatten(1).sum(1)
        torch.testing.assert_close(inner, torch.zeros_like(inner), atol=1e-12, rtol=0)
        torch.testing.assert_close(projected(update, own.clean, 0.0, 1.0), update)
        short = projected(update, own.clean, 0.01, 1.0).flatten(1).norm(dim=1)
        assert short.tolist() == pytest.approx([0.01] * 3)

    def test_momentum_runs_through_the_memory(self) -> None:
        guidance = ProjectedGuidance(3.0, momentum=-0.5, max_norm=0.0, parallel=1.0)
        view, first = guidance.wrap(Toy()), LinearFlow().level(0.8)
        before = view(X, first, COND)
        out = view(X, LEVEL, COND, before.memory)
        (own, null), (own_before, null_before) = _branches(), _branches(first)
        update = own.clean - null.clean - 0.5 * (own_before.clean - null_before.clean)
        torch.testing.assert_close(out.clean, null.clean + 3.0 * update)
        torch.testing.assert_close(out.memory["guidance"], update)
        _ties(out)


def test_cfg_plus_plus_renoises_with_the_null_branch() -> None:
    own, null = _branches()
    for scale in (0.6, 1.0):
        out = ClassifierFreePlusPlus(scale).wrap(Toy())(X, LEVEL, COND)
        torch.testing.assert_close(out.clean, null.clean + scale * (own.clean - null.clean))
        torch.testing.assert_close(out.noise, null.noise)
        assert out.cost.tolist() == [2.0] * 3


class TestZeroStar:
    def test_velocities_are_combined(self) -> None:
        own, null = (part.noise - part.clean for part in _branches())  # of the linear flow
        out = ZeroStar(3.0).wrap(Toy())(X, LEVEL, COND)
        base = projection(own, null) * null
        torch.testing.assert_close(out.noise - out.clean, base + 3.0 * (own - base))
        # a null is the projection of c on u: what is left is across u
        left = ((own - base) * null).flatten(1).sum(1)
        torch.testing.assert_close(left, torch.zeros_like(left), atol=1e-6, rtol=0)
        _ties(out)

    def test_the_first_part_of_sampling_stands_still(self) -> None:
        view = ZeroStar(3.0, zero_above=0.7).wrap(Toy())
        sampler = Heun(4, precision="float64")  # levels 1, 0.75, 0.5, 0.25, 0
        start = sampler.start(view, COND, torch.arange(3))
        state = sampler.advance(view, start)
        torch.testing.assert_close(state.x, start.x)
        assert not torch.allclose(sampler.advance(view, state).x, start.x)


class TestAutoguidance:
    def test_it_leads_away_from_the_weak_model(self) -> None:
        own, weak = Toy()(X, LEVEL, COND), Toy(gain=0.5)(X, LEVEL, COND)
        out = Autoguidance(Toy(gain=0.5), 2.0).wrap(Toy())(X, LEVEL, COND)
        torch.testing.assert_close(out.clean, 2.0 * own.clean - weak.clean)
        _ties(out)

    def test_a_weak_model_of_another_process_is_asked_at_equal_snr(self) -> None:
        weak = Toy(TrigonometricVP())
        Autoguidance(weak, 2.0).wrap(Toy())(X, LEVEL, COND)
        # tan(pi t / 2) = sigma / alpha = 0.4 / 0.6
        expected = torch.atan(torch.tensor(0.4 / 0.6, dtype=torch.float64)) * 2 / torch.pi
        torch.testing.assert_close(weak.times[0][0], expected)

    def test_models_of_other_pictures_are_refused(self) -> None:
        weak = Toy()
        weak.sample_shape = (1, 2, 2)
        with pytest.raises(ConfigError, match=r"shape \(1, 2, 2\), but the model's are \(4, 2, 2"):
            Autoguidance(weak).wrap(Toy())


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: ClassifierFree(rescale=2.0), r"guidance.rescale must lie in \[0, 1\]"),
        (lambda: ClassifierFree(channels=0), "guidance.channels must be at least 1, but is 0"),
        (lambda: ProjectedGuidance(momentum=1.0), r"guidance.momentum must lie in \(-1, 1\)"),
        (lambda: ProjectedGuidance(max_norm=-1.0), "guidance.max_norm must not be negative"),
        (lambda: ProjectedGuidance(parallel=float("nan")), "guidance.parallel must be finite"),
        (lambda: ClassifierFreePlusPlus(1.5), r"CFG\+\+ must lie in \[0, 1\], but is 1.5"),
        (lambda: ZeroStar(zero_above=1.5), r"guidance.zero_above must lie in \(0, 1\]"),
    ],
)
def test_impossible_settings_are_refused(build: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        build()
