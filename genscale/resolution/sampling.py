"""Sampling at a size the network was not trained on, in one run or from small to large."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale import rng
from genscale.backbones.base import Backbone
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.guidance.base import Guidance
from genscale.layers.norm import upcast
from genscale.objectives.base import Denoiser, on
from genscale.objectives.schedule import NoiseProcess
from genscale.resolution.applicability import refusal
from genscale.resolution.base import ResolutionOp, Sides, apply_resolution
from genscale.resolution.frequency import by_frames
from genscale.resolution.presets import Preset, operators_of
from genscale.resolution.scaled_view import RunLevels, ScaledGuidance, ScaledView, flow_time
from genscale.samplers.base import Sampler, State
from genscale.samplers.blocks import Blocks
from genscale.samplers.diffusers_bridge import DiffusersSampler
from genscale.samplers.grid import GridSampler
from genscale.samplers.schedules import Linear

ViewAt = Callable[[Sides], Any]
"""(height, width) of latents -> the guided view at that size."""

Resize = Callable[[Tensor, Sides], Tensor]
"""Enlarge finished latents to a size."""


class Scaled(NamedTuple):
    """What :func:`sample_scaled` returns.

    Attributes:
        latents: ``(B, C, H, W)`` at the wanted size.
        nfe: ``(B,)`` float64 network evaluations of all runs together; a window counts as one.
    """

    latents: Tensor
    nfe: Tensor


@dataclass(frozen=True, slots=True)
class Stage:
    """One enlargement of a cascade.

    Attributes:
        index: 0 for the first.
        native: height and width the network was trained on.
        before: height and width of the run before.
        sides: height and width of this one.
        steps: of the sampler.
        small: finished latents of the run before, ``(B, C, h, w)``.
        guide: finished latents of the run before, enlarged, ``(B, C, H, W)``.
        noise: one fixed unit noise, alike.
        cleans: the estimates of the run before by step, not enlarged.
        first: step at which this run begins.
        seeds: ``(B,)`` int64 of the samples.
        cond: conditions of the B samples.
        maps: what the preset's ``watch`` gathered in the run at the trained size.
        images: decodes latents to pictures in [-1, 1], where the caller can.
    """

    index: int
    native: Sides
    before: Sides
    sides: Sides
    steps: int
    small: Tensor
    guide: Tensor
    noise: Tensor
    cleans: dict[int, Tensor]
    first: int
    seeds: Tensor
    cond: Conditioning
    maps: Any = None
    images: Callable[[Tensor], Tensor] | None = None

    @property
    def left(self) -> int:
        """Steps of this run."""
        return self.steps - self.first


def bicubic(x: Tensor, sides: Sides) -> Tensor:
    """Enlarge ``(B, C, h, w)``, or every frame of clips, to ``sides``, in float32."""

    def enlarged(x: Tensor) -> Tensor:
        return F.interpolate(upcast(x), size=sides, mode="bicubic", align_corners=False)

    return by_frames(enlarged, x).to(x.dtype)


def cascade_sides(
    native: Sides, target: Sides, step: Sides = (1, 1), *, doubling: bool = False
) -> list[Sides]:
    """Return the sizes a cascade goes through, the last one being ``target``; none at ``native``.

    Args:
        native: height and width of the first run, which is not among them.
        target: no side smaller.
        step: what sides must be multiples of.
        doubling: about 2, 4, 8 ... times as large; else 2, 3, 4 ... times.
    """
    if target == native:
        return []
    ratio = max(target[0] / native[0], target[1] / native[1])
    count = math.ceil(math.log2(ratio) - 1e-9) if doubling else math.ceil(ratio - 1e-9) - 1

    def between(low: int, high: int, share: float, unit: int) -> int:
        side = low * (high / low) ** share if doubling else low + (high - low) * share
        return max(round(side / unit) * unit, unit)

    sizes = [
        (
            between(native[0], target[0], k / count, step[0]),
            between(native[1], target[1], k / count, step[1]),
        )
        for k in range(1, count)
    ]
    return [*sizes, target]


@contextmanager
def scaled_guidance(
    preset: Preset,
    guidance: Guidance,
    solver: Sampler,
    process: NoiseProcess | None,
    *,
    model: nn.Module,
    native: Sides,
    target: Sides,
) -> Iterator[Guidance]:
    """Put a preset of one run on a network, and give the guidance that its views want.

    For searches, which step trajectories themselves.

    Args:
        preset: of one run.
        guidance: of the views.
        solver: whose levels tell the steps.
        process: of the views; None of scale-wise ones.
        model: the network.
        native: height and width of latents it was trained on.
        target: those wanted.

    Raises:
        ConfigError: a cascade, or a preset that does not fit the network.
    """
    ops = operators_of(preset, model, native, target)
    levels = None
    if isinstance(solver, GridSampler) and process is not None:
        levels = RunLevels(process, solver.levels(process))
    with apply_resolution(model, ops, native=native, target=target, schedule=levels):
        yield guidance if levels is None else ScaledGuidance(guidance, ops, levels)


def start_step(steps: int, strength: float) -> int:
    """Return the step at which a run of ``strength`` (a share of all steps) begins."""
    return steps - min(max(round(strength * steps), 1), steps)


def shifted_sampler(solver: GridSampler, factor: float) -> GridSampler:
    """Return a sampler whose linear grid is moved towards noise by ``factor`` more.

    Other schedules have no such shift and are left as they are.
    """
    if not isinstance(solver.schedule, Linear):
        return solver
    other = copy.copy(solver)
    other.schedule = replace(solver.schedule, shift=solver.schedule.shift * factor)
    other.shift = solver.shift * factor
    return other


def size_step(model: nn.Module) -> Sides:
    """Return what height and width of a network's input must be multiples of."""
    step: Sides = getattr(model, "size_step", (1, 1))
    return step


def sample_scaled(
    solver: Sampler,
    view_at: ViewAt,
    cond: Conditioning,
    seeds: Tensor,
    *,
    model: nn.Module,
    native: Sequence[int],
    target: Sequence[int],
    preset: Preset,
    enlarge: Resize | None = None,
    images: Callable[[Tensor], Tensor] | None = None,
) -> Scaled:
    """Sample at another size by a preset.

    Works with any objective, since everything happens to estimates of clean samples, and any
    sampler that goes from level to level. A sample is a function of its seed and condition,
    whatever is in the batch; the small run of a cascade is the plain sample of the same seed.

    Args:
        solver: the sampler.
        view_at: gives the guided view at a size.
        cond: conditions of B samples.
        seeds: ``(B,)`` int64.
        model: the network behind the view.
        native: height and width of latents it was trained on.
        target: those wanted.
        preset: what to do.
        enlarge: makes the guide of a larger run; default is bicubic in the space of latents.
        images: decodes latents, for presets that look at pictures.

    Returns:
        finished latents, and what they cost.

    Raises:
        ConfigError: preset, network, sizes or sampler do not fit together.
    """
    small, large = (native[0], native[1]), (target[0], target[1])
    problem = refusal(model, preset, small, large)
    if problem is not None:
        raise ConfigError(problem)
    runs = _Runs(solver, view_at, cond, seeds, model, small)
    if not preset.cascade:
        ops = preset.operators(model, small, large)
        return Scaled(runs.go(ops, large).latents, runs.nfe)
    problem = sampler_refusal(solver, preset)
    if problem is not None:
        raise ConfigError(problem)
    sizes = cascade_sides(small, large, size_step(model), doubling=preset.doubling)
    _check_sizes(model, [side for sides in sizes for side in preset.called_at(model, small, sides)])
    watch = preset.watch(model, small)
    with nullcontext() if watch is None else watch as maps:
        run = runs.go([], small, record=preset.records)
    base, before = run.latents, small
    for index, sides in enumerate(sizes):
        guide = (enlarge or bicubic)(run.latents, sides)
        keys = rng.key(runs.seeds, index + 1, rng.Purpose.RENOISE).to(guide.device)
        stage = Stage(
            index=index,
            native=small,
            before=before,
            sides=sides,
            steps=solver.num_steps,
            small=run.latents,
            guide=guide,
            noise=rng.normal(keys, tuple(guide.shape[1:])).to(guide.dtype),
            cleans=run.cleans,
            first=start_step(solver.num_steps, preset.strength_of(index)),
            seeds=runs.seeds,
            cond=cond,
            maps=maps,
            images=images,
        )
        run = runs.go(
            preset.guided(model, stage),
            sides,
            start=stage,
            begin=preset.begins_at(stage),
            opened=partial(preset.opened, stage=stage),
            record=preset.records,
            shift=preset.time_shift(stage),
        )
        run = run._replace(latents=preset.finished(run.latents, base))
        before = sides
    return Scaled(run.latents, runs.nfe)


class _Run(NamedTuple):
    """Finished latents, and the estimates by step where they were recorded."""

    latents: Tensor
    cleans: dict[int, Tensor]


class _Runs:
    """The runs of one call of :func:`sample_scaled`, and what they cost together."""

    def __init__(
        self,
        solver: Sampler,
        view_at: ViewAt,
        cond: Conditioning,
        seeds: Tensor,
        model: nn.Module,
        native: Sides,
    ) -> None:
        self.solver, self.view_at, self.cond, self.model = solver, view_at, cond, model
        self.seeds = seeds.to(device="cpu", dtype=torch.int64)
        self.native = native
        self.nfe = torch.zeros(len(seeds), dtype=torch.float64)

    def go(
        self,
        ops: Sequence[ResolutionOp],
        sides: Sides,
        *,
        start: Stage | None = None,
        begin: Tensor | None = None,
        opened: Callable[[Sampler, Any, State], State] | None = None,
        record: bool = False,
        shift: float = 1.0,
    ) -> _Run:
        """Run to the end: from noise, or from clean latents ``begin`` with the stage's noise.

        A scale-wise model runs from nothing, or from where ``opened`` says.
        """
        view: Any = self.view_at(sides)
        if not isinstance(self.solver, GridSampler) or not isinstance(view, Denoiser):
            with apply_resolution(self.model, ops, native=self.native, target=sides):
                state = self.solver.start(view, self.cond, self.seeds)
                if opened is not None:
                    state = opened(self.solver, view, state)
                state = self.solver.complete(view, state)
            self.nfe = self.nfe + state.nfe
            return _Run(self.solver.finish(state), {})
        solver = self.solver if shift == 1.0 else shifted_sampler(self.solver, shift)
        first = 0 if start is None else start.first
        levels = RunLevels(view.process, solver.levels(view.process), first)
        with apply_resolution(
            self.model, ops, native=self.native, target=sides, schedule=levels
        ) as scaled:
            if ops:
                view = ScaledView(view, ops, levels)
            state = solver.start(view, self.cond, self.seeds)
            if start is not None and begin is not None:
                state = _noised(state, start, begin, levels)
            cleans: dict[int, Tensor] = {}
            for step in range(first, solver.num_steps):
                state = _changed(solver, scaled, state, levels, step)
                state = solver.evaluate(view, state)
                if record and state.clean is not None:
                    cleans[step] = state.clean
                state = solver.advance(view, state)
        self.nfe = self.nfe + state.nfe
        return _Run(solver.finish(state), cleans)


def _noised(state: State, stage: Stage, clean: Tensor, levels: RunLevels) -> State:
    """Begin at the stage's step from clean latents; draws differ from those of other runs."""
    count = len(state)
    level = levels.levels.select(torch.tensor([stage.first]))
    alpha, sigma = on(level.alpha, state.x), on(level.sigma, state.x)
    x = alpha * clean.to(state.x) + sigma * stage.noise.to(state.x)
    lineage = rng.key(state.lineage, stage.index + 1, rng.Purpose.RENOISE)
    step = torch.full((count,), stage.first, dtype=torch.int64)
    return state.replace(x=x, step=step, lineage=lineage)


def _changed(
    solver: GridSampler, scaled: apply_resolution, state: State, levels: RunLevels, step: int
) -> State:
    """Let operators change the sample that a step starts from; the solver then begins anew."""
    level = levels.levels.select(torch.tensor([step]))
    x = scaled.pre_step(state.x, flow_time(level), step - levels.first)
    return state if x is state.x else solver.forget(state.replace(x=x))


def _check_sizes(model: nn.Module, sizes: Sequence[Sides]) -> None:
    """Refuse sizes on the way that the network cannot read.

    Raises:
        ConfigError: there is one.
    """
    for height, width in sizes:
        problem = model.size_problem(height, width) if isinstance(model, Backbone) else None
        if problem is not None:
            raise ConfigError(
                f"{type(model).__name__} is to be called on {height} x {width} cells on the way to "
                f"the size asked for, which it cannot read: {problem}"
            )


def sampler_refusal(solver: Sampler, preset: Preset) -> str | None:
    """Return why a sampler cannot serve a preset, in a sentence; None where it can."""
    if preset.whole and isinstance(solver, Blocks):
        return (
            f"resolution={preset.name} needs all frames at every step, of which {solver.label} "
            "takes some and remembers the others. Use sampler=euler, or resolution=entropy."
        )
    if not preset.cascade or preset.family == solver.family == "scale_wise":
        return None
    steps = isinstance(solver, GridSampler) and not isinstance(solver, DiffusersSampler)
    if steps and preset.family == "diffusion":
        return None
    if preset.family == "scale_wise":
        return (
            f"resolution={preset.name} needs a sampler of scales, which {solver.label} is not. "
            "Use sampler=next_scale."
        )
    return (
        f"resolution={preset.name} needs a sampler that can begin at any level of its grid, which "
        f"{solver.label} cannot. Use sampler=ddim, euler or dpmpp_2m."
    )
