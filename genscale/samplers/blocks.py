"""Videos block by block: one sampler over a matrix of which frame is how noisy at which step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from genscale import rng
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError, did_you_mean
from genscale.layers.video_cache import commit_frames
from genscale.objectives.base import Denoiser, Level, on
from genscale.objectives.block_schedules import Ramp, check_delay, ramp
from genscale.objectives.schedule import NoiseProcess
from genscale.rng import Purpose
from genscale.samplers.base import Sampler, State
from genscale.samplers.block_schedule import BlockPlan, BlockScheduleName, block_plan
from genscale.samplers.grid import Precision, Schedule, estimates
from genscale.samplers.schedules import LevelSchedule, ScheduleName
from genscale.samplers.sde import DDIM, ddim_law


class Blocks(Sampler):
    """Makes videos with a network that remembers the frames before (arXiv:2407.01392, 2506.08009).

    A step asks the network about the frames under way only: those that have begun and are not
    clean yet, each at its own level. It moves them along the grid of levels by DDIM. Where blocks
    become clean and others will follow, ``advance`` lets the network read them once more, clean,
    and commits what it remembers of them; that is one evaluation, and it is counted.

    In ``state.x`` ``(B, C, F, H, W)`` all F frames lie: finished ones, those under way, and the
    start noise of the others. ``state.clean`` has the estimates of those under way, and repeats
    the last of them for the frames that have not begun. The noise of a frame is keyed by its
    number, so that a longer video begins as a shorter one does where later blocks are not seen.

    Args:
        steps: steps S of each block, and intervals of the grid of levels.
        schedule: ``"autoregressive"``: a block after the other. ``"pyramid"``: each starts
            ``delay`` steps after the one before. ``"staircase"``: likewise by whole steps, with
            at most ``window`` frames under way (SkyReels-V2, arXiv:2504.13074).
            ``"full_sequence"``: all together, without memory.
        delay: of pyramid (None is 1) and staircase (None is the least that the window allows).
        window: frames of the staircase's window; None is ``trained_frames``.
        frames: frames F of the video to make, which may be more than the network was trained on;
            None is ``trained_frames``.
        block_size: frames a block; follows from the model.
        trained_frames: frames of a training clip; follows from the model.
        independent_first_frame: the first frame is a block of its own; follows from the model.
        eta: share of noise that each step draws anew, in [0, 1]; 0 is deterministic (Euler).
        levels: where the grid of levels lies: see
            :class:`~genscale.samplers.grid.GridSampler`, where it is called schedule.
        shift: see there.
        precision: see there.
        context_noise: process time at which finished frames are noised when they are read again;
            0 reads them clean.
        noise_shuffling: every second block starts from the noise of the block before, permuted
            inside windows of so many frames (FreeNoise, arXiv:2310.15169): slow changes last
            longer. 0 draws all noise anew.
        start_range: times at which the first block starts and towards which later ones rise
            (BlockVid, arXiv:2511.22973), e.g. [0.9, 1.0]; None starts all at pure noise.
        start_ramp: how they rise: ``cosine`` or ``linear``.

    Raises:
        ConfigError: an unknown name, an impossible number, frames that are no whole blocks, or a
            delay at which more blocks would be under way than the window holds.

    Attributes:
        plan: which frames are under way at each step.
    """

    def __init__(
        self,
        steps: int = 50,
        *,
        schedule: BlockScheduleName = "autoregressive",
        delay: float | None = None,
        window: int | None = None,
        frames: int | None = None,
        block_size: int | None = None,
        trained_frames: int | None = None,
        independent_first_frame: bool = False,
        eta: float = 0.0,
        levels: Schedule = "linear",
        shift: float = 1.0,
        precision: Precision = "float32",
        context_noise: float = 0.0,
        noise_shuffling: int = 0,
        start_range: Sequence[float] | None = None,
        start_ramp: Ramp = "cosine",
    ) -> None:
        _check_name("schedule", schedule, get_args(BlockScheduleName))
        if not isinstance(levels, LevelSchedule):
            _check_name("levels", levels, get_args(ScheduleName))
        self.solver = DDIM(steps, eta=eta, schedule=levels, shift=shift, precision=precision)
        self.schedule = schedule
        frames, self.block_size = _sizes_of(frames, block_size, trained_frames)
        self.frames = frames
        self.independent_first_frame = independent_first_frame
        if not 0.0 <= context_noise < 1.0 or noise_shuffling < 0:
            raise ConfigError(
                "sampler.context_noise must lie in [0, 1) and sampler.noise_shuffling must not be "
                f"negative, but are {context_noise} and {noise_shuffling}. 0 is none of either."
            )
        self.context_noise = float(context_noise)
        self.noise_shuffling = noise_shuffling
        self.start_range = None if start_range is None else _checked_range(start_range)
        self.start_ramp = start_ramp
        ramp(1, 0.0, 0.0, start_ramp)
        if window is not None and (schedule != "staircase" or window < self.block_size):
            raise ConfigError(
                f"sampler.window is of the schedule staircase, at least a block of "
                f"{self.block_size} frames, but {window} was given with {schedule}. Leave it out."
            )
        self.delay = self._delay(delay, window or trained_frames or frames)
        try:
            self.plan: BlockPlan = block_plan(
                schedule,
                frames,
                steps,
                block_size=self.block_size,
                delay=self.delay,
                independent_first_frame=independent_first_frame,
            )
        except ValueError as error:
            raise ConfigError(f"sampler.frames={frames} cannot be made: {error}") from error

    @property
    def steps_a_block(self) -> int:
        """Steps S that a block takes."""
        return self.solver.intervals

    @property
    def stochastic(self) -> bool:
        """Whether steps draw noise."""
        return self.solver.stochastic

    def draws(self, step: int) -> bool:
        """Whether a step draws noise: the last one of a block ends at the clean level."""
        row = self.plan.steps[step]
        return self.stochastic and row.finished < row.end

    @property
    def num_steps(self) -> int:
        """Number of ``advance`` calls from start to finish."""
        return len(self.plan.steps)

    @property
    def label(self) -> str:
        """The name, and everything that changes the law of the samples."""
        words = [self.schedule, f"{self.frames} frames in blocks of {self.block_size}"]
        words += [f"delay {self.delay:g}"] if self.schedule in ("pyramid", "staircase") else []
        words += [f"eta {self.solver.eta:g}"] if self.stochastic else []
        words += [f"history at {self.context_noise:g}"] if self.context_noise else []
        words += [f"noise shuffled by {self.noise_shuffling}"] if self.noise_shuffling else []
        if self.start_range is not None:
            words.append(f"start {self.start_ramp} in {list(self.start_range)}")
        return f"Blocks({', '.join(words)})"

    def nfe(self, i: int, j: int) -> int:
        """Network evaluations from step i to step j, refreshes counted, one branch a call."""
        if not 0 <= i <= j <= self.num_steps:
            raise ValueError(
                f"Steps 0 <= i <= j <= {self.num_steps} were expected, but i={i} and j={j} were "
                "given."
            )
        refreshes = self.plan.refreshes_before
        return j - i + refreshes[j] - refreshes[i]

    def check(self, process: NoiseProcess, *, learned_variance: bool) -> list[str]:
        """Return why the process lacks the levels of the grid, if it does."""
        return self.solver.check(process, learned_variance=learned_variance)

    def noise_shape(self, model: Any) -> tuple[int, ...]:
        """Return the shape ``(C, F, H, W)`` of one video, whatever length was trained."""
        channels, _, *sides = model.sample_shape
        return (channels, self.frames, *sides)

    def start_noise(self, model: Any, seeds: Tensor) -> Tensor:
        """Return the unit noise ``(B, C, F, H, W)`` of these seeds, a key a frame."""
        frame = torch.arange(self.frames)
        source = frame.expand(len(seeds), -1)
        if self.noise_shuffling:
            source = self._shuffled(seeds)
        keys = rng.key(seeds[:, None].cpu(), source, Purpose.INIT)
        return self._frame_noise(keys.to(model.device, non_blocking=True), model.sample_shape)

    def step_noise(self, model: Any, state: State) -> Tensor:
        """Return the unit noise ``(B, C, F, H, W)`` of the current step.

        Frames that are not under way have zeros. A frame's noise is keyed by its number and the
        steps it has left, so that every schedule draws the same.
        """
        left = self.plan.left[state.step.clamp(max=self.num_steps)]  # (B, F)
        moving = left != self.plan.left[(state.step + 1).clamp(max=self.num_steps)]
        used = moving.any(0).nonzero()[:, 0]
        noise = torch.zeros_like(state.x)
        if len(used) == 0:
            return noise
        keys = rng.key(
            state.seeds[:, None], state.lineage[:, None], left[:, used], used, Purpose.STEP
        )
        drawn = self._frame_noise(keys.to(state.x.device), tuple(state.x.shape[1:]))
        mask = moving[:, None, used, None, None].to(state.x.device)
        noise[:, :, used.to(state.x.device)] = drawn.to(noise.dtype) * mask
        return noise

    def start(
        self,
        model: Denoiser,
        cond: Conditioning,
        seeds: Tensor,
        noise: Tensor | None = None,
    ) -> State:
        """Begin at unit-normal noise ``(B, C, F, H, W)`` times the sigma of each block's start.

        Raises:
            ConfigError: a network with blocks of another size.
            ValueError: numbers of seeds, conditions and noises that differ.
        """
        own = getattr(model, "block_size", self.block_size)
        if own != self.block_size:
            raise ConfigError(
                f"sampler.block_size is {self.block_size}, but the network's blocks have {own} "
                f"frames. Give sampler.block_size={own}."
            )
        seeds = seeds.to(device="cpu", dtype=torch.int64)
        count = len(seeds)
        if noise is None:
            noise = self.start_noise(model, seeds)
        if len(noise) != count or len(cond) not in (0, count):
            raise ValueError(
                f"{count} seeds were given with {len(cond)} conditions and {len(noise)} noises. "
                "Give one of each a sample."
            )
        noise = noise.to(device=model.device, dtype=self.solver.dtype)
        zero = torch.zeros(count, dtype=torch.int64, device="cpu")
        begin = self.levels_at(model.process, 0)
        return State(
            x=on(begin.sigma, noise) * noise,
            cond=cond.to(model.device),
            step=zero,
            seeds=seeds,
            lineage=zero.clone(),
            group=torch.arange(count, device="cpu"),
            nfe=zero.double(),
            memory=model.begin(count, self.noise_shape(model)),
            process=model.process,
        )

    def levels_at(self, process: NoiseProcess, step: int) -> Level:
        """Return the levels ``(1, F)`` of all frames before a step; after all, at num_steps."""
        time = self.solver.grid(process).time
        assert time is not None  # of a grid
        left = self.plan.left[step]
        times = time[self.steps_a_block - left] * self._starts()
        return process.level(times[None])

    def evaluate(self, model: Denoiser, state: State) -> State:
        """Set ``.clean`` and ``.noise``; of finished particles to their x, and to zero."""
        if state.clean is not None:
            return state
        step = state.shared_step
        if step is not None and step < self.num_steps:
            return self._evaluate(model, state)
        waiting = state.replace(
            clean=state.x, noise=torch.zeros_like(state.x), pending=state.memory
        )

        def ask(index: Tensor) -> State:
            return self._evaluate(model, state.select(index))

        return self._in_groups(state, waiting, ask)

    def advance(self, model: Denoiser, state: State, noise: Tensor | None = None) -> State:
        """Take one step in all particles that have one left; ``noise`` replaces the keyed draw.

        Args:
            model: the view.
            state: evaluated first if need be.
            noise: ``(B, C, F, H, W)``; frames that are not under way are not read.
        """
        if not bool((state.step < self.num_steps).any()):
            return state
        state = self.evaluate(model, state)
        if state.shared_step is not None:
            return self._advance(model, state, noise)
        waiting = state.replace(clean=None, noise=None, memory=state.pending, pending=None)

        def move(index: Tensor) -> State:
            rows = None if noise is None else noise[index.to(noise.device)]
            return self._advance(model, state.select(index), rows)

        return self._in_groups(state, waiting, move)

    def finish(self, state: State) -> Tensor:
        """Return the videos ``(B, C, F, H, W)``.

        Raises:
            ValueError: particles that have steps left.
        """
        left = self.num_steps - int(state.step.min())
        if left > 0:
            raise ValueError(
                f"A particle has {left} of {self.num_steps} steps left. Call advance until "
                "state.step equals num_steps, or sampler.run."
            )
        return state.x

    def _evaluate(self, model: Denoiser, state: State) -> State:
        """Evaluate particles of one step."""
        step = int(state.step[0])
        row, x = self.plan.steps[step], state.x
        level = _frames(self.levels_at(_process_of(state), step), row.first, row.end)
        part = x[:, :, row.first : row.end]
        prediction = model(part, level, state.cond, state.memory)
        before, behind = x[:, :, : row.first], x[:, :, row.end :]
        last = prediction.clean[:, :, -1:].expand(-1, -1, behind.shape[2], -1, -1)
        return state.replace(
            clean=torch.cat((before, prediction.clean, last), dim=2),
            noise=torch.cat((torch.zeros_like(before), prediction.noise, behind), dim=2),
            pending=prediction.memory,
            nfe=state.nfe + prediction.cost,
        )

    def _advance(self, model: Denoiser, state: State, noise: Tensor | None) -> State:
        """Move evaluated particles of one step, and commit blocks that have become clean."""
        step = int(state.step[0])
        row = self.plan.steps[step]
        process = _process_of(state)
        now, then = (
            _frames(self.levels_at(process, place), row.first, row.end)
            for place in (step, step + 1)
        )
        under_way = slice(row.first, row.end)
        clean, eps = (part[:, :, under_way] for part in estimates(state))
        kept, std = ddim_law(now, then, self.solver.eta)
        moved = on(then.alpha, clean) * clean + on(kept, clean) * eps
        if bool((std > 0).any()):
            noise = self.step_noise(model, state) if noise is None else noise.to(state.x)
            moved = moved + on(std, moved) * noise[:, :, under_way]
        x = torch.cat((state.x[:, :, : row.first], moved, state.x[:, :, row.end :]), dim=2)
        memory, nfe = state.pending, state.nfe
        if row.refreshes:
            done = x[:, :, row.first : row.finished]
            level, done = self._history(process, state, done, row.first)
            read = model.refresh(done, level, state.cond, memory)
            memory = commit_frames(read.memory, row.finished - row.first)
            nfe = nfe + read.cost
        return state.replace(
            x=x, step=state.step + 1, nfe=nfe, clean=None, noise=None, memory=memory, pending=None
        )

    def _history(
        self, process: NoiseProcess, state: State, done: Tensor, first: int
    ) -> tuple[Level, Tensor]:
        """Return finished frames as the network reads them, and the level they are at."""
        level = process.level(self.context_noise * process.t_max)
        if self.context_noise == 0.0:
            return level, done
        frame = torch.arange(first, first + done.shape[2])
        keys = rng.key(state.seeds[:, None], state.lineage[:, None], frame, Purpose.HISTORY)
        noise = self._frame_noise(keys.to(done.device), tuple(done.shape[1:])).to(done.dtype)
        return level, on(level.alpha, done) * done + on(level.sigma, done) * noise

    def _in_groups(self, state: State, waiting: State, move: Callable[[Tensor], State]) -> State:
        """Move particles of one step together; those that have finished stay as in ``waiting``."""
        everyone = torch.arange(len(state), device="cpu")
        for step in state.step.unique().tolist():
            if step < self.num_steps:
                index = everyone[state.step == step]
                waiting = waiting.put(index, move(index))
        return waiting

    def _delay(self, delay: float | None, window: int) -> float:
        """Return the steps between starts, or say why there are none of that kind."""
        staircase = self.schedule == "staircase"
        if self.schedule in ("autoregressive", "full_sequence"):
            if delay is not None:
                raise ConfigError(
                    f"sampler.delay is of the schedules pyramid and staircase, but {delay} was "
                    f"given with {self.schedule}. Leave it out."
                )
            return float(self.steps_a_block) if self.schedule == "autoregressive" else 0.0
        blocks = max(1, min(window, self.frames) // self.block_size)
        if delay is None:
            return float(math.ceil(self.steps_a_block / blocks)) if staircase else 1.0
        if not 0.0 <= delay < math.inf or (staircase and delay != int(delay)):
            raise ConfigError(
                f"sampler.delay must not be negative{', and whole' if staircase else ''}, but is "
                f"{delay}. It counts steps between the starts of neighbouring blocks."
            )
        if staircase and window < self.frames:
            check_delay(delay, self.steps_a_block, blocks, setting="sampler.delay")
        return float(delay)

    def _starts(self) -> Tensor:
        """Return the share of the grid's times at which each frame starts, ``(F,)`` float64."""
        sizes = torch.tensor(self.plan.sizes)
        shares = [1.0] * len(sizes)
        if self.start_range is not None:
            shares = ramp(len(sizes), *self.start_range, self.start_ramp)
        return torch.tensor(shares, dtype=torch.float64).repeat_interleave(sizes)

    def _shuffled(self, seeds: Tensor) -> Tensor:
        """Return whose noise each frame starts from: ``(B, F)`` int64 numbers of frames."""
        source = torch.arange(self.frames).repeat(len(seeds), 1)
        ends = [0, *torch.tensor(self.plan.sizes).cumsum(0).tolist()]
        for block in range(1, len(self.plan.sizes), 2):
            before, start, end = ends[block - 1], ends[block], ends[block + 1]
            shared = min(end - start, start - before)
            for low in range(0, shared, self.noise_shuffling):
                size = min(self.noise_shuffling, shared - low)
                keys = rng.key(seeds.cpu(), block, low, Purpose.WINDOW)
                order = rng.uniform(keys, (size,)).argsort(dim=1)
                source[:, start + low : start + low + size] = before + low + order
        return source

    def _frame_noise(self, keys: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return unit noise ``(B, C, f, H, W)`` of keys ``(B, f)``."""
        channels, _, *sides = shape
        return rng.normal(keys, (channels, *sides)).transpose(1, 2)


def _frames(level: Level, start: int, end: int) -> Level:
    time = None if level.time is None else level.time[:, start:end]
    return Level(level.alpha[:, start:end], level.sigma[:, start:end], time)


def _process_of(state: State) -> NoiseProcess:
    if state.process is None:
        raise ValueError(
            "The state names no noising process. Begin trajectories with sampler.start."
        )
    return state.process


def _sizes_of(
    frames: int | None, block_size: int | None, trained_frames: int | None
) -> tuple[int, int]:
    frames = trained_frames if frames is None else frames
    if block_size is None or frames is None or block_size < 1 or frames < 1:
        raise ConfigError(
            "sampler.block_size and sampler.trained_frames must be those of a block-causal video "
            f"model, but are {block_size} and {trained_frames}. Other models have none: choose "
            "another sampler=..."
        )
    return frames, block_size


def _check_name(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(
            f"sampler.{name} must be one of {', '.join(known)}, but is {value!r}."
            f"{did_you_mean(str(value), known)}"
        )


def _checked_range(given: Sequence[float]) -> tuple[float, float]:
    if len(given) != 2 or not 0.0 < given[0] <= given[1] <= 1.0:
        raise ConfigError(
            "sampler.start_range must be [first, last] with 0 < first <= last <= 1, but is "
            f"{list(given)}. Give e.g. [0.9,1.0], or null to start all blocks at pure noise."
        )
    return float(given[0]), float(given[1])
