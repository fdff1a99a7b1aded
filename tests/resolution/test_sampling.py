"""Sampling at other sizes: runs, cascades, and what every preset owes its caller."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from genscale.backbones.dit import DiT
from genscale.backbones.fit import FIT
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.guidance.cfg import ClassifierFree
from genscale.objectives.base import Denoiser, Level, Prediction
from genscale.objectives.ddpm import DDPM
from genscale.objectives.edm import EDM
from genscale.objectives.flow import FlowMatching
from genscale.objectives.schedule import DiscreteVP, LinearFlow
from genscale.resolution import (
    EntropyAttention,
    Projection,
    ResolutionOp,
    WindowFusion,
    apply_resolution,
    preset_named,
    sample_scaled,
)
from genscale.resolution.cascades import SDEdit
from genscale.resolution.local_global import LocalGlobal, carried_over
from genscale.resolution.presets import presets
from genscale.resolution.sampling import (
    Scaled,
    bicubic,
    cascade_sides,
    sampler_refusal,
    scaled_guidance,
    shifted_sampler,
    size_step,
    start_step,
)
from genscale.resolution.scaled_view import RunLevels, ScaledGuidance, ScaledView, flow_time
from genscale.resolution.swin_patches import SwinPatches
from genscale.samplers.blocks import Blocks
from genscale.samplers.diffusers_bridge import DiffusersSampler
from genscale.samplers.multistep import DPMSolverMultistep
from genscale.samplers.ode import Euler, Heun
from genscale.samplers.schedules import Karras
from genscale.samplers.sde import DDIM

SEEDS = torch.tensor([5, 6])
BLOCKS = Blocks(2, block_size=1, trained_frames=3)
COND = Conditioning(
    labels=torch.tensor([0, 1]),
    text=torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1)),
    text_mask=torch.ones(2, 4, dtype=torch.bool),
)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model() -> DiT:
    torch.manual_seed(0)
    model = DiT(
        input_size=8, in_channels=2, num_classes=3, hidden_size=16, depth=2, num_heads=2,
        text_size=6, num_text_tokens=4,
    ).eval()  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def sample(model: Any, preset: Any, solver: Any, target=(16, 12), rows=slice(None), **settings):
    objective = settings.pop("objective", FlowMatching(time_input="unit"))
    guided = ClassifierFree(2.0)
    channels = model.sample_shape[0]
    return sample_scaled(
        solver,
        lambda sides: guided.wrap(objective.view(model, shape=(channels, *sides))),
        COND.select(torch.arange(2)[rows]),
        SEEDS[rows],
        model=model,
        native=(8, 8),
        target=target,
        preset=preset_named(preset) if isinstance(preset, str) else preset,
        images=lambda latents: latents,
        **settings,
    )


# evaluations of 4 steps at 16 x 12 cells of a network of 8 x 8 cells, guidance counted twice
EVALUATIONS = {
    "none": 8,
    "entropy": 8,
    "multidiffusion": 6 * 8,  # 3 x 2 windows
    "sdedit": 8 + 2,
    "demofusion": 8 + 8 * (6 + 4),  # windows and 2 x 2 interleaved samples
    "accdiffusion": 8 + 8 * (6 + 4),
    "lsrna": 8 + 4 * (6 + 4),
    "freescale": 8 + 6,
    "imax": 16,
    "hiflow": 8 + 4,
    "c_upscale": 8 + 4 * 6,
    "hidiffusion": 8,
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_a_sample_is_of_the_size_and_of_its_seed_alone(model: DiT, name: str) -> None:
    both = sample(model, name, Euler(4))
    assert isinstance(both, Scaled)
    assert both.latents.shape == (2, 2, 16, 12)
    assert both.nfe.tolist() == [EVALUATIONS[name]] * 2
    one = sample(model, name, Euler(4), rows=slice(1, 2))
    torch.testing.assert_close(one.latents[0], both.latents[1], atol=2e-5, rtol=1e-4)
    # the model is as it was
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("solver", "objective"),
    [(DDIM(3, eta=0.5), DDPM()), (DPMSolverMultistep(3), DDPM()), (Heun(2), EDM())],
    ids=["ddim", "dpmpp_2m", "heun"],
)
def test_cascades_serve_any_objective_and_sampler(model: DiT, solver: Any, objective: Any) -> None:
    for name in ("demofusion", "hiflow"):
        latents = sample(model, name, solver, objective=objective).latents
        assert latents.isfinite().all()


def test_a_run_at_the_wanted_size_is_the_samplers_own(model: DiT) -> None:
    objective, solver = FlowMatching(time_input="unit"), Euler(3)
    view = ClassifierFree(2.0).wrap(objective.view(model, shape=(2, 16, 12)))
    with apply_resolution(model, [EntropyAttention()], native=(8, 8), target=(16, 12)):
        state = solver.run(view, COND, SEEDS)
    assert torch.equal(sample(model, "entropy", solver).latents, state.x)


@pytest.mark.parametrize("name", ["sdedit", "demofusion", "imax", "hiflow"])
def test_at_the_trained_size_a_cascade_is_the_plain_sample(model: DiT, name: str) -> None:
    plain = sample(model, "none", Euler(3), target=(8, 8))
    got = sample(model, name, Euler(3), target=(8, 8))
    assert torch.equal(got.latents, plain.latents)
    assert torch.equal(got.nfe, plain.nfe)


def test_a_preset_of_no_strength_returns_nearly_the_enlarged_sample(model: DiT) -> None:
    small = sample(model, "none", Euler(20), target=(8, 8)).latents
    large = sample(model, SDEdit(strength=0.05), Euler(20), target=(16, 16)).latents
    # the last of 20 steps begins at sigma 0.05
    assert (large - bicubic(small, (16, 16))).abs().max() < 0.5
    given = sample(
        model, SDEdit(strength=0.05), Euler(20), target=(16, 16),
        enlarge=lambda latents, sides: bicubic(latents, sides) + 10,
    ).latents  # fmt: skip
    assert (given - large).mean() > 9


def test_clips_are_scaled_frame_by_frame() -> None:
    network = FIT(
        input_size=[2, 8, 8], in_channels=1, patch_size=[1, 2, 2], group_size=[2, 2, 2],
        patch_width=16, latent_width=16, context_width=16, num_latents=16, depth=1,
        global_depth=1, patch_head_size=8, latent_head_size=8,
    ).eval()  # fmt: skip
    objective = EDM()

    def view_at(sides: tuple[int, int]) -> Denoiser:
        return objective.view(network, shape=(1, 2, *sides))

    run = partial(sample_scaled, Euler(3), view_at, Conditioning(), SEEDS, model=network)
    for name in ("demofusion", "hiflow"):
        got = run(native=(8, 8), target=(16, 16), preset=preset_named(name)).latents
        assert got.shape == (2, 1, 2, 16, 16)
        assert got.isfinite().all()
    # 16 latents cannot be shared out among the 9 groups of the first size on the way
    with pytest.raises(ConfigError, match="on the way to the size asked for"):
        run(native=(8, 8), target=(24, 24), preset=preset_named("sdedit"))


class Cellwise(Denoiser):
    """Says of every cell what depends on it alone."""

    def __init__(self, process: Any, shape: tuple[int, ...]) -> None:
        self.process, self.sample_shape, self.device = process, shape, torch.device("cpu")

    def __call__(self, x: Tensor, level: Level, cond: Any, memory: Any = None) -> Prediction:
        cost = torch.ones(len(x), dtype=torch.float64)
        clean = 0.5 * x.tanh()
        noise = (x - float(level.alpha) * clean) / float(level.sigma)
        return Prediction(clean, noise, None, cost)


@pytest.mark.parametrize("process", [LinearFlow(), DiscreteVP()])
def test_windows_and_interleaved_samples_of_a_cellwise_view_are_the_view(process: Any) -> None:
    view, x = Cellwise(process, (2, 15, 12)), torch.randn(2, 2, 15, 12)
    levels = RunLevels(process, Euler(4).levels(process))
    op = LocalGlobal(sigma=1e-3, jitter=1, interact=True, unit=(2, 2))  # a blur of nothing
    op.prepare(None, (8, 8), (15, 12), levels)
    level = levels.levels.select(torch.tensor([1]))
    got = ScaledView(view, [op], levels)(x, level, Conditioning())
    plain = view(x, level, Conditioning())
    torch.testing.assert_close(got.clean, plain.clean)
    torch.testing.assert_close(got.noise, plain.noise)
    assert got.cost.tolist() == [4 + 6] * 2  # 2 x 2 interleaved samples, 3 x 2 windows


def test_what_is_carried_over_agrees_with_its_level() -> None:
    clean, noise, x = (torch.randn(1, 1, 4, 4) for _ in range(3))
    for process in (LinearFlow(), DiscreteVP()):
        level = process.level(0.4)
        alpha, sigma = float(level.alpha), float(level.sigma)
        seen = alpha * clean + sigma * noise
        there = carried_over(clean, noise, seen, x, level)
        torch.testing.assert_close(alpha * there[0] + sigma * there[1], x)
        kept = there[1] - there[0] if isinstance(process, LinearFlow) else there[1]
        torch.testing.assert_close(
            kept, noise - clean if isinstance(process, LinearFlow) else noise
        )


def test_a_changed_estimate_takes_the_noise_along() -> None:
    process = DiscreteVP()
    view, x, guide = Cellwise(process, (1, 4, 4)), torch.randn(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)
    levels = RunLevels(process, Euler(4).levels(process))
    level = levels.levels.select(torch.tensor([2]))
    scaled = ScaledGuidance(ClassifierFree(1.0), [Projection(guide, 4)], levels).wrap(view)
    got = scaled(x, level, Conditioning())
    plain = view(x, level, Conditioning())
    moved = got.clean - plain.clean
    assert moved.abs().max() > 0.1
    torch.testing.assert_close(
        float(level.alpha) * moved + float(level.sigma) * (got.noise - plain.noise),
        torch.zeros_like(x), atol=1e-6, rtol=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match="one time for all samples"):
        scaled(x, levels.levels.select(torch.tensor([1, 2])), Conditioning())


def test_steps_and_times_are_read_off_levels() -> None:
    process = DiscreteVP()
    grid = Euler(5).levels(process)
    levels = RunLevels(process, grid, first=2)
    assert [levels.step_of(grid.select(torch.tensor([i]))) for i in range(5)] == [-2, -1, 0, 1, 2]
    for i in range(5):
        level = grid.select(torch.tensor([i]))
        time = float(flow_time(level))
        assert levels.share(time) == pytest.approx(1 - i / 5, abs=1e-6)
        ratio = levels(time)[1] / levels(time)[0]
        assert ratio == pytest.approx(float(level.sigma / level.alpha), rel=1e-6)


def test_sizes_of_a_cascade() -> None:
    assert cascade_sides((8, 8), (8, 8)) == []
    assert cascade_sides((8, 8), (16, 12)) == [(16, 12)]
    assert cascade_sides((8, 8), (32, 32)) == [(16, 16), (24, 24), (32, 32)]
    assert cascade_sides((8, 8), (32, 32), doubling=True) == [(16, 16), (32, 32)]
    assert cascade_sides((8, 8), (20, 20), (2, 2)) == [(14, 14), (20, 20)]
    assert [start_step(30, s) for s in (1.0, 0.5, 0.0)] == [0, 15, 29]


def test_patches_move_on_even_steps() -> None:
    seen: list[tuple[int, ...]] = []

    def call(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return 2 * x

    op, x = SwinPatches((2, 4)), torch.randn(1, 1, 8, 8)
    for step in range(2):
        op.pre_step(x, 1.0, step)
        out = op.wrap_model(call)(x)
        torch.testing.assert_close(out if isinstance(out, Tensor) else out.sample, 2 * x)
    assert seen == [(1, 1, 10, 12), (1, 1, 8, 8)]
    assert SwinPatches((1, 1)).wrap_model(call) is call


def test_time_grids_move_where_they_are_linear() -> None:
    process = LinearFlow()
    moved = shifted_sampler(Euler(4, shift=2.0), 3.0).levels(process)
    assert torch.equal(moved.sigma, Euler(4, shift=6.0).levels(process).sigma)
    other = Euler(4, schedule=Karras(0.1, 10.0))
    assert shifted_sampler(other, 3.0) is other


def test_searches_take_presets_of_one_run(model: DiT) -> None:
    objective, solver = FlowMatching(time_input="unit"), Euler(2)
    view = objective.view(model, shape=(2, 16, 12))
    sizes = {"model": model, "native": (8, 8), "target": (16, 12)}
    plain = ClassifierFree(2.0)
    for name in ("entropy", "multidiffusion"):
        with scaled_guidance(preset_named(name), plain, solver, view.process, **sizes) as guided:
            assert (guided.active, guided.label) == (True, plain.label)
            state = solver.run(guided.along(None).wrap(view), COND, SEEDS)
        assert torch.equal(sample(model, name, solver).latents, state.x)
    with (
        pytest.raises(ConfigError, match="takes several runs where there is one"),
        scaled_guidance(preset_named("hiflow"), plain, solver, view.process, **sizes),
    ):
        pass


def test_what_does_not_fit_is_refused_in_a_sentence(model: DiT) -> None:
    with pytest.raises(ConfigError, match=r"begin at any level.*Use sampler=ddim"):
        sample(model, "hiflow", DiffusersSampler("DDIMScheduler", 4))
    assert sampler_refusal(DiffusersSampler("DDIMScheduler", 4), preset_named("entropy")) is None
    for name in ("lumina", "multidiffusion"):
        sentence = str(sampler_refusal(BLOCKS, preset_named(name)))
        assert sentence.startswith(f"resolution={name} needs all frames at every step, of which Bl")
    assert sampler_refusal(BLOCKS, preset_named("ntk")) is None
    with pytest.raises(ConfigError, match=r"8 x 8 here, but 4 x 16 was asked for"):
        sample(model, "demofusion", Euler(3), target=(4, 16))
    with pytest.raises(ConfigError, match=r"lsrna looks at pictures"):
        sample_scaled(
            Euler(2),
            lambda sides: FlowMatching(time_input="unit").view(model, shape=(2, *sides)),
            COND,
            SEEDS,
            model=model,
            native=(8, 8),
            target=(16, 16),
            preset=preset_named("lsrna"),
        )
    assert size_step(model) == (2, 2)


def test_a_window_has_conditions_of_its_own() -> None:
    asked: list[list[tuple[int, ...]]] = []

    def conditions(cond: Conditioning, boxes: Any) -> Conditioning:
        asked.append(boxes)
        return Conditioning(labels=torch.arange(len(boxes)).repeat_interleave(len(cond)))

    def call(x: Tensor, level: Any, cond: Conditioning) -> Tensor:
        assert cond.labels is not None
        return cond.labels.view(-1, 1, 1, 1).expand_as(x).float()

    op: ResolutionOp = WindowFusion(4, 4, conditions=conditions, view_batch_size=3)
    op.prepare(None, (4, 4), (8, 8))
    labels = Conditioning(labels=torch.zeros(2, dtype=torch.int64))
    out = op.wrap_model(call)(torch.zeros(2, 1, 8, 8), LinearFlow().level(0.5), labels).sample
    assert asked == [[(0, 4, 0, 4), (0, 4, 4, 8), (4, 8, 0, 4), (4, 8, 4, 8)]]
    assert out[0, 0, ::4, ::4].tolist() == [[0, 1], [2, 3]]


def test_every_preset_is_tried_here_or_refused_by_this_network(model: DiT) -> None:
    refused = {"ntk", "lumina", "scalecrafter", "fouriscale", "pyramid"}
    assert set(presets()) == set(EVALUATIONS) | refused
    for name in refused:
        with pytest.raises(ConfigError, match=rf"resolution={name} needs .* Use resolution="):
            sample(model, name, Euler(2))
