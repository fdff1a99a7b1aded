"""Adaptive steps: each sample its own, as accurate as asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from genscale import rng
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.objectives.paths import VarianceExploding
from genscale.objectives.schedule import DiscreteVP, LinearFlow, NoiseProcess
from genscale.samplers.adaptive import ERROR_WEIGHTS, Adaptive, root_mean_square
from genscale.samplers.ode import Heun
from genscale.samplers.runge_kutta import TABLEAUS, slope_of
from genscale.samplers.schedules import Linear
from scripts.parity.dopri5 import integrate

NOISE = rng.normal(rng.key(0, torch.arange(6)), (2,)).double()


def _run(sampler: Adaptive, model: Any, rows: slice = slice(None)) -> Any:
    seeds = torch.arange(len(NOISE))[rows]
    with torch.no_grad():
        return sampler.run(model, Conditioning(), seeds, NOISE[rows])


class _Recorded:
    """The slope of a flow in the official direction, and the times it was asked at."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.times: list[float] = []

    def __call__(self, time: float, x: Tensor) -> Tensor:
        self.times.append(time)
        own = torch.tensor([1.0 - time], dtype=torch.float64)
        guess = self.model(x, self.model.process.level(own), Conditioning())
        return -slope_of(self.model.process, own, guess.clean, guess.noise)


def _accepted(times: list[float]) -> list[float]:
    """Return where accepted steps ended: the next attempt begins there."""
    attempts = [times[i : i + 6] for i in range(2, len(times), 6)]
    lengths = [(attempt[-1] - attempt[0]) / 0.8 for attempt in attempts]  # stages at 1/5 and 1
    begins = [attempt[-1] - h for attempt, h in zip(attempts, lengths, strict=True)]
    pairs = zip(attempts, begins[1:], strict=False)
    return [attempt[-1] for attempt, begin in pairs if abs(attempt[-1] - begin) < 1e-9]


@pytest.mark.parametrize("row", [0, 3])
def test_a_batch_of_one_takes_the_steps_of_the_coupled_program(mixture: Any, row: int) -> None:
    model, rows = mixture(LinearFlow()), slice(row, row + 1)
    slope, settings = _Recorded(model), {"rtol": 1e-4, "atol": 1e-7}
    integrate(slope, NOISE[rows], 0.0, 0.9, **settings)
    ends = _accepted(slope.times)
    assert len(ends) >= 3
    end = ends[-1]  # there neither program has to cut a step short
    expected = integrate(slope, NOISE[rows], 0.0, end, **settings)
    schedule = Linear(end=1.0 - end)
    sampler = Adaptive(1, last="full", schedule=schedule, precision="float64", **settings)
    found = _run(sampler, model, rows)
    torch.testing.assert_close(found.x, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("process", [LinearFlow(), DiscreteVP()], ids=["flow", "vp"])
def test_the_error_follows_the_tolerance(mixture: Any, process: NoiseProcess) -> None:
    model = mixture(process)
    exact = _run(Adaptive(1, rtol=1e-7, atol=1e-9, precision="float64"), model).x
    errors, spent = [], []
    for rtol in (1e-2, 1e-3, 1e-4, 1e-5):
        state = _run(Adaptive(1, rtol=rtol, atol=1e-3 * rtol, precision="float64"), model)
        errors.append(float((state.x - exact).square().mean().sqrt()))
        spent.append(float(state.nfe.mean()))
    assert errors == sorted(errors, reverse=True)
    assert spent == sorted(spent)
    # a thousand times tighter is hundreds of times closer, at most five times the work; measured
    # on 16 samples: 0.031 to 0.000015, 26 to 65 evaluations on the flow; 0.38, 33 to 138 on VP
    assert errors[-1] < 5e-3 * errors[0]
    assert spent[-1] < 5 * spent[0]


@pytest.mark.parametrize(
    "process", [LinearFlow(), DiscreteVP(), VarianceExploding(0.01, 40.0)], ids=["flow", "vp", "ve"]
)
def test_it_solves_the_same_equation_as_fixed_steps(mixture: Any, process: NoiseProcess) -> None:
    model = mixture(process)
    found = _run(Adaptive(3, rtol=1e-5, atol=1e-7, precision="float64"), model).x
    with torch.no_grad():
        fixed = Heun(200, precision="float64").run(model, Conditioning(), torch.arange(6), NOISE).x
    # Heun's own error at 200 steps, uniform in process time, is the larger one
    torch.testing.assert_close(found, fixed, atol=0.03, rtol=0)


def test_samples_of_one_batch_take_their_own_steps(mixture: Any) -> None:
    model = mixture(LinearFlow())
    sampler = Adaptive(2, rtol=1e-4, precision="float64")
    whole = _run(sampler, model)
    assert len(whole.nfe.unique()) > 1
    assert bool((whole.nfe <= sampler.nfe(0, 2)).all())
    for row in range(3):
        alone = _run(sampler, model, slice(row, row + 1))
        torch.testing.assert_close(alone.x, whole.x[row : row + 1], atol=1e-12, rtol=0)
        assert float(alone.nfe) == float(whole.nfe[row])


def test_what_was_learned_at_a_level_is_kept(mixture: Any) -> None:
    model, sampler = mixture(LinearFlow()), Adaptive(3)
    state = sampler.advance(model, sampler.start(model, Conditioning(), torch.arange(4)))
    calls = len(model.calls)
    seen = sampler.evaluate(model, state)
    assert len(model.calls) == calls
    level = sampler.grid(model.process).select(torch.tensor([1]))
    torch.testing.assert_close(seen.clean, model(state.x, level, Conditioning()).clean)
    assert bool((state.history["length"] > 0).all())
    # a particle that was changed or sent back has learned nothing where it is
    back = sampler.renoise(state, torch.tensor([1, 0, 1, 1]))
    assert (back.history["length"] == 0).tolist() == [False, True, False, False]
    calls = len(model.calls)
    seen = sampler.evaluate(model, back)
    assert model.calls[calls:] == [1]
    again = sampler.advance(model, seen)
    assert again.step.tolist() == [2, 1, 2, 2]


def test_evaluations_that_do_not_suffice_are_an_error(mixture: Any) -> None:
    sampler = Adaptive(1, rtol=1e-9, atol=1e-12, max_evaluations=40, precision="float64")
    with pytest.raises(ConfigError, match=r"sampler.max_evaluations=40 do not suffice between two"):
        _run(sampler, mixture(LinearFlow()))


def test_estimates_that_are_not_finite_are_told(mixture: Any) -> None:
    # at t = 0 the mixture's noise is 0 / 0: a network that predicts a velocity is asked for
    with pytest.raises(ConfigError, match=r"not finite at the clean level, use sampler.last=euler"):
        _run(Adaptive(1, last="full", max_evaluations=200), mixture(LinearFlow()))


def test_the_error_estimate_is_of_order_four() -> None:
    # y' = 5 t^4 at t = 0 with step 1: order 5 is exact, so what differs is the embedded one
    tableau = TABLEAUS["dopri5"]
    nodes = (0.0, *tableau.nodes, 1.0)
    for power in range(4):
        moment = sum(w * node**power for w, node in zip(ERROR_WEIGHTS, nodes, strict=True))
        assert moment == pytest.approx(0.0, abs=1e-12)
    assert abs(sum(w * node**4 for w, node in zip(ERROR_WEIGHTS, nodes, strict=True))) > 1e-4


def test_a_rows_norm_does_not_depend_on_the_others() -> None:
    x = rng.normal(rng.key(2, torch.arange(5)), (3, 7, 11))
    norms = root_mean_square(x)
    for row in range(5):
        assert torch.equal(root_mean_square(x[row : row + 1]), norms[row : row + 1])
    torch.testing.assert_close(norms, x.double().square().flatten(1).mean(1).sqrt())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"rtol": 0.0}, "sampler.rtol and sampler.atol must be positive, but are 0.0"),
        ({"last": "ful"}, r"sampler.last .* Did you mean 'full'\?"),
        ({"max_evaluations": 3}, "sampler.max_evaluations must be at least 8"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Adaptive(2, **settings)
