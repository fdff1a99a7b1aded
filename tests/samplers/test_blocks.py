"""The sampler of block-causal video keeps what every sampler promises, and its own plan."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor

from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.guidance.apg import ProjectedGuidance
from genscale.guidance.cfg import ClassifierFree
from genscale.guidance.dynamic_threshold import ThresholdedView
from genscale.objectives.paths import TrigonometricVP
from genscale.samplers.base import State
from genscale.samplers.block_schedule import BlockPlan, BlockStep, block_plan
from genscale.samplers.blocks import Blocks
from genscale.samplers.ode import Euler
from genscale.samplers.sde import DDIM, ddim_law
from genscale.search.gradient import Differentiable
from tests.samplers.causal import Causal

FRAMES, BLOCK, STEPS, COUNT = 6, 2, 3, 4


def blocks(**settings: Any) -> Blocks:
    given = {"block_size": BLOCK, "trained_frames": FRAMES, **settings}
    return Blocks(given.pop("steps", STEPS), **given)


SAMPLERS = {
    "autoregressive": blocks(),
    "eta": blocks(eta=0.7),
    "pyramid": blocks(schedule="pyramid", eta=1.0),
    "pyramid-wide": blocks(schedule="pyramid", delay=1.5, precision="float64"),
    "staircase": blocks(schedule="staircase", window=4, eta=0.5),
    "full": blocks(schedule="full_sequence", eta=0.5),
    "longer": blocks(frames=10, eta=0.3),
    "history": blocks(context_noise=0.1, shift=3.0),
    "shuffled": blocks(frames=8, noise_shuffling=2),
    "raised": blocks(start_range=[0.9, 1.0], eta=0.2),
}


@pytest.fixture(params=SAMPLERS.values(), ids=SAMPLERS)
def sampler(request: pytest.FixtureRequest) -> Blocks:
    return request.param


@pytest.fixture
def model() -> Causal:
    return Causal(FRAMES, BLOCK)


def begin(sampler: Blocks, model: Any, rows: list[int] | None = None) -> State:
    rows = list(range(COUNT)) if rows is None else rows
    return sampler.start(model, Conditioning(labels=torch.tensor(rows)), torch.tensor(rows) + 100)


def end(sampler: Blocks, model: Any, state: State) -> Tensor:
    while int(state.step.min()) < sampler.num_steps:
        state = sampler.advance(model, state)
    return sampler.finish(state)


class TestConformance:
    def test_a_snapshot_continues_bit_for_bit(self, sampler: Blocks, model: Causal) -> None:
        state = begin(sampler, model)
        expected = end(sampler, model, state)
        for taken in range(sampler.num_steps):
            saved = sampler.evaluate(model, state) if taken % 2 else state
            file = io.BytesIO()
            torch.save(saved, file)
            restored = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
            assert torch.equal(end(sampler, model, restored), expected)
            state = sampler.advance(model, state)

    @pytest.mark.parametrize("evaluated", [False, True])
    def test_selected_particles_continue_bit_for_bit(
        self, sampler: Blocks, model: Causal, evaluated: bool
    ) -> None:
        whole = end(sampler, model, begin(sampler, model))
        state = begin(sampler, model)
        index = torch.tensor([2, 0, 2])
        for _ in range(sampler.num_steps - 1):
            state = sampler.advance(model, state)
            shown = sampler.evaluate(model, state) if evaluated else state
            assert torch.equal(end(sampler, model, shown.select(index)), whole[index])

    def test_a_sample_does_not_depend_on_its_batch(self, sampler: Blocks, model: Causal) -> None:
        whole = end(sampler, model, begin(sampler, model))
        for rows in ([3], [1, 0]):
            assert torch.equal(end(sampler, model, begin(sampler, model, rows)), whole[rows])

    def test_evaluating_twice_is_evaluating_once(self, sampler: Blocks, model: Causal) -> None:
        state = begin(sampler, model)
        for _ in range(sampler.num_steps):
            calls = len(model.calls)
            once = sampler.evaluate(model, state)
            assert sampler.evaluate(model, once) is once
            assert len(model.calls) == calls + 1
            # nothing is committed: a state never looked at goes the same way
            assert torch.equal(sampler.advance(model, once).x, sampler.advance(model, state).x)
            state = sampler.advance(model, state)

    def test_evaluations_are_those_announced(self, sampler: Blocks, model: Causal) -> None:
        state = begin(sampler, model)
        for i in range(sampler.num_steps):
            before, spent = len(model.calls), state.nfe.clone()
            state = sampler.advance(model, state)
            assert len(model.calls) - before == sampler.nfe(i, i + 1)
            assert (state.nfe - spent).tolist() == [sampler.nfe(i, i + 1)] * COUNT
        assert state.nfe.tolist() == [sampler.nfe(0, sampler.num_steps)] * COUNT
        with pytest.raises(ValueError, match="Steps 0 <= i <= j <="):
            sampler.nfe(0, sampler.num_steps + 1)

    def test_particles_at_different_steps_go_together(self, sampler: Blocks, model: Causal) -> None:
        whole = begin(sampler, model)
        separate = end(sampler, model, whole)
        parts = []
        for row in range(COUNT):
            part = whole.select(torch.tensor([row]))
            for _ in range(min(row + 1, sampler.num_steps)):
                part = sampler.advance(model, part)
            parts.append(part)
        mixed = State.cat(parts)
        evaluated = sampler.evaluate(model, mixed)
        assert torch.equal(end(sampler, model, evaluated), separate)
        assert torch.equal(end(sampler, model, mixed), separate)

    def test_finished_particles_cost_nothing_and_stay(self, sampler: Blocks, model: Causal) -> None:
        state = begin(sampler, model)
        done = state
        while int(done.step.min()) < sampler.num_steps:
            done = sampler.advance(model, done)
        calls = len(model.calls)
        assert sampler.advance(model, done) is done
        assert torch.equal(sampler.evaluate(model, done).clean, done.x)
        assert len(model.calls) == calls
        with pytest.raises(ValueError, match="steps left"):
            sampler.finish(state)

    def test_given_noise_replaces_the_keyed_draw(self, sampler: Blocks, model: Causal) -> None:
        state = sampler.advance(model, begin(sampler, model))
        own = sampler.advance(model, state, sampler.step_noise(model, state))
        assert torch.equal(own.x, sampler.advance(model, state).x)
        other = sampler.advance(model, state, torch.ones_like(state.x))
        assert torch.equal(other.x, own.x) != sampler.stochastic

    def test_it_knows_which_steps_draw_noise(self, sampler: Blocks, model: Causal) -> None:
        state = begin(sampler, model)
        for step in range(sampler.num_steps):
            other = sampler.advance(model, state, torch.ones_like(state.x))
            state = sampler.advance(model, state)
            assert torch.equal(other.x, state.x) != sampler.draws(step)

    def test_gradients_flow_from_the_videos_to_the_start(
        self, sampler: Blocks, model: Causal
    ) -> None:
        shape = (2, *sampler.noise_shape(model))
        noise = torch.linspace(-1, 1, 2 * sampler.frames * 4).view(shape).requires_grad_()
        x = sampler.run(model, Conditioning(), torch.arange(2), noise).x
        torch.autograd.backward(x.sum())
        assert noise.grad is not None
        assert bool((noise.grad != 0).any((0, 1, 3, 4)).all())  # of every frame


class TestWhatItDoes:
    def test_one_block_is_ddim_on_the_whole_clip(self, model: Causal) -> None:
        whole = blocks(schedule="full_sequence", steps=5, shift=2.0)
        euler = Euler(5, shift=2.0)
        state = begin(whole, model)
        noise = state.x  # sigma is 1 at the start of a flow
        plain = euler.run(model, state.cond, state.seeds, noise)
        torch.testing.assert_close(end(whole, model, state), plain.x, rtol=1e-6, atol=1e-6)

    def test_the_network_is_given_the_frames_under_way_behind_those_committed(
        self, model: Causal
    ) -> None:
        end(blocks(schedule="pyramid"), model, begin(blocks(schedule="pyramid"), model, [0]))
        #        rows, committed before, frames given: a block more each step, then one less
        plan = [(1, 0, 2), (1, 0, 4), (1, 0, 6), (1, 0, 2), (1, 2, 4), (1, 2, 2), (1, 4, 2)]
        assert model.calls == plan

    def test_every_frame_is_told_its_own_level(self, model: Causal) -> None:
        sampler = blocks(schedule="pyramid")
        end(sampler, model, begin(sampler, model, [0]))
        grid = sampler.solver.grid(model.process)
        third = model.levels[2]
        expected = grid.sigma[torch.tensor([2, 2, 1, 1, 0, 0])]
        assert torch.equal(third.sigma, expected[None])
        assert third.time is not None
        assert model.levels[3].sigma.tolist() == [0.0]  # the first block, read again

    def test_history_is_read_as_noisy_as_it_is_said_to_be(self, model: Causal) -> None:
        sampler = blocks(context_noise=0.25)
        end(sampler, model, begin(sampler, model, [0]))
        again = model.levels[STEPS]
        assert float(again.sigma) == 0.25
        assert float(again.alpha) == 0.75

    def test_the_clean_estimate_shows_the_whole_video(self, model: Causal) -> None:
        sampler = blocks()
        state = begin(sampler, model)
        for _ in range(STEPS + 1):  # the second block is under way
            state = sampler.advance(model, state)
        state = sampler.evaluate(model, state)
        assert state.clean is not None
        assert state.noise is not None
        assert torch.equal(state.clean[:, :, :2], state.x[:, :, :2])
        last = state.clean[:, :, 3]
        assert torch.equal(state.clean[:, :, 4], last)
        assert torch.equal(state.clean[:, :, 5], last)
        level = sampler.levels_at(model.process, STEPS + 1)
        alpha, sigma = level.alpha[0, 2], level.sigma[0, 2]
        middle = slice(2, 4)
        described = alpha * state.clean[:, :, middle] + sigma * state.noise[:, :, middle]
        torch.testing.assert_close(described.float(), state.x[:, :, middle])

    def test_a_longer_video_begins_as_a_shorter_one(self, model: Causal) -> None:
        short = end(blocks(eta=0.5), model, begin(blocks(eta=0.5), model))
        longer = blocks(eta=0.5, frames=60)
        video = end(longer, model, begin(longer, model))
        assert video.shape[2] == 60
        assert torch.equal(video[:, :, :FRAMES], short)
        assert float(video[:, :, 50:].std()) > 0.05

    def test_other_processes_than_flows(self) -> None:
        model = Causal(FRAMES, BLOCK, TrigonometricVP())
        sampler = blocks(schedule="pyramid", eta=0.5)
        assert bool(end(sampler, model, begin(sampler, model)).isfinite().all())

    def test_the_noise_of_a_frame_is_that_of_its_number_and_level(self, model: Causal) -> None:
        one, other = blocks(eta=1.0), blocks(schedule="pyramid", eta=1.0)
        first = one.step_noise(model, begin(one, model))
        assert torch.equal(first[:, :, 2:], torch.zeros_like(first[:, :, 2:]))
        late = begin(other, model).replace(step=torch.full((COUNT,), 2))
        together = other.step_noise(model, late)  # block 2 is where block 0 began
        own = begin(one, model).replace(step=torch.full((COUNT,), 2 * STEPS))
        assert torch.equal(together[:, :, 4:], one.step_noise(model, own)[:, :, 4:])
        assert not torch.equal(together[:, :, 4:], first[:, :, :2])

    def test_blocks_of_another_size_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="blocks have 3 frames"):
            begin(blocks(), Causal(6, 3))

    def test_as_many_seeds_as_conditions(self, model: Causal) -> None:
        with pytest.raises(ValueError, match="2 seeds were given with 3 conditions"):
            blocks().start(model, Conditioning(labels=torch.arange(3)), torch.arange(2))


class TestShuffling:
    sampler = blocks(frames=12, block_size=3, noise_shuffling=2)

    def noise(self, sampler: Blocks, count: int) -> Tensor:
        return sampler.start_noise(Causal(6, 3), torch.arange(count))

    def test_every_second_block_repeats_the_one_before_inside_windows(self) -> None:
        noise = self.noise(self.sampler, 8)
        plain = self.noise(blocks(frames=12, block_size=3), 8)
        for block in (0, 6):
            assert torch.equal(noise[:, :, block : block + 3], plain[:, :, block : block + 3])
            own, then = (noise[:, :, start : start + 3] for start in (block, block + 3))
            torch.testing.assert_close(then[:, :, :2].sum(2), own[:, :, :2].sum(2))
            assert torch.equal(then[:, :, 2], own[:, :, 2])  # alone in its window
            swapped = (then[:, :, 0] == own[:, :, 1]).flatten(1).all(1)
            assert 0 < int(swapped.sum()) < 8

    def test_each_frame_is_standard_normal_still(self) -> None:
        noise = self.noise(self.sampler, 4000)
        assert noise.mean((0, 1, 3, 4)).abs().max() < 0.04  # 16000 draws: 5 standard errors
        torch.testing.assert_close(noise.std((0, 1, 3, 4)), torch.ones(12), atol=0.03, rtol=0)


class TestGuidance:
    @pytest.mark.parametrize("schedule", ["autoregressive", "pyramid"])
    @pytest.mark.parametrize("interval", [None, [0.2, 0.8]])
    def test_every_branch_remembers_all_finished_frames(
        self, model: Causal, schedule: Any, interval: Any
    ) -> None:
        """The guided video is that of two networks which are asked apart."""
        sampler, guidance = blocks(schedule=schedule), ClassifierFree(2.0, interval=interval)
        found = end(sampler, guidance.wrap(model), begin(sampler, guidance.wrap(model)))

        class Apart(Causal):
            """Both branches by hand, whatever the interval."""

            def begin(self, batch: int, shape: tuple[int, ...]) -> Any:
                return {name: super(Apart, self).begin(batch, shape) for name in ("own", "null")}

            def __call__(self, x: Any, level: Any, cond: Any, memory: Any = None) -> Any:
                own = super().__call__(x, level, cond, memory["own"])
                other = super().__call__(x, level, cond.null(), memory["null"])
                inside = guidance.guides(level, self.process).all()
                weight = 2.0 if interval is None or bool(inside) else 1.0
                if schedule == "pyramid" and interval is not None:
                    scale = guidance.scale_at(level, self.process).to(x.dtype)
                    weight = scale.view(len(scale), 1, -1, 1, 1)
                own.clean = other.clean + weight * (own.clean - other.clean)
                own.noise = other.noise + weight * (own.noise - other.noise)
                own.memory = {"own": own.memory, "null": other.memory}
                return own

        apart = Apart(FRAMES, BLOCK)
        expected = end(sampler, apart, begin(sampler, apart))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

    def test_what_is_around_a_guided_view_hands_its_reading_on(self, model: Causal) -> None:
        sampler, guidance = blocks(), ClassifierFree(2.0, interval=[0.2, 0.8])
        plain, around = guidance.wrap(model), Differentiable(guidance.wrap(model))
        expected = end(sampler, plain, begin(sampler, plain))
        assert torch.equal(end(sampler, around, begin(sampler, around)), expected)
        bounded = ThresholdedView(guidance.wrap(model), 1.0)
        calls = len(model.calls)
        end(sampler, bounded, begin(sampler, bounded))
        # a refresh reads in both branches: one call of twice the rows
        assert [rows for rows, _, _ in model.calls[calls:]].count(2 * COUNT) >= 2

    def test_evaluations_of_both_branches_are_counted(self, model: Causal) -> None:
        sampler = blocks()
        view = ClassifierFree(2.0).wrap(model)
        state = sampler.run(view, Conditioning(labels=torch.arange(2)), torch.arange(2))
        assert state.nfe.tolist() == [2 * sampler.nfe(0, sampler.num_steps)] * 2

    def test_projected_guidance_remembers_frames_of_its_own(self, model: Causal) -> None:
        sampler = blocks(schedule="pyramid")
        view = ProjectedGuidance(2.0, momentum=-0.5).wrap(model)
        assert bool(end(sampler, view, begin(sampler, view)).isfinite().all())


class TestPlan:
    def test_a_pyramid(self) -> None:
        plan = block_plan("pyramid", 6, 3, block_size=2, delay=1.0)
        assert isinstance(plan, BlockPlan)
        assert plan.steps == (
            BlockStep(0, 2, 0, False),
            BlockStep(0, 4, 0, False),
            BlockStep(0, 6, 2, True),
            BlockStep(2, 6, 4, True),
            BlockStep(4, 6, 6, False),  # nobody will read the last block
        )
        assert plan.refreshes_before == (0, 0, 0, 1, 2, 2)
        assert plan.most_under_way == 6
        assert plan.num_frames == 6

    def test_a_short_first_block(self) -> None:
        plan = block_plan("autoregressive", 5, 2, block_size=2, independent_first_frame=True)
        assert plan.sizes == (1, 2, 2)
        assert [(step.first, step.end) for step in plan.steps[::2]] == [(0, 1), (1, 3), (3, 5)]

    def test_the_staircase_keeps_within_its_window(self) -> None:
        sampler = blocks(schedule="staircase", frames=20, steps=7, window=6)
        assert sampler.delay == 3  # 7 steps over 3 blocks
        assert sampler.plan.most_under_way == 6

    def test_evaluations_of_a_long_video(self) -> None:
        sampler = blocks(frames=60)
        assert sampler.num_steps == 30 * STEPS
        assert sampler.nfe(0, sampler.num_steps) == 30 * STEPS + 29


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "match"),
        [
            ({"schedule": "piramid"}, "Did you mean 'pyramid'"),
            ({"levels": "karas"}, "sampler.levels must be one of .* Did you mean 'karras'"),
            ({"frames": 7}, r"sampler.frames=7 cannot be made: .* multiple of 2"),
            ({"block_size": None}, "block-causal video model"),
            ({"trained_frames": None}, "block-causal video model"),
            ({"delay": 2}, "sampler.delay is of the schedules pyramid and staircase"),
            ({"schedule": "pyramid", "delay": -1}, "must not be negative"),
            ({"schedule": "staircase", "delay": 1.5}, "and whole"),
            (
                {"schedule": "staircase", "steps": 7, "window": 4, "delay": 3},
                "sampler.delay must be at least 4 .*Give sampler.delay=4, or a wider window",
            ),
            ({"window": 4}, "sampler.window is of the schedule staircase"),
            ({"context_noise": 1.0}, "sampler.context_noise must lie in"),
            ({"start_range": [0.5]}, "sampler.start_range must be"),
            ({"start_ramp": "cosin"}, "Did you mean 'cosine'"),
            ({"eta": 2.0}, "sampler.eta must lie in"),
        ],
    )
    def test_what_makes_no_sense_is_told(self, settings: dict[str, Any], match: str) -> None:
        with pytest.raises(ConfigError, match=match):
            blocks(**settings)

    def test_the_label_says_what_changes_the_samples(self) -> None:
        assert SAMPLERS["staircase"].label == (
            "Blocks(staircase, 6 frames in blocks of 2, delay 2, eta 0.5)"
        )
        assert "noise shuffled by 2" in SAMPLERS["shuffled"].label
        assert "start cosine in [0.9, 1.0]" in SAMPLERS["raised"].label
        assert "history at 0.1" in SAMPLERS["history"].label

    def test_levels_that_the_process_lacks_are_told(self) -> None:
        problems = blocks(levels="discrete").check(Causal().process, learned_variance=False)
        assert "has none" in problems[0]

    def test_steps_are_those_of_ddim(self, model: Causal) -> None:
        solver, process = DDIM(4, eta=0.6), model.process
        now, then = (solver.grid(process).select(torch.tensor([i])) for i in (1, 2))
        kept, std = ddim_law(now, then, 0.6)
        torch.testing.assert_close(kept**2 + std**2, then.sigma**2)
