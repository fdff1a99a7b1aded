"""TTS-VAR: schedules, weights, and what the search promises on every scale-wise model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from genscale.errors import ConfigError
from genscale.layers.scales import scale_spans
from genscale.rewards.base import RewardOutput
from genscale.samplers.ode import Euler
from genscale.search.best_of_n import BestOfN
from genscale.search.budget import Budget
from genscale.search.candidate_schedule import (
    CandidateSchedule,
    Selection,
    published_clusters,
    published_resampling,
    shaped,
    steps_of,
)
from genscale.search.cost import StepCosts
from genscale.search.plain import PlainSampling
from genscale.search.tts_var import TTSVAR, guarded_weights, particle_weights, potential
from tests.search.conftest import Brightness
from tests.search.families import PROMPTS, World, world

SCALE_WISE = ("var", "switti", "switti-ar", "mvar")
# the scales of Infinity at a million pixels, and the schedule published for them
INFINITY = [1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64]
PUBLISHED = [8, 8, 6, 6, 6, 4, 2, 2, 2, 1, 1, 1, 1]


def resolutions(sides: list[int]) -> list[float]:
    return [side / sides[-1] for side in sides]


class Spy(Brightness):
    """Notes what it says, call by call."""

    def __init__(self) -> None:
        self.calls: list[Tensor] = []

    def score(self, images: Tensor, handle: Any, index: Tensor) -> RewardOutput:
        output = super().score(images, handle, index)
        self.calls.append(output.value.double())
        return output


@pytest.fixture(params=SCALE_WISE)
def tokens(request: pytest.FixtureRequest) -> World:
    return world(request.param)


class TestSchedule:
    @pytest.mark.parametrize(
        ("sides", "clusters", "resampled"),
        [
            (INFINITY, (2, 5), (6, 9)),
            ([1, 2, 3, 4, 5, 6, 8, 10, 13, 16], (2,), (4, 6)),  # VAR at 256
            ([1, 2, 3, 4, 6, 9, 13, 18, 24, 32], (2, 4), (5, 7)),  # VAR and Switti at 512
            ([1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64], (3, 7), (8, 11)),  # Switti, 1024
            ([1, 2, 4], (), (1,)),
            ([1], (), ()),
        ],
    )
    def test_the_published_scales_map_to_others(
        self, sides: list[int], clusters: tuple[int, ...], resampled: tuple[int, ...]
    ) -> None:
        found = published_resampling(resolutions(sides))
        assert (published_clusters(resolutions(sides), found), found) == (clusters, resampled)

    def test_the_published_numbers(self) -> None:
        schedule = shaped((2, 5), (6, 9), None, 13)
        assert schedule.counts == (8, 6, 4, 2, 1)
        # the paper writes what is kept after each scale: the same
        assert shaped((2, 5), (6, 9), PUBLISHED, 13) == schedule
        assert shaped((2, 5), (6, 9), [8, 6, 4, 2, 1], 13) == schedule
        tokens = torch.tensor([side**2 for side in INFINITY], dtype=torch.float64)
        costs = StepCosts(tokens, torch.zeros(13, dtype=torch.float64))
        # token-forwards of the cost model: 1.39 times the 10 521 of one sample
        assert (schedule.evaluations(costs), costs.total) == (14656.0, 10521.0)
        search = TTSVAR()
        assert (search.decodes(schedule), search.rewards(schedule)) == (21, 7)

    def test_fewer_selections_read_the_shape_at_even_spaces(self) -> None:
        assert shaped((), (2,), None, 4).counts == (8, 1)
        assert shaped((1,), (2,), None, 4).counts == (8, 4, 1)
        assert shaped((2,), (4, 6), None, 10).counts == (8, 6, 2, 1)
        assert shaped((), (), None, 4).counts == (8,)

    def test_smaller_ones_keep_the_proportions(self) -> None:
        schedule = shaped((2, 5), (6, 9), None, 13)
        assert schedule.with_begin(16).counts == (16, 12, 8, 4, 2)
        assert schedule.with_begin(4).counts == (4, 3, 2, 1, 1)
        assert schedule.with_begin(1).counts == (1, 1, 1, 1, 1)
        assert schedule.before(1) == 6

    def test_a_step_is_evaluated_by_those_before_and_taken_by_those_after(self) -> None:
        schedule = CandidateSchedule(5, (Selection(0, "resample", 2),))
        heun = StepCosts(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0]))
        assert schedule.evaluations(heun) == 5 * 1 + 2 * 1 + 2 * 1

    def test_fractions_name_the_first_step_that_has_reached_them(self) -> None:
        assert steps_of([4 / 64, 0.5, 1], resolutions(INFINITY), "cluster_scales") == (1, 2, 9)
        with pytest.raises(ConfigError, match=r"search.x must name steps 0 to 2 .* 4, .* has 3"):
            steps_of([3], resolutions([1, 2, 3, 4]), "x")
        with pytest.raises(ConfigError, match=r"must name different steps, but \[1, 0.5\]"):
            steps_of([1, 0.5], resolutions([1, 2, 3, 4]), "x")

    def test_what_does_not_fit_is_told(self) -> None:
        with pytest.raises(ConfigError, match=r"step 2 is in both search.cluster_scales and"):
            shaped((2,), (2,), None, 4)
        with pytest.raises(ConfigError, match="changes at scale 1, where nothing is selected"):
            shaped((), (2,), [4, 2, 1, 1], 4)
        with pytest.raises(
            ConfigError, match=r"must have 2 numbers, .* or 4, one a step, but has 3"
        ):
            shaped((), (2,), [4, 2, 1], 4)
        with pytest.raises(ConfigError, match=r"that do not rise, but is \[1, 2\]"):
            shaped((), (2,), [1, 2], 4)


class TestWeights:
    history = torch.tensor([[1.0, 5.0, 2.0, 3.0], [4.0, 0.0, -1.0, -2.0]], dtype=torch.float64)

    @pytest.mark.parametrize(
        ("kind", "expected"),
        [
            ("value", [3.0, -2.0]),
            ("diff", [1.0, -1.0]),
            ("sum", [11.0, 1.0]),
            ("max", [5.0, 4.0]),
            ("topk_2", [8.0, 4.0]),
            ("topk_9", [11.0, 1.0]),
        ],
    )
    def test_potentials(self, kind: str, expected: list[float]) -> None:
        assert potential(self.history, kind).tolist() == expected
        assert potential(self.history[:, :1], kind).tolist() == [1.0, 4.0]  # all begin as values

    def test_a_reward_that_is_not_valid_counts_for_nothing(self) -> None:
        history = torch.tensor([[-math.inf, 2.0], [1.0, -math.inf]], dtype=torch.float64)
        for kind in ("value", "diff", "sum", "max", "topk_2"):
            assert potential(history, kind).tolist() == [2.0, -math.inf]

    def test_weights_are_exponentials_that_sum_to_one(self) -> None:
        values = torch.tensor([[0.0, 1.0, 3.0], [1e4, 1e4 + 1, -1e4]], dtype=torch.float64)
        weights = particle_weights(values, 0.7)
        torch.testing.assert_close(weights[0], (0.7 * values[0]).softmax(0))
        torch.testing.assert_close(weights[1], (0.7 * values[1]).softmax(0))
        best = particle_weights(values[:, [0, 2, 2]], math.inf)
        assert best.tolist() == [[0.0, 0.5, 0.5], [1.0, 0.0, 0.0]]

    def test_candidates_without_any_valid_reward_weigh_alike(self) -> None:
        lost = torch.tensor([[-math.inf] * 4, [0.0, -math.inf, 0.0, -math.inf]]).double()
        assert particle_weights(lost, 5.0).tolist() == [[0.25] * 4, [0.5, 0.0, 0.5, 0.0]]

    def test_the_published_guards(self) -> None:
        nan, inf = math.nan, math.inf
        rows = torch.tensor(
            [[0.0, 0.0, 0.0], [-1.0, 0.0, -2.0], [1.0, nan, 5.0], [1.0, inf, 3.0], [nan, nan, nan],
             [0.0, 2.0, 1.0], [nan, inf, 1.0]]
        )  # fmt: skip
        assert guarded_weights(rows).tolist() == [
            [1.0, 1.0, 1.0],  # nothing is positive, so the indicator sums to nothing: all alike
            [1.0, 1.0, 1.0],
            [1.0, 0.0, 1.0],
            [0.0, 1.0, 0.0],
            [1.0, 1.0, 1.0],
            [0.0, 2.0, 1.0],
            [0.0, 1.0, 1.0],  # NaN comes before infinite
        ]


class TestScaleWise:
    def test_costs_are_those_of_the_model(self, tokens: World) -> None:
        engine = tokens.engine()
        search = TTSVAR()
        schedule = search.schedule(engine)
        assert schedule.counts == (8, 4, 1)
        assert [(s.step, s.kind) for s in schedule.selections] == [(1, "cluster"), (2, "resample")]
        result = search.run(engine)
        # 8 at the first two scales, 4 at the third, two branches each; 1 unguided at the last
        assert result.cost.nfe.tolist() == [2.0 * (8 + 8 + 4) + 1] * PROMPTS
        assert result.cost.nfe[0] == schedule.evaluations(engine.costs)
        assert result.cost.decodes.tolist() == [8.0 + 4 + 1] * PROMPTS
        assert search.decodes(schedule) == 13
        assert result.cost.reward_calls.tolist() == [4.0 + 1] * PROMPTS
        assert search.rewards(schedule) == 5

    def test_clusters_of_latents_are_not_decoded(self, tokens: World) -> None:
        search = TTSVAR(features="latent")
        result = search.run(tokens.engine())
        assert result.cost.decodes.tolist() == [4.0 + 1] * PROMPTS
        assert search.decodes(search.schedule(tokens.engine())) == 5

    def test_without_strength_and_clusters_it_is_plain_sampling(self, tokens: World) -> None:
        engine = tokens.engine()
        search = TTSVAR([6, 3, 2], strength=0.0, cluster_scales=[], resample_scales=[0, 2])
        result = search.run(engine)
        two = BestOfN(2).run(tokens.engine())
        torch.testing.assert_close(result.images, two.images, atol=1e-4, rtol=0)
        assert torch.equal(result.seeds, two.seeds)
        assert result.cost.reward_calls.tolist() == [2.0] * PROMPTS  # nothing else is looked at
        one = TTSVAR([6, 1], strength=0.0, cluster_scales=[], resample_scales=[1])
        plain = PlainSampling().run(tokens.engine())
        torch.testing.assert_close(one.run(tokens.engine()).images, plain.images, atol=1e-4, rtol=0)

    def test_without_selections_it_is_best_of_n(self, tokens: World) -> None:
        result = TTSVAR([5], cluster_scales=[], resample_scales=[]).run(tokens.engine())
        best = BestOfN(5).run(tokens.engine())
        torch.testing.assert_close(result.images, best.images, atol=1e-4, rtol=0)
        assert torch.equal(result.seeds, best.seeds)
        assert torch.equal(result.cost.nfe, best.cost.nfe)

    @pytest.mark.parametrize("strength", [1e9, math.inf])
    @pytest.mark.parametrize("scheme", ["systematic", "multinomial", "top"])
    def test_of_great_strength_it_is_greedy(
        self, tokens: World, strength: float, scheme: Any
    ) -> None:
        reward = Spy()
        engine = tokens.engine(reward=reward)
        kept = 1 if scheme == "top" else 3  # else all copies of one
        TTSVAR(
            [6, kept], strength=strength, scheme=scheme, cluster_scales=[], resample_scales=[2]
        ).run(engine)
        values = reward.calls[0]
        best = values.view(PROMPTS, 6).amax(1).repeat_interleave(kept)
        survivors = values[engine.genealogy.generations[1].parents]
        # by value: coarse pictures may be equal
        torch.testing.assert_close(survivors, best, atol=2e-5, rtol=0)

    def test_what_lives_on_is_as_if_it_had_been_alone(self, tokens: World) -> None:
        engine, sampler = tokens.engine(), tokens.sampler
        state = engine.evaluate(engine.run(engine.start(3), until=2))
        index = torch.tensor([1, 1, 2, 3, 5, 5, 8])
        state = engine.evaluate(engine.run(engine.branch(state, index), until=3))
        seen = state.history["tokens"]
        # the same tokens in a run of their own, all memory new
        again = sampler.start(engine.model, tokens.cond.select(state.group), state.seeds)
        for begin, end in scale_spans(engine.model.scales)[:3]:
            again = sampler.commit(engine.model, again, seen[:, begin:end])
        again = sampler.evaluate(engine.model, again)
        torch.testing.assert_close(
            again.history["logits"], state.history["logits"], atol=1e-4, rtol=1e-4
        )
        torch.testing.assert_close(again.x, state.x, atol=1e-4, rtol=0)
        copies = state.history["drawn"]  # of one candidate, which part after the selection
        assert not torch.equal(copies[0], copies[1])

    @pytest.mark.parametrize("scheme", ["systematic", "multinomial", "top"])
    def test_neither_micro_batches_nor_other_prompts_matter(
        self, tokens: World, scheme: Any
    ) -> None:
        search = TTSVAR(strength=200.0, scheme=scheme, samples=2)
        whole = search.run(tokens.engine())
        parts = search.run(tokens.engine(micro_batch=5))
        torch.testing.assert_close(parts.images, whole.images, atol=1e-4, rtol=0)
        assert torch.equal(parts.lineage, whole.lineage)
        for prompt in range(PROMPTS):
            alone = search.run(tokens.engine(prompts=slice(prompt, prompt + 1)))
            torch.testing.assert_close(
                alone.images, whole.images[prompt : prompt + 1], atol=1e-4, rtol=0
            )

    def test_many_weigh_more_than_few(self, tokens: World) -> None:
        plain = PlainSampling().run(tokens.engine()).rewards["reward"]
        found = TTSVAR(strength=300.0, samples=4).run(tokens.engine())
        assert float(found.rewards["reward"].mean()) > float(plain.mean())
        sizes = found.extra["effective_size"]
        assert sizes.shape == (PROMPTS, 1)
        assert bool(((sizes >= 1) & (sizes <= 16)).all())
        assert found.extra["candidates"].tolist() == [[32, 16, 4]] * PROMPTS


class TestBudget:
    @pytest.mark.parametrize("nfe", [7, 8, 20, 41, 100])
    @pytest.mark.parametrize("samples", [1, None])
    def test_the_schedule_shrinks_into_it(self, nfe: int, samples: int | None) -> None:
        tokens = world("var")
        result = TTSVAR(samples=samples).run(tokens.engine(budget=Budget(nfe=nfe)))
        assert result.finished.all()
        assert float(result.cost.nfe.max()) <= nfe
        if nfe == 7:
            plain = PlainSampling().run(tokens.engine())
            assert torch.equal(result.images, plain.images)
            assert result.cost.reward_calls.tolist() == [1.0] * PROMPTS
        if nfe == 41:  # the whole of the published shape
            assert result.extra["candidates"].tolist() == [[8, 4, 1]] * PROMPTS
        if nfe == 100:
            begun = 8 if samples else 19
            assert int(result.extra["candidates"][0, 0]) == begun
            # one more would not have fitted
            engine = tokens.engine()
            larger = TTSVAR().schedule(engine).with_begin(20).evaluations(engine.costs)
            assert samples or larger > 100

    def test_rewards_are_part_of_it(self) -> None:
        result = TTSVAR(samples=3).run(world("var").engine(budget=Budget(reward_calls=6)))
        assert result.cost.reward_calls.tolist() == [6.0] * PROMPTS
        assert result.finished.all()

    def test_no_number_and_no_budget(self) -> None:
        with pytest.raises(ConfigError, match="search has no end"):
            TTSVAR(samples=None).run(world("var").engine())


class TestDiffusion:
    def test_steps_are_fractions_of_the_trajectory(self, engines: Any) -> None:
        search = TTSVAR([6, 3, 1], resample_scales=[0.25, 0.5])
        result = search.run(engines())
        assert result.cost.nfe.tolist() == [6.0 + 3 + 1 + 1] * 2
        assert result.cost.reward_calls.tolist() == [6.0 + 3 + 1] * 2
        schedule = TTSVAR().schedule(engines())  # nothing is clustered
        assert [s.kind for s in schedule.selections] == ["resample"]

    def test_rewards_follow_their_candidate(self, engines: Any) -> None:
        reward = Spy()
        engine = engines(prompts=1, reward=reward)
        search = TTSVAR([8, 5, 3, 1], resample_scales=[0, 1, 2], scheme="top", potential="sum")
        search.run(engine)
        totals = torch.zeros(8, dtype=torch.float64)
        for number, count in enumerate((5, 3, 1)):
            totals = totals + reward.calls[number]
            expected = totals.argsort(descending=True, stable=True)[:count].sort().values
            generation = engine.genealogy.generations[number + 1]
            assert generation.parents.tolist() == expected.tolist()
            assert torch.equal(generation.value, reward.calls[number][expected])
            totals = totals[expected]

    def test_a_resampled_law_is_the_tilted_one(self, engines: Any) -> None:
        """Mean of the survivors at the last step but one: weights proportional to exp(reward)."""
        search = TTSVAR([256, 64], resample_scales=[2], strength=8.0, cluster_scales=[])
        reward = Spy()
        engine = engines(prompts=8, reward=reward, top=64)
        search.run(engine)
        values = reward.calls[0] if len(reward.calls[0]) == 2048 else torch.cat(reward.calls[:32])
        weights = particle_weights(values.view(8, 256), 8.0)
        expected = (weights * values.view(8, 256)).sum(1)
        generation = engine.genealogy.generations[1]
        survivors = generation.value.view(8, 64).mean(1)
        # systematic resampling is off by less than a place of 64
        torch.testing.assert_close(survivors, expected, atol=0.5 / 64 * 2, rtol=0)


class TestProblems:
    def test_copies_need_noise(self, engines: Any) -> None:
        (sentence,) = TTSVAR().problems(Euler(4))
        assert "copies candidates, which stay equal" in sentence
        assert "Use search.scheme=top" in sentence
        search = TTSVAR(scheme="top")
        assert search.problems(Euler(4)) == []
        result = search.run(engines(sampler=Euler(4)))
        assert result.cost.reward_calls.tolist() == [9.0, 9.0]

    def test_ranks_are_no_weights(self) -> None:
        class Ranks(Brightness):
            potential = False

        tokens = world("var")
        (sentence,) = TTSVAR().problems(tokens.sampler, Ranks())
        assert "ranks them among each other" in sentence
        assert TTSVAR(scheme="top").problems(tokens.sampler, Ranks()) == []
        assert TTSVAR(resample_scales=[]).problems(tokens.sampler, Ranks()) == []

    def test_features_that_are_missing(self) -> None:
        from tests.search.test_diversity import Stripes

        tokens, search = world("var"), TTSVAR(features=Stripes())
        assert search.problems(tokens.sampler) == ["No weights for 'stripes'."]
        assert TTSVAR(features=Stripes(), cluster_scales=[]).problems(tokens.sampler) == []

    def test_scales_that_the_model_does_not_have(self, engines: Any) -> None:
        scales = {"cluster_scales": [1], "resample_scales": [9]}
        (sentence,) = TTSVAR(**scales).problems(world("var").sampler)  # type: ignore[arg-type]
        assert "search.resample_scales must name steps 0 to 2 of the model's 4" in sentence
        (sentence,) = TTSVAR([4, 2, 1]).problems(engines().sampler)
        assert "search.batch_schedule must have 2 numbers" in sentence
        fractions = TTSVAR([4, 1], resample_scales=[0.5], cluster_scales=[0.5])
        assert fractions.problems(world("var").sampler) == []  # it does not know resolutions
        with pytest.raises(ConfigError, match="step 1 is in both"):
            fractions.run(world("var").engine())

    def test_impossible_settings(self) -> None:
        with pytest.raises(ConfigError, match=r"search.samples must be at least 1, but is 0"):
            TTSVAR(samples=0)
        with pytest.raises(ConfigError, match=r"search.strength must not be negative, but is nan"):
            TTSVAR(strength=math.nan)
        with pytest.raises(
            ConfigError, match=r"search.scheme must be one of .* but is 'sistematic'"
        ):
            TTSVAR(scheme="sistematic")  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="topk_n with a whole number n, but is 'topk_0'"):
            TTSVAR(potential="topk_0")

    def test_protocols_tell_settings_apart(self) -> None:
        labels = {
            TTSVAR().label, TTSVAR(samples=2).label, TTSVAR(potential="max").label,
            TTSVAR([4, 2, 1]).label, TTSVAR(strength=3).label, TTSVAR(features="latent").label,
            TTSVAR(scheme="top").label, TTSVAR(cluster_scales=[1]).label,
        }  # fmt: skip
        assert len(labels) == 8
