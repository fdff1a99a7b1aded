"""Step caching: what is reused, when, at what cost; and that it follows its particle."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genscale.backbones.base import Backbone, BackboneOutput, register_to_config
from genscale.backbones.dimr import DiMR
from genscale.backbones.dit import DiT
from genscale.backbones.lamamba import LaMamba
from genscale.backbones.reuse import (
    eager,
    recorded,
    remaining_share,
    replaced,
    reusable_modules,
)
from genscale.backbones.uvit import UViT
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.flops import count_flops_by_module, meta_twin
from genscale.guidance.cfg import ClassifierFree
from genscale.objectives.base import Denoiser, Level, on
from genscale.objectives.flow import FlowMatching
from genscale.objectives.memory import STEP_CACHE
from genscale.samplers.adaptive import Adaptive
from genscale.samplers.base import State
from genscale.samplers.dpm_fast import DPMSolverFast
from genscale.samplers.grid import GridSampler
from genscale.samplers.ode import Euler, Heun
from genscale.samplers.runge_kutta import RungeKutta
from genscale.samplers.sde import DDIM
from genscale.samplers.step_cache import (
    FORA,
    CachedView,
    IntervalCache,
    NoStepCache,
    StepCache,
    Taylor,
)

COUNT = 4
LABELS = torch.arange(3)


class Inner(nn.Module):
    """A module of sums, products and quotients, which round alike in any batch."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.75))
        self.rows: list[int] = []  # of each run

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        return self.gain * x / (1 + x * x)


class InnerBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = Inner()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + 0.5 * self.mix(x)
        return y


class Small(Backbone):
    """A backbone that rounds alike in any batch and sees its label and its time."""

    block_classes = ("InnerBlock",)
    cached_modules = ("InnerBlock.mix",)

    @register_to_config
    def __init__(self, *, input_size: int = 2, in_channels: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(InnerBlock() for _ in range(2))

    def forward(
        self, x: Tensor, t: Tensor, cond: Conditioning, memory: Any = None
    ) -> BackboneOutput:
        shift = 0.0 if cond.labels is None else 0.125 * cond.labels.view(-1, 1, 1, 1).to(x.dtype)
        x = x + shift + on(t, x)
        for block in self.blocks:
            x = block(x)
        return BackboneOutput(sample=x)


class Given(nn.Module):
    """Puts out a polynomial of the time, whatever it is given but its shape."""

    coefficients = (1.5, -2.0, 3.0)

    def __init__(self, degree: int) -> None:
        super().__init__()
        self.degree = degree

    def forward(self, t: Tensor, like: Tensor) -> Tensor:
        powers = (self.coefficients[k] * on(t, like) ** k for k in range(self.degree + 1))
        return sum(powers, torch.zeros_like(like))


class GivenBlock(nn.Module):
    def __init__(self, degree: int) -> None:
        super().__init__()
        self.mix = Given(degree)


class Polynomial(Backbone):
    """A backbone whose only feature is a polynomial of its time."""

    cached_modules = ("GivenBlock.mix",)

    @register_to_config
    def __init__(self, *, input_size: int = 1, in_channels: int = 1, degree: int = 1) -> None:
        super().__init__()
        self.block = GivenBlock(degree)
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(
        self, x: Tensor, t: Tensor, cond: Conditioning, memory: Any = None
    ) -> BackboneOutput:
        return BackboneOutput(sample=self.weight * self.block.mix(t.double(), x))


def dit() -> Backbone:
    return DiT(
        input_size=8, in_channels=1, num_classes=3, hidden_size=16, depth=2, num_heads=2
    )  # fmt: skip


def uvit() -> Backbone:
    return UViT(input_size=8, in_channels=1, num_classes=3, hidden_size=16, depth=3, num_heads=2)


def dimr() -> Backbone:
    return DiMR(
        input_size=8,
        in_channels=1,
        num_classes=3,
        hidden_sizes=[16, 8],
        depths=[3, 1],
        num_heads=2,
        kernel_sizes=3,
    )


def lamamba() -> Backbone:
    return LaMamba(
        input_size=8,
        in_channels=1,
        num_classes=3,
        hidden_sizes=[8, 16, 32, 32],
        depths=[1, 1, 0, 0],
        bottleneck_depth=1,
        num_heads=2,
        window_size=2,
        patch_size=2,
    )


BACKBONES = {"dit": dit, "uvit": uvit, "dimr": dimr, "lamamba": lamamba}


def alive(make: Callable[[], Backbone]) -> Backbone:
    """Return a backbone with random weights everywhere, also where fresh ones are zero."""
    torch.manual_seed(0)
    backbone = make().eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return backbone


@pytest.fixture(params=BACKBONES.values(), ids=BACKBONES)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return alive(request.param)


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.no_grad():
        yield


def view_of(backbone: Backbone) -> Denoiser:
    return FlowMatching(time_input="unit").view(backbone)


def wrapped(cache: StepCache, backbone: Backbone, sampler: GridSampler) -> Denoiser:
    view = view_of(backbone)
    return cache.wrap(view, sampler.last_level(view.process))


def samples(sampler: GridSampler, view: Denoiser, labels: Tensor = LABELS) -> State:
    return sampler.run(view, Conditioning(labels=labels), labels + 100)


CACHES: dict[str, IntervalCache] = {
    "fora": FORA(2),
    "taylor": Taylor(3, order=2, warm_up=2),
    "newton": Taylor(2, order=2, warm_up=1, basis="newton"),
}
SAMPLERS: dict[str, GridSampler] = {
    "euler": Euler(7),
    "heun": Heun(6),
    "heun-churn": Heun(5, churn=1.0),
    "ddim": DDIM(7, eta=0.7, precision="float64"),
    "dpm-fast": DPMSolverFast(9),
    "rk": RungeKutta(4, method="rk4"),
    "adaptive": Adaptive(3, rtol=0.3, atol=0.1),
}


@pytest.fixture(params=CACHES.values(), ids=CACHES)
def cache(request: pytest.FixtureRequest) -> IntervalCache:
    return request.param


@pytest.fixture(params=SAMPLERS.values(), ids=SAMPLERS)
def sampler(request: pytest.FixtureRequest) -> GridSampler:
    return request.param


@pytest.fixture
def small() -> Small:
    return Small().eval()


class TestWhatIsReused:
    def test_interval_1_is_no_cache(self, backbone: Backbone) -> None:
        view = view_of(backbone)
        assert NoStepCache().wrap(view) is view
        assert FORA(1).wrap(view) is view
        assert Taylor(1).wrap(view) is view

    def test_a_whole_evaluation_is_the_networks_own(self, backbone: Backbone) -> None:
        view, x = view_of(backbone), torch.randn(3, 1, 8, 8)
        level, cond = view.process.level(0.7), Conditioning(labels=LABELS)
        out = FORA(5).wrap(view)(x, level, cond)
        assert torch.equal(out.clean, view(x, level, cond).clean)
        # never reusing is the plain sampler bit for bit
        plain = samples(Euler(4), view)
        never = samples(Euler(4), Taylor(2, warm_up=10).wrap(view))
        assert torch.equal(never.x, plain.x)
        assert never.nfe.tolist() == plain.nfe.tolist()

    def test_fora_puts_old_outputs_in_place(self, backbone: Backbone) -> None:
        # by another way: every module runs at every step, and hooks replace what it puts out
        interval, steps = 3, 8
        sampler, view = Euler(steps), view_of(backbone)
        kept: dict[str, Tensor] = {}
        now = {"step": 0}

        def hook(name: str) -> Callable[..., Tensor]:
            def replace(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
                if now["step"] % interval == 0 or now["step"] == steps - 1:
                    kept[name] = output
                return kept[name]

            return replace

        words = {"attention", "mlp", "scan", "conv"}
        handles = [
            module.register_forward_hook(hook(name))
            for name, module in backbone.named_modules()
            if name.split(".")[-1] in words and "Block" in type(_parent(backbone, name)).__name__
        ]
        state = sampler.start(view, Conditioning(labels=LABELS), LABELS + 100)
        for step in range(steps):
            now["step"] = step
            state = sampler.advance(view, state)
        for handle in handles:
            handle.remove()
        assert len(handles) == len(reusable_modules(backbone))

        cached = samples(sampler, wrapped(FORA(interval), backbone, sampler))
        torch.testing.assert_close(cached.x, state.x, rtol=1e-6, atol=1e-6)
        assert float((cached.x - samples(sampler, view).x).abs().max()) > 1e-4

    def test_forecasts_are_nearer_than_reuse(self, backbone: Backbone) -> None:
        sampler = Euler(16)
        exact = samples(sampler, view_of(backbone)).x
        caches = (FORA(3), Taylor(3, order=1, warm_up=1), Taylor(3, order=2, basis="newton"))
        errors = [
            float((samples(sampler, wrapped(c, backbone, sampler)).x - exact).norm())
            for c in caches
        ]
        assert errors[1] < 0.5 * errors[0]
        assert errors[2] < errors[1]

    def test_half_precision_keeps_half_precision_features(self) -> None:
        backbone = alive(dit)
        view, x = view_of(backbone), torch.randn(3, 1, 8, 8)
        cached, cond = Taylor(2, warm_up=1).wrap(view), Conditioning(labels=LABELS)
        memory, levels = None, [view.process.level(t) for t in (0.9, 0.8, 0.7, 0.6)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for level in levels:
                out = cached(x, level, cond, memory)
                memory = out.memory
        kept = memory[STEP_CACHE]["features"]["blocks.0.mlp"]
        assert [feature.dtype for feature in kept] == [torch.bfloat16] * 2
        exact = view(x, levels[-1], cond).clean
        assert 0 < float((out.clean - exact).abs().max()) < 0.1


def _parent(backbone: Backbone, name: str) -> nn.Module:
    return backbone.get_submodule(name.rpartition(".")[0])


class TestForecasts:
    """Features that are polynomials of the time, on even and uneven grids."""

    def errors(self, cache: IntervalCache, degree: int, times: list[float]) -> list[float]:
        torch.manual_seed(0)
        backbone = Polynomial(degree=degree).eval()
        view = view_of(backbone)
        cached, x, memory = cache.wrap(view), torch.zeros(1, 1, 1, 1, dtype=torch.float64), None
        found = []
        for t in times:
            level = view.process.level(t)
            out = cached(x, level, Conditioning(), memory)
            found.append(float(out.clean - view(x, level, Conditioning()).clean) / -t)
            memory = out.memory
        return found

    EVEN = [1.0 - 0.0625 * i for i in range(12)]
    UNEVEN = [1.0, 0.97, 0.9, 0.82, 0.81, 0.7, 0.55, 0.5, 0.4, 0.28, 0.2, 0.15]

    @pytest.mark.parametrize("basis", ["taylor", "newton"])
    @pytest.mark.parametrize("times", [EVEN, UNEVEN], ids=["even", "uneven"])
    @pytest.mark.parametrize("degree", [0, 1])
    def test_lines_are_exact(self, basis: Any, times: list[float], degree: int) -> None:
        errors = self.errors(Taylor(3, order=1, warm_up=2, basis=basis), degree, times)
        assert errors == pytest.approx([0.0] * 12, abs=1e-6)  # the time is fed in float32

    @pytest.mark.parametrize("times", [EVEN, UNEVEN], ids=["even", "uneven"])
    def test_newton_is_exact_up_to_its_order(self, times: list[float]) -> None:
        errors = self.errors(Taylor(3, order=2, warm_up=3, basis="newton"), 2, times)
        assert errors == pytest.approx([0.0] * 12, abs=1e-5)

    def test_taylor_misses_the_square_by_its_difference(self) -> None:
        # of a t^2, at distance d from the last whole step, steps N apart: F_1 = 2 a t + a N
        # (backwards in time), one half of which times d is in no other term, so a N d is lacking
        errors = self.errors(Taylor(3, order=2, warm_up=1), 2, self.EVEN)
        step, a = -0.0625, Given.coefficients[2]
        expected = {7: -a * 3 * step * step, 8: -a * 3 * step * 2 * step, 9: 0.0}
        for i, error in expected.items():
            assert errors[i] == pytest.approx(error, abs=1e-5)

    def test_constants_are_all_that_fora_gets_right(self) -> None:
        assert self.errors(FORA(3), 0, self.EVEN) == pytest.approx([0.0] * 12, abs=1e-6)
        errors = self.errors(FORA(3), 1, self.EVEN)
        slope, step = Given.coefficients[1], -0.0625
        assert errors[:4] == pytest.approx([0.0, -slope * step, -slope * 2 * step, 0.0], abs=1e-6)


class TestRhythm:
    def whole(self, cache: StepCache, sampler: GridSampler, small: Small) -> list[bool]:
        """Return which evaluations of one sample ran the inner module."""
        view, model = wrapped(cache, small, sampler), small.blocks[0].mix
        found = []

        class Listening(Denoiser):
            process, sample_shape, device = view.process, view.sample_shape, view.device

            def __call__(self, *args: Any) -> Any:
                before = len(model.rows)
                out = view(*args)
                found.append(len(model.rows) > before)
                return out

        samples(sampler, Listening(), torch.tensor([0]))
        return found

    def test_every_third_and_the_last(self, small: Small) -> None:
        expected = [True, False, False, True, False, False, True, True]
        assert self.whole(FORA(3), Euler(8), small) == expected

    def test_warm_up_comes_first(self, small: Small) -> None:
        expected = [True, True, False, False, True, False, False, True]
        assert self.whole(Taylor(3, warm_up=2), Euler(8), small) == expected

    def test_without_a_last_level_the_last_is_as_any_other(self, small: Small) -> None:
        view = FORA(3).wrap(view_of(small))
        samples(Euler(8), view)
        assert len(small.blocks[0].mix.rows) == 3

    def test_heuns_corrector_goes_with_the_step_it_leads_to(self, small: Small) -> None:
        # steps 0 to 5: predictor and corrector; the last has one evaluation
        whole = self.whole(FORA(2), Heun(6), small)
        steps = [True, False, True, False, True, True]
        assert whole[0::2] == steps
        assert whole[1::2] == steps[1:]

    def test_the_last_step_of_a_multi_stage_solver_is_whole(self, small: Small) -> None:
        sampler = DPMSolverFast(6, order=3)  # steps of 3, 2 and 1 evaluations
        assert self.whole(FORA(7), sampler, small) == [True] + [False] * 4 + [True]


class TestParticles:
    """The contract of states, with features in the memory."""

    def view(self, cache: StepCache, sampler: GridSampler, small: Small) -> Denoiser:
        return wrapped(cache, small, sampler)

    def start(self, sampler: GridSampler, view: Denoiser, rows: list[int]) -> State:
        labels = torch.tensor(rows)
        return sampler.start(view, Conditioning(labels=labels), labels + 100)

    def finish(self, sampler: GridSampler, view: Denoiser, state: State) -> State:
        while int(state.step.min()) < sampler.num_steps:
            state = sampler.advance(view, state)
        return state

    def test_a_snapshot_continues_bit_for_bit(
        self, cache: IntervalCache, sampler: GridSampler, small: Small
    ) -> None:
        view = self.view(cache, sampler, small)
        state = self.start(sampler, view, [0, 1])
        expected = self.finish(sampler, view, state)
        for taken in range(sampler.num_steps):
            saved = sampler.evaluate(view, state) if taken % 2 else state
            file = io.BytesIO()
            torch.save(saved, file)
            restored = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
            # a view made anew knows as much: all there is to know is in the state
            again = self.view(cache, sampler, small)
            done = self.finish(sampler, again, restored)
            assert torch.equal(done.x, expected.x)
            assert torch.equal(done.nfe, expected.nfe)
            state = sampler.advance(view, state)

    def test_select_join_and_batch_size_change_nothing(
        self, cache: IntervalCache, sampler: GridSampler, small: Small
    ) -> None:
        view = self.view(cache, sampler, small)
        whole = self.finish(sampler, view, self.start(sampler, view, [0, 1, 2, 3]))
        for rows in ([3], [1, 0]):
            part = self.finish(sampler, view, self.start(sampler, view, rows))
            assert torch.equal(part.x, whole.x[rows])
            assert torch.equal(part.nfe, whole.nfe[rows])
        state = sampler.advance(view, self.start(sampler, view, [0, 1, 2, 3]))
        state = sampler.evaluate(view, state)
        index = torch.tensor([2, 0, 2])
        picked = self.finish(sampler, view, state.select(index))
        assert torch.equal(picked.x, whole.x[index])
        joined = State.cat([state.select(torch.tensor([1, 3])), state.select(torch.tensor([0]))])
        assert torch.equal(self.finish(sampler, view, joined).x, whole.x[[1, 3, 0]])

    def test_particles_at_different_steps_go_together(
        self, cache: IntervalCache, sampler: GridSampler, small: Small
    ) -> None:
        view = self.view(cache, sampler, small)
        begun = self.start(sampler, view, list(range(COUNT)))
        separate = self.finish(sampler, view, begun)
        parts = []
        for row in range(COUNT):  # the first has not begun, and so remembers nothing
            part = begun.select(torch.tensor([row]))
            for _ in range(min(row, sampler.num_steps)):
                part = sampler.advance(view, part)
            parts.append(part)
        mixed = State.cat(parts)
        evaluated = sampler.evaluate(view, mixed)
        for state in (mixed, evaluated, mixed.select(torch.tensor([3, 2, 1, 0]))):
            done = self.finish(sampler, view, state)
            order = done.seeds - 100
            assert torch.equal(done.x, separate.x[order])
            assert torch.equal(done.nfe, separate.nfe[order])

    def test_evaluating_commits_nothing(
        self, cache: IntervalCache, sampler: GridSampler, small: Small
    ) -> None:
        view = self.view(cache, sampler, small)
        state = sampler.advance(view, self.start(sampler, view, [0, 1]))
        memory = state.memory[STEP_CACHE]
        before = memory["evaluations"].clone()
        looked = sampler.evaluate(view, state)
        assert looked.memory is state.memory
        assert torch.equal(memory["evaluations"], before)
        asked = 0 if isinstance(sampler, Adaptive) else 1  # which knows where it arrived
        assert torch.equal(looked.pending[STEP_CACHE]["evaluations"], before + asked)
        one, other = (self.finish(sampler, view, each) for each in (state, looked))
        assert torch.equal(one.x, other.x)

    def test_rows_that_reuse_are_forwarded_apart(self, small: Small) -> None:
        sampler, inner = Euler(8), small.blocks[0].mix
        view = self.view(FORA(2), sampler, small)
        begun = self.start(sampler, view, [0, 1, 2])
        ahead = sampler.advance(view, begun.select(torch.tensor([1])))
        mixed = State.cat([begun.select(torch.tensor([0, 2])), ahead])
        inner.rows.clear()
        out = sampler.evaluate(view, mixed)
        assert inner.rows == [2]  # the two that begin; the third reuses
        assert out.pending[STEP_CACHE]["evaluations"].tolist() == [1, 1, 2]
        assert out.pending[STEP_CACHE]["known"].tolist() == [1, 1, 1]

    def test_going_back_drops_the_features_of_those_that_move(
        self, cache: IntervalCache, small: Small
    ) -> None:
        sampler = Euler(7)
        view = self.view(cache, sampler, small)
        state = self.start(sampler, view, [0, 1])
        for _ in range(5):
            state = sampler.advance(view, state)
        back = sampler.renoise(state, torch.tensor([4, 5]))
        assert back.memory[STEP_CACHE]["evaluations"].tolist() == [0, 5]
        # the one that stays goes on as ever, the other as one that begins where it was sent
        done = self.finish(sampler, view, back)
        stayed = self.finish(sampler, view, state)
        assert torch.equal(done.x[1], stayed.x[1])
        alone = back.select(torch.tensor([0])).replace(memory=None)
        fresh = self.finish(sampler, view, alone)
        assert torch.equal(done.x[:1], fresh.x)
        assert torch.equal(done.nfe[:1], fresh.nfe)

    def test_a_level_that_is_no_less_noisy_begins_anew(self, small: Small) -> None:
        view = view_of(small)
        cached, x = FORA(4).wrap(view), torch.randn(2, 3, 2, 2)
        first = cached(x, view.process.level(0.5), Conditioning())
        for t, reused in ((0.4, True), (0.5, False), (0.6, False)):
            level = view.process.level(t)
            out = cached(2 * x, level, Conditioning(), first.memory)
            assert torch.equal(out.clean, view(2 * x, level, Conditioning()).clean) is not reused
            assert out.memory[STEP_CACHE]["evaluations"].tolist() == [2 if reused else 1] * 2

    def test_changed_particles_are_forgotten(self, small: Small) -> None:
        sampler = Euler(7)
        view = self.view(FORA(3), sampler, small)
        state = sampler.advance(view, self.start(sampler, view, [0, 1]))
        changed = sampler.forget(state.replace(x=state.x + 1))
        level = sampler.grid(view.process).select(torch.tensor([1]))
        expected = view_of(small)(changed.x, level, changed.cond).clean
        assert torch.equal(sampler.evaluate(view, changed).clean, expected)


class TestGuidance:
    @pytest.mark.parametrize("interval", [None, [0.3, 0.8]])
    def test_each_branch_has_a_cache_of_its_own(
        self, cache: IntervalCache, small: Small, interval: list[float] | None
    ) -> None:
        sampler = Euler(9)
        guidance = ClassifierFree(2.0, interval=interval)
        view = guidance.wrap(wrapped(cache, small, sampler))
        state = sampler.start(view, Conditioning(labels=LABELS), LABELS + 100)
        memories: list[Any] = [None, None]
        plain = wrapped(cache, small, sampler)
        for i in range(sampler.num_steps):
            state = sampler.evaluate(view, state)
            level = sampler.grid(view.process).select(torch.tensor([i]))
            own = plain(state.x, level, state.cond, memories[0])
            memories[0], clean = own.memory, own.clean
            if bool(guidance.guides(level, view.process)):
                null = plain(state.x, level, state.cond.null(), memories[1])
                memories[1], clean = null.memory, null.clean + 2.0 * (own.clean - null.clean)
            assert torch.equal(state.clean, clean)
            state = sampler.advance(view, state)

    def test_mixed_steps_with_a_branch_that_begins_later(self, cache: IntervalCache) -> None:
        small, sampler = Small().eval(), Euler(8)
        view = ClassifierFree(2.0, interval=[0.2, 0.7]).wrap(wrapped(cache, small, sampler))
        labels = torch.arange(COUNT)
        begun = sampler.start(view, Conditioning(labels=labels), labels + 100)
        separate, state = begun, begun
        for _ in range(sampler.num_steps):
            separate = sampler.advance(view, separate)
        parts = []
        for row, steps in enumerate((0, 2, 4, 7)):  # before, at, inside and after the interval
            part = begun.select(torch.tensor([row]))
            for _ in range(steps):
                part = sampler.advance(view, part)
            parts.append(part)
        state = State.cat(parts)
        while int(state.step.min()) < sampler.num_steps:
            state = sampler.advance(view, state)
        assert torch.equal(state.x, separate.x)
        assert torch.equal(state.nfe, separate.nfe)

    def test_guidance_goes_around_the_cache(self, small: Small) -> None:
        guided = ClassifierFree(2.0).wrap(view_of(small))
        with pytest.raises(ConfigError, match=r"but a \w+View was given"):
            FORA(2).wrap(guided)


class TestCost:
    def test_a_reused_evaluation_costs_what_it_runs(self, backbone: Backbone) -> None:
        counts = count_flops_by_module(backbone, backbone.sample_shape)
        cached = sum(counts[name] for name in reusable_modules(backbone))
        share = 1 - cached / counts[""]
        assert 0.02 < share < 0.4
        assert remaining_share(backbone, backbone.sample_shape) == pytest.approx(share)
        sampler = Euler(8)
        state = samples(sampler, wrapped(FORA(3), backbone, sampler))
        assert state.nfe.tolist() == pytest.approx([4 + 4 * share] * 3)  # 0, 3, 6, and the last

    def test_it_counts_what_is_left_itself(self, backbone: Backbone) -> None:
        # the same by running the rest: modules answered for do not count their operations
        from torch.utils.flop_counter import FlopCounterMode

        twin = meta_twin(backbone)
        with torch.device("meta"):
            x, t, labels = torch.empty(1, 1, 8, 8), torch.empty(1), torch.zeros(1).long()
        cond, modules = Conditioning(labels=labels), reusable_modules(twin)
        counters = [FlopCounterMode(display=False) for _ in range(2)]
        with counters[0], recorded(modules) as outputs:
            twin(x, t, cond)
        with counters[1], replaced(modules, outputs.__getitem__):
            twin(x, t, cond)
        left, total = (counters[i].get_total_flops() for i in (1, 0))
        assert remaining_share(backbone, (1, 8, 8)) == pytest.approx(left / total, rel=1e-6)

    def test_where_nothing_is_counted_all_is_left(self, small: Small) -> None:
        assert remaining_share(small, small.sample_shape) == 1.0


class TestModules:
    def test_they_are_as_before_whatever_happens(self, small: Small) -> None:
        modules = reusable_modules(small)
        assert list(modules) == ["blocks.0.mix", "blocks.1.mix"]
        before = [dict(module.__dict__) for module in small.modules()]
        for context in (recorded(modules), replaced(modules, lambda name: torch.zeros(1))):
            with pytest.raises(KeyError), context:
                raise KeyError
        assert [module.__dict__ for module in small.modules()] == before

    def test_a_forward_of_the_users_own_is_kept(self, small: Small) -> None:
        modules = reusable_modules(small)
        own = modules["blocks.0.mix"].forward = lambda x: x  # type: ignore[method-assign]
        with recorded(modules):
            pass
        assert modules["blocks.0.mix"].forward is own

    def test_blocks_compiled_in_place_run_as_written(self, small: Small) -> None:
        called = []
        block = small.blocks[0]
        block.compile(backend=lambda graph, inputs: called.append(1) or graph.forward)
        expected = samples(Euler(6), wrapped(FORA(2), Small().eval(), Euler(6)))
        found = samples(Euler(6), wrapped(FORA(2), small, Euler(6)))
        assert torch.equal(found.x, expected.x)
        assert called == []
        compiled = block._compiled_call_impl
        with eager(small):
            assert block._compiled_call_impl is None
        assert block._compiled_call_impl is compiled

    def test_wrapped_blocks_are_refused(self, small: Small) -> None:
        small.blocks[0] = torch.compile(small.blocks[0])
        with pytest.raises(ConfigError, match=r"torch\.compile has wrapped modules"):
            FORA(2).wrap(view_of(small))

    def test_a_backbone_that_names_nothing_is_refused(
        self, small: Small, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Small, "cached_modules", ())
        with pytest.raises(ConfigError, match=r"but Small names none\. Use step_cache=none"):
            FORA(2).wrap(view_of(small))
        monkeypatch.setattr(Small, "cached_modules", ("Other.mix",))
        with pytest.raises(ConfigError, match=r"but Small has none of Other\.mix"):
            FORA(2).wrap(view_of(small))

    def test_modules_that_run_twice_or_mix_rows_are_refused(self, small: Small) -> None:
        small.blocks[1].mix = small.blocks[0].mix
        x, cond = torch.randn(2, 3, 2, 2), Conditioning()
        view = view_of(small)
        with pytest.raises(ValueError, match=r"mix ran twice"):
            FORA(2).wrap(view)(x, view.process.level(0.5), cond)
        small = Small().eval()
        small.blocks[0].mix.forward = lambda x: x.mean(0, keepdim=True)
        view = view_of(small)
        with pytest.raises(ValueError, match=r"blocks\.0\.mix put out 1 rows for 2 samples"):
            FORA(2).wrap(view)(x, view.process.level(0.5), cond)

    def test_recomputed_blocks_are_refused_where_gradients_are_wanted(self) -> None:
        backbone = alive(dit)
        backbone.gradient_checkpointing = True  # type: ignore[assignment]
        view, x = view_of(backbone), torch.randn(3, 1, 8, 8)
        cached, cond = FORA(2).wrap(view), Conditioning(labels=LABELS)
        assert isinstance(cached, CachedView)
        cached(x, view.process.level(0.5), cond)
        with torch.enable_grad(), pytest.raises(ValueError, match="recomputes blocks"):
            cached(x, view.process.level(0.5), cond)


def test_gradients_flow_through_reused_features() -> None:
    backbone, sampler = alive(dit), Euler(4)
    view = wrapped(Taylor(2, warm_up=1), backbone, sampler)
    with torch.enable_grad():
        noise = torch.ones(2, 1, 8, 8, requires_grad=True)
        state = sampler.run(view, Conditioning(labels=LABELS[:2]), LABELS[:2], noise)
        (gradient,) = torch.autograd.grad(state.x.sum(), noise)
    step = 1e-2
    ends = [
        float(
            sampler.run(view, Conditioning(labels=LABELS[:2]), LABELS[:2], start).x.double().sum()
        )
        for start in (torch.ones(2, 1, 8, 8) + step, torch.ones(2, 1, 8, 8) - step)
    ]
    assert float(gradient.sum()) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FORA(0), r"step_cache\.interval must be a whole number of at least 1, but is 0"),
        (lambda: Taylor(2.5), r"step_cache\.interval .* but is 2\.5"),  # type: ignore[arg-type]
        (lambda: Taylor(2, order=0), r"step_cache\.order must be at least 1, but is 0"),
        (lambda: Taylor(2, warm_up=0), r"step_cache\.warm_up must be a whole number of at least 1"),
        (lambda: Taylor(2, basis="tailor"), r"but is 'tailor'\. Did you mean 'taylor'\?"),  # type: ignore[arg-type]
    ],
)
def test_impossible_settings_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_labels_tell_the_settings() -> None:
    assert NoStepCache().label == "none"
    assert FORA(3).label == "fora(interval=3)"
    assert Taylor().label == "taylor(interval=4, order=1, warm_up=3)"
    assert Taylor(basis="newton").label.startswith("newton(")


def test_the_last_level_is_where_the_last_step_begins() -> None:
    process = FlowMatching().process
    assert float(Euler(4).last_level(process).sigma) == pytest.approx(0.25)
    level: Level = DPMSolverFast(6, order=3).last_level(process)  # steps of 3, 2, 1
    grid = DPMSolverFast(6, order=3).grid(process)
    assert float(level.sigma) == float(grid.sigma[5])
