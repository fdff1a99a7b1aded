"""Solvers of several steps or stages, their levels, noise and history, against closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from genscale import rng
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.objectives.base import Denoiser, Level, Prediction, on
from genscale.objectives.paths import ContinuousVP, TrigonometricVP, VarianceExploding
from genscale.objectives.schedule import DiscreteVP, LinearFlow, NoiseProcess
from genscale.samplers.adaptive import Adaptive
from genscale.samplers.ancestral import Ancestral
from genscale.samplers.base import State
from genscale.samplers.diffusers_bridge import DiffusersSampler
from genscale.samplers.grid import GridSampler
from genscale.samplers.multistep import DPMSolverMultistep
from genscale.samplers.ode import DPM2, Euler, Heun
from genscale.samplers.reverse_sde import ReverseSDE, ReverseSDEHeun
from genscale.samplers.runge_kutta import RungeKutta
from genscale.samplers.schedules import (
    Discrete,
    DynamicShift,
    Exponential,
    Given,
    Karras,
    Linear,
    level_grid,
    named_schedule,
    noise_ratio,
)
from genscale.samplers.sde import DDIM
from genscale.samplers.single_step import DPMSolver2S


def _solve(sampler: GridSampler, model: Any, noise: Tensor) -> Tensor:
    return sampler.finish(sampler.run(model, Conditioning(), torch.arange(len(noise)), noise))


class TestOrder:
    @pytest.mark.parametrize(
        ("build", "order"),
        [
            (lambda n, **grid: RungeKutta(n, method="euler", last="full", **grid), 1),
            (lambda n, **grid: RungeKutta(n, method="heun", last="full", **grid), 2),
            (lambda n, **grid: RungeKutta(n, method="midpoint", last="full", **grid), 2),
            (lambda n, **grid: RungeKutta(n, method="rk4", last="full", **grid), 4),
            (lambda n, **grid: RungeKutta(n, method="dopri5", last="full", **grid), 5),
            (lambda n, **grid: Heun(n, midpoint=0.6, **grid), 2),
            (lambda n, **grid: DPM2(n, **grid), 2),
            (lambda n, **grid: DPMSolverMultistep(n, **grid), 2),
            (lambda n, **grid: DPMSolver2S(n, eta=0.0, **grid), 2),
            (lambda n, **grid: Euler(n, **grid), 1),
            (lambda n, **grid: DDIM(n, **grid), 1),
            (lambda n, **grid: Heun(n, **grid), 2),
            # its first two steps are of order 1 and 2
            (lambda n, **grid: DPMSolverMultistep(n, order=3, **grid), 2),
        ],
        ids=[
            *("rk1", "rk2", "rk-mid", "rk4", "rk5", "heun-0.6", "dpm2", "2m", "2s"),
            *("euler", "ddim", "heun", "3m"),
        ],
    )
    def test_halving_the_step_divides_the_error(self, mixture: Any, build: Any, order: int) -> None:
        # from t = 0.7 to 0.3 on a bent path, where everything is smooth
        model = mixture(ContinuousVP())
        grid: Any = {"schedule": Linear(start=0.7, end=0.3), "precision": "float64"}
        noise = rng.normal(rng.key(0, torch.arange(8)), (2,)).double()
        exact = _solve(RungeKutta(100, method="dopri5", last="full", **grid), model, noise)
        coarse, fine = (
            float((_solve(build(n, **grid), model, noise) - exact).square().mean().sqrt())
            for n in (12, 24)
        )
        assert 2 ** (order - 0.5) < coarse / fine < 2 ** (order + 1.1)

    def test_whole_noise_steps_are_times_like_any_other(self, mixture: Any) -> None:
        # every stage of 10 steps of the midpoint method lies on one of DDPM's noise steps
        model = mixture(DiscreteVP())
        noise = rng.normal(rng.key(0, torch.arange(8)), (2,)).double()
        grid: Any = {"schedule": Linear(end=0.3), "precision": "float64"}
        found = _solve(RungeKutta(35, method="midpoint", last="full", **grid), model, noise)
        torch.testing.assert_close(found, _solve(Heun(70, **grid), model, noise), atol=2e-3, rtol=0)

    def test_the_exact_solution_for_gaussians(self) -> None:
        # normal data of deviation s: x moves with sqrt(alpha^2 s^2 + sigma^2)
        process, s = TrigonometricVP(), 0.5

        class Normal(Denoiser):
            sample_shape, device = (3,), torch.device("cpu")

            def __init__(self) -> None:
                self.process = process

            def __call__(
                self, x: Tensor, level: Level, cond: Conditioning, memory: Any = None
            ) -> Prediction:
                alpha, sigma = on(level.alpha, x), on(level.sigma, x)
                v = alpha**2 * s**2 + sigma**2
                cost = torch.ones(len(x), dtype=torch.float64)
                return Prediction(alpha * s**2 / v * x, sigma / v * x, None, cost)

        noise = torch.ones(1, 3, dtype=torch.float64)
        for sampler in (
            RungeKutta(24, method="rk4", last="full", precision="float64"),
            Heun(400, precision="float64"),
        ):
            torch.testing.assert_close(
                _solve(sampler, Normal(), noise), s * noise, atol=2e-5, rtol=0
            )


# churn of EDM, and the process its numbers are for
CHURN: Any = {"churn": 20, "churn_min": 0.05, "schedule": Karras(0.01, 40.0)}
WIDE = VarianceExploding(0.01, 40.0)
SDE = {"algorithm_type": "sde-dpmsolver++"}


class TestMarginals:
    @pytest.mark.parametrize(
        ("sampler", "process"),
        [
            (DPMSolverMultistep(40, eta=1.0), LinearFlow()),
            (DPMSolverMultistep(40, eta=1.0, correction="heun"), DiscreteVP()),
            (DPMSolverMultistep(40, order=3, eta=1.0), DiscreteVP()),
            (DPMSolver2S(40), DiscreteVP()),
            (ReverseSDE(100), LinearFlow()),
            (ReverseSDE(100, diffusion="increasing_decreasing"), TrigonometricVP()),
            (
                ReverseSDE(100, diffusion="flow_grpo", norm=0.7, last_size=None),
                LinearFlow(),
            ),
            (ReverseSDEHeun(60, diffusion="linear"), LinearFlow()),
            (Heun(40, **CHURN), WIDE),
            (Euler(100, **CHURN), WIDE),
            (DPM2(40, **CHURN), WIDE),
            (Ancestral(100, variance="lower", schedule="linear"), DiscreteVP()),
            (Ancestral(150, variance="upper"), DiscreteVP()),
            (Adaptive(2, rtol=1e-2), LinearFlow()),
            (Heun(30), LinearFlow()),
            (DiffusersSampler("DDPMScheduler", 50), DiscreteVP()),
            (DiffusersSampler("EulerAncestralDiscreteScheduler", 50), DiscreteVP()),
            (DiffusersSampler("KDPM2AncestralDiscreteScheduler", 25), DiscreteVP()),
            (DiffusersSampler("DPMSolverMultistepScheduler", 50, config=SDE), LinearFlow()),
            (DiffusersSampler("DPMSolverSinglestepScheduler", 50, config=SDE), DiscreteVP()),
            (DiffusersSampler("SASolverScheduler", 50), DiscreteVP()),
            (DiffusersSampler("EDMDPMSolverMultistepScheduler", 50, config=SDE), WIDE),
        ],
        ids=[
            *("2m-sde", "2m-sde-heun", "3m-sde", "2s", "sde-sigma", "sde-bump", "sde-grpo"),
            *("sde-heun", "churn", "euler-churn", "dpm2-churn", "ancestral-lower"),
            *("ancestral-upper", "adaptive", "heun", "ddpm", "euler-a", "kdpm2-a", "dpm-sde"),
            *("single-sde", "sa", "edm-sde"),
        ],
    )
    def test_they_keep_the_distribution(
        self, mixture: Any, sampler: Any, process: NoiseProcess
    ) -> None:
        model = mixture(process)
        with torch.no_grad():
            x = sampler.run(model, Conditioning(), torch.arange(3000)).x.double()
        mean = (model.weights[:, None] * model.means).sum(0)
        second = torch.einsum("k,ki,kj->ij", model.weights, model.means, model.means)
        variances = (model.weights * model.stds**2).sum() * torch.eye(2)
        expected = second + variances - mean[:, None] * mean
        # 3000 samples of deviations 1.2 and 0.9: standard errors 0.022 and 0.04, and the steps'
        torch.testing.assert_close(x.mean(0), mean, atol=0.08, rtol=0)
        torch.testing.assert_close(x.T.cov(), expected, atol=0.16, rtol=0)


class TestHistory:
    @pytest.mark.parametrize("order", [2, 3])
    def test_a_renoised_particle_begins_again_at_order_1(self, mixture: Any, order: Any) -> None:
        model, sampler = mixture(DiscreteVP()), DPMSolverMultistep(8, order=order)
        state = sampler.start(model, Conditioning(), torch.arange(3))
        for _ in range(4):
            state = sampler.advance(model, state)
        state = sampler.renoise(state, torch.tensor([4, 2, 4]))
        assert state.history["count"].tolist() == [4, 0, 4]
        evaluated = sampler.evaluate(model, state)
        mean, _ = sampler.transition(evaluated)
        # without history the step is that of DDIM
        plain, _ = DDIM(8).transition(evaluated)
        same = torch.isclose(mean, plain, rtol=1e-4, atol=1e-5).all(1)
        assert same.tolist() == [False, True, False]
        after = sampler.advance(model, evaluated)
        assert after.history["count"].tolist() == [5, 1, 5]

    def test_a_particle_changed_from_outside_forgets(self, mixture: Any) -> None:
        model, sampler = mixture(LinearFlow()), DPMSolverMultistep(6)
        state = sampler.start(model, Conditioning(), torch.arange(2))
        for _ in range(3):
            state = sampler.advance(model, state)
        kicked = sampler.forget(state.replace(x=state.x + 0.1))
        assert kicked.history["count"].tolist() == [0, 0]
        assert kicked.step.tolist() == [3, 3]

    def test_history_stays_with_its_particle(self, mixture: Any) -> None:
        model, sampler = mixture(DiscreteVP()), DPMSolverMultistep(6, order=3, eta=1.0)
        ahead = sampler.start(model, Conditioning(), torch.arange(2))
        for _ in range(3):
            ahead = sampler.advance(model, ahead)
        fresh = sampler.start(model, Conditioning(), torch.tensor([7]))
        mixed = State.cat([fresh, ahead])
        for _ in range(6):
            mixed = sampler.advance(model, mixed)
        alone = [sampler.run(model, Conditioning(), torch.tensor([seed])).x for seed in (7, 0, 1)]
        torch.testing.assert_close(mixed.x, torch.cat(alone), rtol=1e-5, atol=1e-5)


class TestSchedules:
    def test_edms_levels(self) -> None:
        # arXiv:2206.00364, eq. 5, with N = 3, rho 7, 0.002 to 80
        middle = (0.5 * (80.0 ** (1 / 7) + 0.002 ** (1 / 7))) ** 7
        grid = level_grid(VarianceExploding(), Karras(), 3)
        assert grid.sigma.tolist() == pytest.approx([80.0, middle, 0.002, 0.0])

    def test_polyexponential_levels_are_a_power_of_that(self) -> None:
        even, bent = (
            level_grid(DiscreteVP(), named_schedule(name, 1.0), 5).log_snr[:-1]
            for name in ("exponential", "polyexponential")
        )
        place = (even - even[-1]) / (even[0] - even[-1])
        torch.testing.assert_close(bent, even[-1] + place**2 * (even[0] - even[-1]))

    def test_the_shift_of_flux_grows_with_the_picture(self) -> None:
        # mu = 0.5 at 256 tokens, 1.15 at 4096: e^mu / (e^mu + 1 / t - 1)
        for tokens, mu in ((256, 0.5), (4096, 1.15), (1024, 0.5 + 0.65 * 768 / 3840)):
            times = level_grid(LinearFlow(), DynamicShift(tokens), 4).time
            assert times is not None
            e = math.exp(mu)
            expected = [1.0, *(e / (e + 1.0 / t - 1.0) for t in (0.75, 0.5, 0.25)), 0.0]
            assert times.tolist() == pytest.approx(expected)

    def test_exponential_levels_are_even_in_log_snr(self) -> None:
        grid = level_grid(DiscreteVP(), Exponential(), 6)
        gaps = grid.log_snr[:-1].diff()
        torch.testing.assert_close(gaps, gaps[:1].expand(5))
        torch.testing.assert_close(grid.alpha**2 + grid.sigma**2, torch.ones(7).double())

    @pytest.mark.parametrize(
        ("spacing", "timesteps"),
        # of 1000: DiT's round(999 i / 3), and diffusers' trailing and leading
        [("linspace", [999, 666, 333, 0]), ("trailing", [999, 749, 499, 249]),
         ("leading", [750, 500, 250, 0])],
    )  # fmt: skip
    def test_discrete_steps(self, spacing: Any, timesteps: list[int]) -> None:
        times = level_grid(DiscreteVP("linear"), Discrete(spacing), 4).time
        assert times is not None
        assert (times * 1000 - 1)[:-1].round().long().tolist() == timesteps
        assert times[-1] == 0.0

    def test_a_flow_needs_a_finite_first_level(self, mixture: Any) -> None:
        with pytest.raises(
            ConfigError, match=r"sigma / alpha = inf .* use sampler.schedule=linear"
        ):
            Euler(4, schedule="karras").grid(LinearFlow())
        grid = Euler(4, schedule=Karras(0.01, 50.0)).grid(LinearFlow())
        assert float(noise_ratio(grid)[0]) == pytest.approx(50.0)

    @pytest.mark.parametrize(
        ("build", "sentence"),
        [
            (lambda: Euler(4, schedule="karas"), r"sampler.schedule .* Did you mean 'karras'\?"),
            (lambda: Euler(4, schedule="karras", shift=2.0), "sampler.shift=2 moves the schedule"),
            (lambda: Euler(4, schedule=Given((1.0, 0.0))).grid(VarianceExploding()), "= 5 falling"),
            (lambda: Euler(4, schedule="discrete").grid(LinearFlow()), "but LinearFlow has none"),
            (
                lambda: Euler(4, schedule=Karras(0.1, 1e4)).grid(DiscreteVP()),
                "from sigma / alpha = 10000 down to 0.1, but DiscreteVP",
            ),
            (lambda: DynamicShift(0), "sampler.schedule.tokens must be at least 1, but is 0"),
            (lambda: Euler(4, churn=-1.0), "sampler.churn must not be negative"),
            (lambda: Euler(4, churn_min=2.0, churn_max=1.0), "churn_min must be below churn_max"),
            (lambda: Heun(4, midpoint=0.0), r"sampler.midpoint must lie in \(0, 1\], but is 0.0"),
            (lambda: DPMSolverMultistep(4, order=1), "sampler.order must be 2 or 3, but is 1"),
            (lambda: DPMSolverMultistep(4, eta=-1.0), "sampler.eta must be finite and not neg"),
            (lambda: DPMSolverMultistep(4, correction="hein"), r"Did you mean 'heun'\?"),
            (lambda: DPMSolver2S(4, eta=math.inf), "sampler.eta must be finite and not negative"),
            (lambda: RungeKutta(4, method="rk5"), r"sampler.method must be one of euler"),
            (lambda: RungeKutta(4, last="ful"), r"sampler.last .* Did you mean 'full'\?"),
            (lambda: ReverseSDE(4, diffusion="sigmas"), r"sampler.diffusion .* mean 'sigma'\?"),
            (lambda: ReverseSDE(4, norm=-1.0), "sampler.norm must not be negative, but is -1.0"),
            (lambda: ReverseSDE(4, last_size=1.5), r"sampler.last_size must lie in \(0, 1\)"),
            (lambda: ReverseSDEHeun(4, diffusion="flow_grpo"), "Use sampler=reverse_sde"),
            (lambda: Ancestral(4, variance="learnt"), r"Did you mean 'learned'\?"),
        ],
    )
    def test_impossible_settings_are_refused(self, build: Any, sentence: str) -> None:
        with pytest.raises(ConfigError, match=sentence):
            build()


class Varied(Denoiser):
    """Estimates a fixed picture, and says the variance is where it was told."""

    sample_shape, device = (2, 2), torch.device("cpu")

    def __init__(self, value: float) -> None:
        self.process, self.value = DiscreteVP("linear"), value

    def __call__(
        self, x: Tensor, level: Level, cond: Conditioning, memory: Any = None
    ) -> Prediction:
        noise = (x - on(level.alpha, x) * 0.5) / on(level.sigma, x)
        cost = torch.ones(len(x), dtype=torch.float64)
        return Prediction(torch.full_like(x, 0.5), noise, None, cost, x * 0 + self.value)


class TestAncestral:
    @pytest.mark.parametrize(("value", "variance"), [(-1.0, "lower"), (1.0, "upper")])
    def test_learned_variance_lies_between_its_bounds(self, value: float, variance: Any) -> None:
        learned, fixed = (Ancestral(10, variance=v) for v in ("learned", variance))
        model = Varied(value)
        state = learned.advance(model, learned.start(model, Conditioning(), torch.arange(3)))
        state = learned.evaluate(model, state)
        (mean, std), (expected_mean, expected) = learned.transition(state), fixed.transition(state)
        torch.testing.assert_close(mean, expected_mean)
        torch.testing.assert_close(std, on(expected, mean).expand_as(mean))
        middle = learned.transition(state.replace(variance=state.x * 0))[1]
        low, high = (Ancestral(10, variance=v).transition(state)[1] for v in ("lower", "upper"))  # type: ignore[arg-type]
        torch.testing.assert_close(middle, on((low * high).sqrt(), mean).expand_as(mean))

    def test_it_ends_without_noise_and_mixes_steps(self) -> None:
        sampler, model = Ancestral(4), Varied(0.3)
        whole = sampler.run(model, Conditioning(), torch.arange(3)).x
        states = []
        for row in range(3):
            state = sampler.start(model, Conditioning(), torch.tensor([row]))
            for _ in range(row * 2):
                state = sampler.advance(model, state)
            states.append(state)
        mixed = State.cat(states)  # one of them is finished
        while int(mixed.step.min()) < 4:
            mixed = sampler.advance(model, sampler.evaluate(model, mixed))
        torch.testing.assert_close(mixed.x, whole)
        torch.testing.assert_close(whole, torch.full_like(whole, 0.5))

    def test_networks_without_variance_are_refused(self, mixture: Any) -> None:
        model, sampler = mixture(DiscreteVP()), Ancestral(4)
        with pytest.raises(ConfigError, match=r"Use sampler.variance=lower"):
            sampler.run(model, Conditioning(), torch.arange(2))


class TestDensity:
    @pytest.mark.parametrize(
        "sampler",
        [DDIM(6, eta=1.0), DPMSolverMultistep(6, eta=1.0), ReverseSDE(6), Ancestral(6)],
        ids=["ddim", "2m", "sde", "learned"],
    )
    def test_the_density_of_a_step_is_that_of_its_normal(self, sampler: Any) -> None:
        model = Varied(0.0)
        state = sampler.advance(model, sampler.start(model, Conditioning(), torch.arange(3)))
        state = sampler.evaluate(model, state)
        mean, std = sampler.transition(state)
        moved = sampler.advance(model, state).x
        spread = std.double() if std.dim() > 1 else on(std, mean.double())
        normal = torch.distributions.Normal(mean.double(), spread.expand_as(mean))
        expected = normal.log_prob(moved.double()).flatten(1)
        torch.testing.assert_close(sampler.log_prob(state, moved), expected.sum(1))
        torch.testing.assert_close(sampler.log_prob(state, moved, reduce="mean"), expected.mean(1))

    def test_a_step_without_noise_adds_nothing(self, mixture: Any) -> None:
        model, sampler = mixture(LinearFlow()), DDIM(4)
        state = sampler.evaluate(model, sampler.start(model, Conditioning(), torch.arange(2)))
        assert sampler.log_prob(state, state.x).tolist() == [0.0, 0.0]


def test_churn_raises_the_noise_inside_its_window_only() -> None:
    sampler = Heun(4, churn=0.8, churn_min=0.1, churn_max=10.0, schedule=Given((20, 5, 1, 0.05, 0)))
    process = VarianceExploding()
    # gamma = 0.8 / 4
    assert sampler.grid(process).sigma.tolist() == pytest.approx([20.0, 6.0, 1.2, 0.05, 0.0])


def test_stacked_generators_belong_to_their_seeds() -> None:
    whole, part = rng.stacked([3, 5, 7 + 2**32]), rng.stacked(torch.tensor([7, 3]))
    assert torch.equal(whole.normal((2, 2))[[2, 0]], part.normal((2, 2)))
    assert torch.equal(whole.integers(10)[[2, 0]], part.integers(10))
