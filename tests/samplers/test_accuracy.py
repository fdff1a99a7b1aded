"""Solvers against closed forms: orders of convergence, marginals, reference programs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genscale import rng
from genscale.conditioning.base import Conditioning
from genscale.objectives.base import Denoiser, Level, Prediction, on
from genscale.objectives.paths import VarianceExploding
from genscale.objectives.schedule import DiscreteVP, LinearFlow, NoiseProcess
from genscale.samplers.dpm_fast import DPMSolverFast
from genscale.samplers.grid import GridSampler
from genscale.samplers.ode import Euler, Heun
from genscale.samplers.sde import DDIM

GOLDEN = os.environ.get("GENSCALE_GOLDEN")


class TableVE(NoiseProcess):
    """alpha 1 and a list of sigmas, the first at time 1, the last, 0, at time 0."""

    t_max, t_min = 1.0, 0.0

    def __init__(self, sigmas: Tensor) -> None:
        self.sigmas = sigmas

    def coefficients(self, time: Tensor) -> tuple[Tensor, Tensor]:
        place = ((1.0 - time) * (len(self.sigmas) - 1)).round().long()
        return torch.ones_like(time), self.sigmas[place]

    def time_of(self, log_snr: Tensor) -> Tensor:
        raise AssertionError("levels of this process carry their time")


class StoppedVP(DiscreteVP):
    """The usual process left at t = 0.1: closer to 0 log SNR is too steep for orders to show."""

    t_min = 0.1


def _solve(sampler: GridSampler, model: Any, noise: Tensor) -> Tensor:
    return sampler.finish(sampler.run(model, Conditioning(), torch.arange(len(noise)), noise))


def _errors(samplers: list[GridSampler], reference: GridSampler, model: Any) -> list[float]:
    """Return the root mean square distance of each sampler's samples from the reference's."""
    noise = rng.normal(rng.key(0, torch.arange(16)), model.sample_shape).double()
    exact = _solve(reference, model, noise)
    return [
        float((_solve(sampler, model, noise) - exact).square().mean().sqrt())
        for sampler in samplers
    ]


class TestOrder:
    def test_euler_halves_its_error(self, mixture: Any) -> None:
        samplers = [Euler(n, precision="float64") for n in (64, 128)]
        coarse, fine = _errors(samplers, Heun(512, precision="float64"), mixture(LinearFlow()))
        assert coarse / fine == pytest.approx(2.0, abs=0.2)

    def test_heun_quarters_its_error(self, mixture: Any) -> None:
        samplers = [Heun(n, precision="float64") for n in (32, 64)]
        coarse, fine = _errors(samplers, Heun(512, precision="float64"), mixture(LinearFlow()))
        assert 3.5 < coarse / fine < 5.0

    def test_heun_quarters_its_error_in_ve_form(self, mixture: Any) -> None:
        noise = rng.normal(rng.key(0, torch.arange(16)), (2,)).double()

        def solve(n: int) -> Tensor:
            # uniform in log(1 + s): smooth down to s = 0, as a solver of order 2 needs
            sigmas = torch.expm1(torch.linspace(3.0, 0.0, n + 1, dtype=torch.float64))
            return _solve(Heun(n, precision="float64"), mixture(TableVE(sigmas)), noise)

        exact = solve(512)
        coarse, fine = ((solve(n) - exact).square().mean().sqrt() for n in (32, 64))
        assert 3.5 < float(coarse / fine) < 5.0

    @pytest.mark.parametrize(
        ("process", "evaluations", "least"),
        [
            # a flow begins with a step of order 1, at pure noise
            (LinearFlow(t_min=0.02), (60, 120), 3.5),
            # 3 k + 2 evaluations end with a step of order 2, which leaves order 3 overall
            (StoppedVP(), (62, 122), 6.5),
        ],
        ids=["flow", "vp"],
    )
    def test_dpm_fast_is_of_order_2_at_least(
        self, mixture: Any, process: NoiseProcess, evaluations: tuple, least: float
    ) -> None:
        samplers: list[GridSampler] = [DPMSolverFast(n, precision="float64") for n in evaluations]
        reference = DPMSolverFast(902, precision="float64")
        coarse, fine = _errors(samplers, reference, mixture(process))
        assert least < coarse / fine < 10.0

    def test_more_order_is_more_accuracy_for_the_same_evaluations(self, mixture: Any) -> None:
        samplers = [DPMSolverFast(122, order=k, precision="float64") for k in (1, 2, 3)]
        reference = DPMSolverFast(902, precision="float64")
        # measured: 0.0070, 0.00045 and 0.00007
        first, second, third = _errors(samplers, reference, mixture(StoppedVP()))
        assert first > 10 * second > 40 * third


class TestIdentities:
    @pytest.mark.parametrize("process", [LinearFlow(), DiscreteVP()], ids=["flow", "vp"])
    def test_euler_is_ddim_without_noise(self, mixture: Any, process: NoiseProcess) -> None:
        noise = rng.normal(rng.key(0, torch.arange(8)), (2,))
        euler, ddim = (_solve(s, mixture(process), noise) for s in (Euler(7), DDIM(7, eta=0.0)))
        torch.testing.assert_close(euler, ddim)

    def test_euler_on_a_flow_follows_the_velocity(self, mixture: Any) -> None:
        model, sampler = mixture(LinearFlow()), Euler(4, precision="float64")
        state = sampler.start(model, Conditioning(), torch.arange(5))
        for i in range(4):
            state = sampler.evaluate(model, state)
            assert state.clean is not None
            assert state.noise is not None
            expected = state.x - 0.25 * (state.noise - state.clean)
            state = sampler.advance(model, state)
            torch.testing.assert_close(state.x, expected, msg=f"step {i}")

    def test_shift_moves_the_grid_towards_noise(self) -> None:
        # 3 t / (1 + 2 t) at t = 1, 3/4, 1/2, 1/4, 0
        times = Euler(4, shift=3.0).grid(LinearFlow()).time
        torch.testing.assert_close(
            times, torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0], dtype=torch.float64)
        )

    @pytest.mark.parametrize(
        ("steps", "orders"),
        [
            (1, [1]), (2, [2]), (3, [2, 1]), (6, [3, 2, 1]), (7, [3, 3, 1]), (8, [3, 3, 2]),
            (9, [3, 3, 2, 1]), (250, [3] * 83 + [1]),
        ],
    )  # fmt: skip
    def test_orders_of_dpm_fast(self, steps: int, orders: list[int]) -> None:
        sampler = DPMSolverFast(steps)
        assert sampler.orders.tolist() == orders
        assert sampler.nfe(0, sampler.num_steps) == steps

    def test_dpm_fast_calls_the_network_at_uniform_times(self, mixture: Any) -> None:
        model, times = mixture(DiscreteVP()), []
        call = type(model).__call__

        class Recording(type(model)):  # type: ignore[misc]
            def __call__(self, x: Tensor, level: Level, cond: Any, memory: Any = None) -> Any:
                assert level.time is not None
                times.append(float(level.time))
                return call(self, x, level, cond, memory)

        model.__class__ = Recording
        _solve(DPMSolverFast(7), model, torch.zeros(1, 2))
        expected = torch.linspace(1.0, 0.001, 8, dtype=torch.float64)[:-1].tolist()
        assert times == pytest.approx(expected, abs=1e-12)


class TestDDIM:
    @pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize(
        ("process", "schedule"),
        [
            (LinearFlow(), "linear"),
            (DiscreteVP(), "linear"),
            (VarianceExploding(0.01, 40.0), "karras"),
        ],
        ids=["flow", "vp", "ve"],
    )
    def test_it_keeps_the_marginals(
        self, mixture: Any, process: NoiseProcess, schedule: Any, eta: float
    ) -> None:
        model = mixture(process)
        sampler = DDIM(100, eta=eta, schedule=schedule)
        x = sampler.run(model, Conditioning(), torch.arange(10_000)).x.double()
        mean = (model.weights[:, None] * model.means).sum(0)
        second = torch.einsum("k,ki,kj->ij", model.weights, model.means, model.means)
        variances = (model.weights * model.stds**2).sum() * torch.eye(2)
        expected = second + variances - mean[:, None] * mean
        # 10 000 samples of standard deviations 1.2 and 0.9: standard errors 0.012 and 0.02
        torch.testing.assert_close(x.mean(0), mean, atol=0.04, rtol=0)
        torch.testing.assert_close(x.T.cov(), expected, atol=0.08, rtol=0)

    @pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
    def test_it_equals_the_ddim_of_diffusers(self, mixture: Any, eta: float) -> None:
        from diffusers import DDIMScheduler

        steps, model = 10, mixture(DiscreteVP())
        # its timestep k is our n = k + 1; trailing spacing is our uniform grid
        scheduler = DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            timestep_spacing="trailing",
        )
        scheduler.set_timesteps(steps)
        noises = rng.normal(rng.key(3, torch.arange(steps + 1)), (6, 2))
        sampler = DDIM(steps, eta=eta)
        state = sampler.start(model, Conditioning(), torch.arange(6), noises[-1])
        x = state.x
        for i, timestep in enumerate(scheduler.timesteps):
            level = model.process.level((int(timestep) + 1) / 1000)
            noise = model(x, level, Conditioning()).noise
            x = scheduler.step(
                noise, int(timestep), x, eta=eta, variance_noise=noises[i]
            ).prev_sample
            state = sampler.advance(model, state, noises[i])
            torch.testing.assert_close(state.x, x, atol=1e-5, rtol=1e-5)

    def test_copies_part_by_lineage_only_with_noise(self, mixture: Any) -> None:
        model = mixture(LinearFlow())
        for eta, parted in ((0.0, False), (1.0, True)):
            sampler = DDIM(6, eta=eta)
            state = sampler.advance(model, sampler.start(model, Conditioning(), torch.tensor([3])))
            twins = state.select(torch.tensor([0, 0])).replace(lineage=torch.tensor([0, 1]))
            while int(twins.step.min()) < sampler.num_steps:
                twins = sampler.advance(model, twins)
            assert torch.equal(twins.x[0], twins.x[1]) is not parted

    def test_other_noise_is_drawn_without_another_evaluation(self, mixture: Any) -> None:
        model, sampler = mixture(LinearFlow()), DDIM(6, eta=1.0)
        state = sampler.evaluate(model, sampler.start(model, Conditioning(), torch.arange(3)))
        calls = len(model.calls)
        mean, std = sampler.transition(state)
        for value in (-1.0, 2.0):
            moved = sampler.advance(model, state, torch.full_like(state.x, value))
            torch.testing.assert_close(moved.x, mean + value * on(std, mean))
        assert len(model.calls) == calls

    def test_the_transition_of_ancestral_sampling_is_the_posterior(self, mixture: Any) -> None:
        model, sampler = mixture(DiscreteVP()), DDIM(10, eta=1.0, precision="float64")
        state = sampler.advance(model, sampler.start(model, Conditioning(), torch.arange(3)))
        state = sampler.evaluate(model, state)
        mean, std = sampler.transition(state)
        # q(x_m | x_n, x_0) of DDPM (arXiv:2006.11239, eq. 7), from n = 900 to m = 800
        abar_n, abar_m = (float(model.process.level(t).alpha) ** 2 for t in (0.9, 0.8))
        alpha = abar_n / abar_m
        expected = (
            abar_m**0.5 * (1 - alpha) * state.clean + alpha**0.5 * (1 - abar_m) * state.x
        ) / (1 - abar_n)
        torch.testing.assert_close(mean, expected)
        variance = (1 - abar_m) / (1 - abar_n) * (1 - alpha)
        assert std.square().tolist() == pytest.approx([variance] * 3, rel=1e-9)

    def test_the_last_step_adds_no_noise(self, mixture: Any) -> None:
        model, sampler = mixture(LinearFlow()), DDIM(3, eta=1.0)
        state = sampler.start(model, Conditioning(), torch.arange(2))
        for _ in range(2):
            state = sampler.advance(model, state)
        state = sampler.evaluate(model, state)
        mean, std = sampler.transition(state)
        assert std.tolist() == [0.0, 0.0]
        assert state.clean is not None
        torch.testing.assert_close(mean, state.clean)
        finished = sampler.evaluate(model, sampler.advance(model, state))
        mean, std = sampler.transition(finished)
        assert torch.equal(mean, finished.x)
        assert std.tolist() == [0.0, 0.0]

    def test_a_transition_wants_an_evaluated_state(self, mixture: Any) -> None:
        model, sampler = mixture(LinearFlow()), DDIM(3, eta=1.0)
        with pytest.raises(ValueError, match="The state is not evaluated"):
            sampler.transition(sampler.start(model, Conditioning(), torch.arange(2)))


@pytest.mark.skipif(GOLDEN is None, reason="GENSCALE_GOLDEN names no folder of golden cases")
@pytest.mark.parametrize("case", ["kdiff_exponential_7", "kdiff_karras_12"])
@pytest.mark.parametrize(
    ("precision", "tolerance"), [("float64", 1e-9), ("float32", 5e-5)], ids=["f64", "f32"]
)
def test_solvers_equal_k_diffusion(
    mixture: Any, case: str, precision: Any, tolerance: float
) -> None:
    from safetensors.torch import load_file

    path = Path(str(GOLDEN)) / "samplers" / f"{case}.json"
    config, tensors = (
        json.loads(path.read_text())["config"],
        load_file(path.with_suffix(".safetensors")),
    )
    flat = mixture(TableVE(tensors["input/sigmas"]))
    flat.means, flat.stds, flat.weights = (
        tensors[f"input/{name}"] for name in ("means", "stds", "weights")
    )
    model = Flattened(flat, tuple(config["shape"]))
    steps = config["steps"]
    solvers = {
        "euler": Euler(steps, precision=precision),
        "heun": Heun(steps, precision=precision),
        "euler_ancestral": DDIM(steps, eta=config["eta"], precision=precision),
    }
    start = tensors["input/noise"]
    for name, sampler in solvers.items():
        state = sampler.start(model, Conditioning(), torch.arange(len(start)), start)
        for noise in tensors["input/step_noise"][:steps]:
            state = sampler.advance(model, state, noise)
        expected = tensors[f"output/{name}"]
        torch.testing.assert_close(state.x.double(), expected, atol=tolerance, rtol=0, msg=name)


class Flattened(Denoiser):
    """A denoiser of vectors seen as one of pictures."""

    def __init__(self, vectors: Any, shape: tuple[int, ...]) -> None:
        self.vectors, self.process, self.device = vectors, vectors.process, vectors.device
        self.sample_shape = shape

    def __call__(
        self, x: Tensor, level: Level, cond: Conditioning, memory: Any = None
    ) -> Prediction:
        out = self.vectors(x.flatten(1), level, cond, memory)
        return Prediction(out.clean.view_as(x), out.noise.view_as(x), None, out.cost)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: Euler(0), "sampler.steps must be a whole number of at least 1, but is 0"),
        (lambda: Heun(2.5), "sampler.steps must be a whole number of at least 1, but is 2.5"),
        (lambda: Euler(5, shift=0.0), "sampler.shift must be positive, but is 0.0"),
        (lambda: Euler(5, schedule="liner"), r"sampler.schedule .* Did you mean 'linear'\?"),
        (lambda: Euler(5, precision="float16"), "sampler.precision must be one of float32, float"),
        (lambda: DDIM(5, eta=1.5), r"sampler.eta must lie in \[0, 1\], but is 1.5"),
        (lambda: DPMSolverFast(5, order=4), "sampler.order must be 1, 2 or 3, but is 4"),
    ],
)
def test_impossible_settings_are_refused(build: Any, sentence: str) -> None:
    from genscale.errors import ConfigError

    with pytest.raises(ConfigError, match=sentence):
        build()
