"""Feynman-Kac steering: exact weights, on models of all families, and plain where it should be."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from genscale.errors import ConfigError
from genscale.rewards.base import Request, Reward, RewardOutput
from genscale.samplers.sde import DDIM
from genscale.search.best_of_n import BestOfN, samples_afforded
from genscale.search.budget import Budget
from genscale.search.names import check_name
from genscale.search.official_fk import OfficialPopulation, OfficialSteering
from genscale.search.particles import FeynmanKac, Returns, check_population, conclude, select
from genscale.search.plain import PlainSampling
from genscale.search.population import Population
from genscale.search.potentials import Payments, PotentialName, check_potential
from genscale.search.tempering import adapted, auto_strength, check_tempering, scheduled
from tests.search.closed_form import TILTED_MEAN, Linear, plane, weighted_means
from tests.search.conftest import Brightness
from tests.search.families import FAMILIES, world

POTENTIALS = get_args(PotentialName)
REPEATS = 200  # as prompts of one run


def off(means: Tensor) -> float:
    return float((means.mean(0) - TILTED_MEAN).norm())


class TestKnownTarget:
    """Mixture of three in the plane, tilted by exp(r): flow, 50 steps, eta 1, 64 particles."""

    @pytest.mark.parametrize("threshold", [0.5, 1.0])
    def test_the_weighted_mean_is_that_of_the_target(self, threshold: float) -> None:
        search = FeynmanKac(
            64, strength=1.0, interval=5, threshold=threshold, resampling="systematic",
            returns="all",
        )  # fmt: skip
        means, result = weighted_means(search, plane(REPEATS))
        assert off(means) <= 0.2  # measured 0.113 and 0.088
        assert result.cost.nfe.tolist() == [64 * 50.0] * REPEATS
        assert result.cost.reward_calls.tolist() == [64 * 10.0] * REPEATS

    def test_more_particles_come_nearer(self) -> None:
        search = FeynmanKac(
            256, strength=1.0, interval=5, threshold=1.0, resampling="systematic", returns="all"
        )
        assert off(weighted_means(search, plane(50))[0]) <= 0.1  # measured 0.070

    @pytest.mark.parametrize("settings", [{"potential": "is"}, {"tempering": "geometric"}])
    def test_so_do_importance_sampling_and_tempering(self, settings: Any) -> None:
        search = FeynmanKac(64, strength=1.0, interval=5, returns="all", **settings)
        assert off(weighted_means(search, plane(REPEATS))[0]) <= 0.2

    def test_the_published_program_misses_it_where_it_drops_weights(self) -> None:
        search = FeynmanKac(
            64, strength=1.0, interval=5, threshold=0.5, returns="all", compat="official"
        )
        means, result = weighted_means(search, plane(REPEATS))
        assert off(means) > 0.5  # measured 0.695; the weights kept: 0.113
        assert float(result.extra["log_weights"].std()) < 1e-12  # it returns none

    def test_a_draw_from_the_target(self) -> None:
        search = FeynmanKac(32, strength=1.0, interval=5, returns="weighted_sample")
        result = search.run(plane(600))
        # one draw a prompt: its standard deviation, 1.3 in the first coordinate, over 24
        torch.testing.assert_close(
            result.latents.double().mean(0), TILTED_MEAN, atol=0.25, rtol=0.0
        )


class TestWeights:
    @pytest.mark.parametrize("potential", POTENTIALS)
    def test_all_potentials_telescope(self, potential: PotentialName) -> None:
        """Where nothing is resampled, whatever was paid on the way, the weight is exp(lambda r)."""
        search = FeynmanKac(
            6, strength=2.0, potential=potential, interval=1, threshold=1e-6, returns="all"
        )
        result = search.run(plane(3, 8))
        extra = result.extra
        expected = torch.log_softmax(2.0 * extra["rewards"], dim=1)
        torch.testing.assert_close(extra["log_weights"], expected)

    @pytest.mark.parametrize("potential", POTENTIALS)
    @pytest.mark.parametrize("tempering", [None, "linear", "geometric", "adaptive"])
    def test_they_are_unbiased_through_resampling(
        self, potential: PotentialName, tempering: Any
    ) -> None:
        """Two particles of rewards 0 and log 3 that never change: the second weighs 3 of 4."""
        count = 4000
        population = Population(
            count, 2, torch.ones(count, dtype=torch.float64), potential=potential,
            threshold=0.95, tempering=tempering,
        )  # fmt: skip
        rewards = torch.tensor([0.0, 3.0]).double().log1p().expand(count, -1) * 0.792481
        identity = torch.arange(2).expand(count, -1)
        total = torch.ones(count, dtype=torch.float64)
        uniforms = torch.rand(count, 4, dtype=torch.float64, generator=torch.Generator())
        for step in range(3):
            population.weigh(rewards.gather(1, identity), step / 3)
            before = population.log_weights.exp().mean(1)
            identity = identity.gather(1, population.resample(uniforms[:, step : step + 1]))
            # where the population was resampled, its mean weight goes into the constant
            total = torch.where((population.log_weights == 0).all(1), total * before, total)
        population.end(rewards.gather(1, identity), uniforms)
        weights = population.log_weights.exp() * total[:, None] / 2
        found = torch.stack([(weights * (identity == n)).sum(1).mean() for n in range(2)])
        wanted = rewards[0].exp() / 2
        torch.testing.assert_close(found, wanted, atol=0.05, rtol=0.05)

    def test_they_are_carried_where_nothing_is_resampled(self) -> None:
        population = Population(1, 2, torch.ones(1, dtype=torch.float64), threshold=0.1)
        own = torch.tensor([[0, 1]])
        for rewards in ([1.0, 0.0], [0.5, 0.25], [2.0, -1.0]):
            population.weigh(torch.tensor([rewards], dtype=torch.float64))
            assert torch.equal(population.resample(torch.zeros(1, 1, dtype=torch.float64)), own)
        assert population.log_weights.tolist() == [[2.0, -1.0]]

    def test_they_start_afresh_where_it_is(self) -> None:
        population = Population(2, 2, torch.ones(2, dtype=torch.float64), threshold=0.9)
        rewards = torch.tensor([[9.0, 0.0], [0.1, 0.0]], dtype=torch.float64)
        population.weigh(rewards)
        ancestors = population.resample(torch.full((2, 1), 0.5, dtype=torch.float64))
        assert ancestors.tolist() == [[0, 0], [0, 1]]  # each prompt by its own weights
        torch.testing.assert_close(population.log_weights[0], torch.zeros(2, dtype=torch.float64))
        torch.testing.assert_close(population.log_weights[1], rewards[1])
        # both descend from the particle that has been paid for reward 9
        population.end(torch.tensor([[9.0, 8.0], [0.0, 0.0]], dtype=torch.float64), rewards)
        torch.testing.assert_close(population.log_weights[0], torch.tensor([0.0, -1.0]).double())

    def test_a_reward_that_cannot_tell_has_no_weight(self) -> None:
        population = Population(2, 2, torch.ones(2, dtype=torch.float64), threshold=0.9)
        none = -torch.inf
        population.weigh(torch.tensor([[1.0, none], [none, none]], dtype=torch.float64))
        # the only one that was judged, and a checkpoint that tells nothing
        assert population.log_weights.tolist() == [[1.0, none], [0.0, 0.0]]
        uniforms = torch.full((2, 1), 0.5, dtype=torch.float64)
        assert population.resample(uniforms).tolist() == [[0, 0], [0, 1]]
        population.end(torch.tensor([[1.0, 2.0], [1.0, 2.0]], dtype=torch.float64), uniforms)
        assert population.log_weights.tolist() == [[0.0, 1.0], [1.0, 2.0]]

    def test_potentials_look_at_the_rewards_so_far(self) -> None:
        slopes: dict[str, list[float]] = {}
        for name in POTENTIALS:
            payments = Payments(name, (1, 1))
            for reward in (2.0, 1.0, 3.0):
                rewards = torch.tensor([[reward]], dtype=torch.float64)
                base, slope = payments.offer(rewards)
                slopes.setdefault(name, []).append(float(slope))
                payments.pay(base + slope, rewards, torch.ones(1, 1, dtype=torch.bool))
            payments.select(torch.zeros(1, 1, dtype=torch.int64))
        assert slopes == {
            "difference": [2.0, 1.0, 3.0],
            "max": [2.0, 2.0, 3.0],
            "sum": [2.0, 3.0, 6.0],
            "rt": [2.0, 1.0, 3.0],
            "is": [0.0, 0.0, 0.0],
        }


class TestTempering:
    def test_schedules(self) -> None:
        # 1.008^87 = 2.0001: DAS has its full strength near step 87 of 100
        assert scheduled("geometric", 0.86) < 1.0 == scheduled("geometric", 0.87)
        assert scheduled("geometric", 0.0) == scheduled("linear", 0.0) == 0.0
        assert scheduled("geometric", 0.5) == pytest.approx(1.008**50 - 1.0)
        assert scheduled("linear", 0.25) == 0.25
        with pytest.raises(ValueError, match="Adaptive tempering has no schedule"):
            scheduled("adaptive", 0.5)

    def test_the_share_keeps_the_effective_size(self) -> None:
        rewards = torch.tensor([[3.0, 1.0, 0.0, -2.0], [0.1, 0.0, 0.0, 0.1]], dtype=torch.float64)
        zero = torch.zeros(2, dtype=torch.float64)
        share, below = adapted(torch.zeros_like(rewards), rewards, zero, size=2.0)
        assert below.tolist() == [True, False]
        assert share[1] == 1.0  # nothing in its way
        weights = torch.softmax(share[0] * rewards[0], 0)
        assert float(1 / weights.square().sum()) == pytest.approx(2.0, abs=1e-9)
        # what is too much already stays where it is
        stays, _ = adapted(torch.zeros_like(rewards), 100 * rewards, zero + 0.5, size=2.0)
        assert stays[0] == 0.5

    def test_a_population_tempers_itself_and_ends_at_full_strength(self) -> None:
        search = FeynmanKac(16, strength=50.0, tempering="adaptive", interval=2, returns="all")
        extra = search.run(plane(5, 20)).extra
        shares, sizes = extra["share"], extra["ess"]
        assert bool((shares.diff(dim=1) >= 0).all())
        assert float(shares[:, 0].max()) < 1.0
        assert bool((shares[:, -1] == 1.0).all())
        assert float((sizes[:, 0] - 8.0).abs().max()) < 1e-6  # half of 16 at the first checkpoint

    def test_the_strength_at_which_half_of_the_samples_count(self) -> None:
        rewards = torch.tensor(
            [[0.0, 0.1, 0.2, 0.4], [0.0, 10.0, 20.0, 40.0], [1.0, 1.0, 1.0, 1.0]],
            dtype=torch.float64,
        )
        strength = auto_strength(rewards)
        weights = torch.softmax(strength[:, None] * rewards, 1)
        sizes = 1 / weights.square().sum(1)
        torch.testing.assert_close(sizes, torch.tensor([2.0, 2.0, 4.0]).double())
        assert float(strength[0] / strength[1]) == pytest.approx(100.0)  # the unit cancels
        assert strength[2] == 0.0

    def test_auto_pays_for_the_samples_it_looks_at(self, engines: Any) -> None:
        search = FeynmanKac(4, strength="auto", steps=[1, 2], base_samples=6)
        result = search.run(engines())
        assert result.cost.nfe.tolist() == [(6 + 4) * 4.0] * 2
        assert result.cost.reward_calls.tolist() == [6 + 4 * 3.0] * 2
        assert bool((result.extra["strength"] > 1.0).all())  # brightness differs by less than 1


class TestPlain:
    @pytest.mark.parametrize("family", [name for name in FAMILIES if name != "dimr-flow"])
    @pytest.mark.parametrize("settings", [{"particles": 1}, {"particles": 3, "strength": 0.0}])
    def test_one_particle_and_no_strength(self, family: str, settings: Any) -> None:
        plain = PlainSampling().run(world(family).engine())
        found = FeynmanKac(**settings).run(world(family).engine())
        torch.testing.assert_close(found.latents, plain.latents, rtol=1e-5, atol=1e-6)
        assert torch.equal(found.seeds, plain.seeds)

    @pytest.mark.parametrize("returns", ["argmax_reward", "argmax_weight", "weighted_sample"])
    def test_bit_for_bit(self, engines: Any, returns: Returns) -> None:
        plain = PlainSampling().run(engines())
        search = FeynmanKac(4, strength=0.0, returns=returns, resampling="multinomial")
        result = search.run(engines())
        assert torch.equal(result.latents, plain.latents)
        assert result.cost.decodes.tolist() == [4.0, 4.0]  # nothing was judged on the way

    def test_particles_that_are_never_resampled_are_independent_samples(self, engines: Any) -> None:
        best = BestOfN(4).run(engines())
        steered = FeynmanKac(4, threshold=1e-6, interval=1).run(engines())
        assert torch.equal(steered.latents, best.latents)


class TestEveryFamily:
    @pytest.mark.parametrize("family", [name for name in FAMILIES if name != "dimr-flow"])
    def test_steering(self, family: str) -> None:
        made = world(family)
        search = FeynmanKac(4, strength=1000.0, interval=1)
        result = search.run(made.engine())
        steps, price = made.sampler.num_steps, made.costs.total
        assert result.cost.nfe.tolist() == [4 * price] * 3
        assert (
            result.cost.reward_calls.tolist() == [4.0 * (steps - 1)] * 3
        )  # not the first and last
        events = [generation.event for generation in result.genealogy.generations]
        assert (events[0], events[-1], len(events)) == ("start", "finish", steps)
        assert set(events[1:-1]) <= {"resample", "keep"}
        assert "resample" in events
        # a small part of the prompts on their own, and in micro-batches
        parts = search.run(made.engine(prompts=slice(0, 2), micro_batch=3))
        torch.testing.assert_close(parts.latents, result.latents[:2], rtol=1e-4, atol=1e-5)
        assert torch.equal(parts.extra["ancestors"], result.extra["ancestors"][:2])

    def test_copies_of_scale_wise_particles_part_at_the_finer_scales(self) -> None:
        engine = world("var").engine(prompts=slice(0, 1))
        state = engine.evaluate(engine.run(engine.start(1), until=2))
        state = engine.run(engine.branch(state, torch.tensor([0, 0])))
        tokens = state.history["tokens"]
        assert torch.equal(tokens[0, :14], tokens[1, :14])  # scales 1, 2, 3: the step's own draw
        assert not torch.equal(tokens[0, 14:], tokens[1, 14:])

    def test_deterministic_samplers_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="draws noise, else copies of a particle stay equal"):
            FeynmanKac(4).run(world("dimr-flow").engine())


class Ranks(Reward):
    potential = False

    def score(self, images: Tensor, handle: tuple[Request, ...], index: Tensor) -> RewardOutput:
        return Brightness().score(images, handle, index)


def test_rewards_that_only_rank_are_refused(engines: Any) -> None:
    with pytest.raises(ConfigError, match="weighs particles by exp"):
        FeynmanKac(4).run(engines(reward=Ranks()))


class TestReturns:
    def result(self, returns: Returns, **settings: Any) -> Any:
        search = FeynmanKac(8, strength=1.0, interval=5, returns=returns)
        return search.run(plane(3, 20, **settings))

    def test_all_is_best_first_and_what_the_others_choose_from(self) -> None:
        whole = self.result("all")
        rewards = whole.extra["rewards"]
        assert whole.latents.shape == (24, 2)
        assert bool((rewards.diff(dim=1) <= 0).all())
        torch.testing.assert_close(rewards.flatten(), whole.rewards["reward"])
        assert torch.equal(self.result("argmax_reward").latents, whole.latents[::8])
        heaviest = whole.extra["log_weights"].argmax(1) + torch.arange(3) * 8
        assert torch.equal(self.result("argmax_weight").latents, whole.latents[heaviest])
        drawn = self.result("weighted_sample").latents
        assert all(any(torch.equal(x, y) for y in whole.latents) for x in drawn)

    def test_several_a_prompt(self) -> None:
        whole = self.result("all")
        for returns in ("argmax_reward", "weighted_sample"):
            result = self.result(returns, top=2)
            assert result.group.tolist() == [0, 0, 1, 1, 2, 2]
        best = self.result("argmax_reward", top=2)
        assert torch.equal(best.latents, whole.latents.view(3, 8, 2)[:, :2].flatten(0, 1))

    def test_the_genealogy_leads_from_the_answer_to_its_seed(self) -> None:
        result = self.result("argmax_reward")
        last = result.genealogy.generations[-1]
        assert torch.equal(last.seeds[::8], result.seeds)
        trace = result.genealogy.trace(8)
        assert trace[0]["event"] == "start"
        assert trace[-1]["reward"] == pytest.approx(float(result.rewards["reward"][1]))
        assert bool((result.genealogy.alive() <= 8).all())


class TestSchedule:
    def test_when_particles_are_judged(self) -> None:
        assert FeynmanKac().checkpoints(50) == [5, 10, 15, 20, 25, 30, 35, 40, 45]
        assert FeynmanKac().checkpoints(10) == list(range(1, 9))  # a VAR's: not its last scale
        assert FeynmanKac(interval=5, window=(0.2, 0.6)).checkpoints(50) == [10, 15, 20, 25, 30]
        assert FeynmanKac(steps=[7, 3]).checkpoints(10) == [3, 7]
        assert FeynmanKac(potential="is").checkpoints(10) == []

    def test_the_budget_sets_the_number_of_particles(self, engines: Any) -> None:
        search = FeynmanKac(None, steps=[2])
        assert search.run(engines(budget=Budget(nfe=15))).cost.nfe.tolist() == [12.0, 12.0]
        result = search.run(engines(budget=Budget(reward_calls=5)))
        assert result.cost.reward_calls.tolist() == [4.0, 4.0]  # two particles, judged twice
        result = search.run(engines(budget=Budget(reward_calls=1)))
        plain = PlainSampling().run(engines())
        assert torch.equal(result.latents, plain.latents)

    def test_dearer_samples_are_fewer(self, engines: Any) -> None:
        engine = engines(budget=Budget(nfe=16, reward_calls=9))
        assert samples_afforded(engine, None) == 4
        assert samples_afforded(engine, None, nfe=8.0) == 2
        assert samples_afforded(engine, None, rewards=3) == 3
        assert samples_afforded(engine, 1, rewards=3) == 1

    def test_the_best_estimate_stands_where_time_is_over(
        self, engines: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from genscale.search.engine import Engine

        now = iter(range(1000))
        monkeypatch.setattr(Engine, "seconds", property(lambda _: float(next(now))))
        result = FeynmanKac(4, steps=[2]).run(engines(budget=Budget(seconds=5.0)))
        assert not result.finished.any()
        assert result.cost.reward_calls.tolist() == [4.0, 4.0]


class TestOfficial:
    """Its numbers are golden cases of ``search``."""

    def test_a_run_weighs_and_draws_as_it_does(self, engines: Any) -> None:
        search = FeynmanKac(
            4, strength=20.0, potential="max", steps=[1, 3], threshold=1.0, compat="official",
            returns="all",
        )  # fmt: skip
        engine = engines()
        extra = search.run(engine).extra
        assert extra["ancestors"].shape == (2, 3, 4)  # two checkpoints and the end
        assert bool((extra["ess"][:, :2] < 4.0).all())

    def test_the_last_correction_takes_the_running_maximum(self) -> None:
        rewards = torch.tensor([[2.0, 1.0]], dtype=torch.float64)
        uniforms = torch.tensor([[0.2, 0.9]], dtype=torch.float64)
        steering = OfficialSteering(1, 2, potential="max", strength=1.0)
        assert steering.step(rewards, uniforms).tolist() == [[0, 1]]
        steering.step(torch.tensor([[0.0, 1.0]], dtype=torch.float64), uniforms, final=True)
        # exp(max) over what was paid: 1 and 1, though the first sample ended at reward 0
        torch.testing.assert_close(steering.weights, torch.ones(1, 2, dtype=torch.float64))

    def test_populations_share_its_interface(self) -> None:
        population = OfficialPopulation(1, 3, torch.tensor([1.0], dtype=torch.float64))
        population.weigh(torch.tensor([[50.0, 0.0, 0.0]], dtype=torch.float64))
        uniforms = torch.full((1, population.uniforms), 0.5, dtype=torch.float64)
        assert population.resample(uniforms).tolist() == [[0, 0, 0]]
        assert population.record()["log_weights"].shape == (1, 3)

    def test_it_has_no_tempering(self) -> None:
        with pytest.raises(ConfigError, match="compat=official knows neither tempering nor"):
            FeynmanKac(compat="official", tempering="linear")


def test_selection_and_conclusion_of_ones_own_search(engines: Any) -> None:
    """What other particle searches are made of."""
    engine = engines(prompts=1, sampler=DDIM(2, eta=1.0))
    population = Population(1, 3, torch.tensor([500.0], dtype=torch.float64))
    state = engine.start(3)
    engine.record("start", state)
    state = engine.evaluate(engine.run(state, until=1))
    values = engine.preview(state).value
    population.weigh(values[None])
    state, rows = select(engine, state, population, values)
    assert len(set(rows.tolist())) < 3
    extra = conclude(engine, engine.run(state), population, "argmax_reward")
    assert extra["rewards"].max() == engine.answers.scores.value[0]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"particles": 0}, "search.particles must be at least 1, but is 0"),
        ({"strength": -1.0}, "search.strength must be a number that is not negative"),
        ({"strength": "aut"}, "or auto, but is 'aut'"),
        ({"threshold": 0.0}, r"share of the particles in \(0, 1\], but is 0"),
        ({"resampling": "sps"}, "Did you mean 'ssp'"),
        ({"potential": "maximum"}, "search.potential must be one of difference"),
        ({"tempering": "lienar"}, "Did you mean 'linear'"),
        ({"returns": "argmax"}, "search.returns must be one of argmax_reward"),
        ({"interval": 0}, "search.interval must be at least 1 step"),
        ({"window": (0.5, 0.2)}, "search.window must be two shares"),
        ({"base_samples": 1}, "search.base_samples must be at least 2"),
        ({"compat": "offical"}, "Did you mean 'official'"),
    ],
)
def test_mistakes_are_told(settings: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        FeynmanKac(**settings)


def test_names_are_checked_where_they_are_known() -> None:
    check_name("search.way", "left", ["left", "right"])
    check_name("search.way", None, ["left", "right"], optional=True)
    with pytest.raises(ConfigError, match=r"search.way must be one of left, right, but is None"):
        check_name("search.way", None, ["left", "right"])
    check_population(None, "auto", 1.0, "ssp", None, "all")
    check_potential("rt")
    check_tempering(None)
    with pytest.raises(ConfigError, match="Did you mean 'geometric'"):
        check_tempering("geometrical")


def test_steps_beyond_the_samplers_are_refused(engines: Any) -> None:
    with pytest.raises(ConfigError, match=r"must lie in 0 to 3, the sampler's steps.*\[9\]"):
        FeynmanKac(steps=[2, 9]).run(engines())


def test_labels_tell_what_changes_the_results() -> None:
    assert FeynmanKac().label == "FeynmanKac(4, difference, strength 10, every tenth, ESS 0.5, ssp)"
    other = FeynmanKac(None, strength=2, steps=[3], tempering="linear", returns="all")
    assert other.label == (
        "FeynmanKac(budget, difference, strength 2, at [3], ESS 0.5, ssp, linear tempering, all)"
    )


def test_the_reward_of_the_plane_reads_what_is_shown() -> None:
    from tests.search.closed_form import as_picture

    points = torch.tensor([[1.0, 2.0], [-3.0, 0.5]])
    found = Linear().score(as_picture(points) * 0.5 + 0.5, (), torch.zeros(2)).value
    torch.testing.assert_close(found, points @ torch.tensor([1.2, -0.6]), atol=1e-5, rtol=1e-5)
