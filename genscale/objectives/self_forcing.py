"""Self-forcing: a block-causal generator of few steps learns on its own videos (arXiv:2506.08009).

It is rolled out with its cache from pure noise, as in sampling, and two other networks judge what
comes out: a frozen teacher, which knows the data, and a critic, which knows the generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from genscale import rng
from genscale.backbones.base import Backbone
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.layers.block_mask import block_spans
from genscale.layers.video_cache import commit_frames
from genscale.objectives.base import Batch, Denoiser, Level, LossOutput, Objective, on
from genscale.objectives.block_schedules import ShiftedTable
from genscale.objectives.cached_view import CachedView
from genscale.objectives.network import NetworkView
from genscale.objectives.schedule import LinearFlow
from genscale.objectives.time_input import TimeInput
from genscale.objectives.time_sampler import shifted
from genscale.rng import Purpose, StepRandom


class SelfForcing(Objective):
    """Distribution matching on a generator's own rollouts, with a critic (arXiv:2506.08009).

    Every block walks down the list of steps; at one random step of the list, the same for all
    blocks, its clean estimate is taken with gradient and ends the block. It is read into the cache
    without gradient, and the next block begins. The loss of the generator moves videos x along
    g = (x_critic - x_teacher) / mean |x - x_teacher|, both being clean estimates at a random level
    (arXiv:2311.18828); the critic is trained by flow matching on x.

    All networks predict velocities eps - x_0 on straight paths. The losses are
    :meth:`generator_loss` and :meth:`critic_loss`; two optimizers apply them
    (:class:`~genscale.training.self_forcing.SelfForcingTraining`).

    Args:
        steps: nominal timesteps of the few steps, of 1000, falling; they are moved by the shift.
        shift: s of s t / (1 + (s - 1) t).
        guidance_scale: w of the teacher's estimate u + w (c - u); the paper's c + 3 (c - u) is 4.
        critic_steps: steps of the critic for each of the generator.
        gradient_frames: last frames of a rollout through which gradients flow; None takes all.
        context_noise: process time at which finished frames are noised when they are read again.
        time_range: least and largest time at which videos are judged.
        time_input: which number the networks are fed.

    Raises:
        ConfigError: steps that do not fall, or an impossible number.
    """

    def __init__(
        self,
        *,
        steps: Sequence[int] = (1000, 750, 500, 250),
        shift: float = 5.0,
        guidance_scale: float = 4.0,
        critic_steps: int = 5,
        gradient_frames: int | None = 21,
        context_noise: float = 0.0,
        time_range: Sequence[float] = (0.02, 0.98),
        time_input: TimeInput = "index",
    ) -> None:
        falling = all(a > b for a, b in zip(steps, [*steps[1:], 0], strict=True))
        if not steps or not falling or steps[0] > 1000:
            raise ConfigError(
                "objective.steps must be falling timesteps in 1 to 1000, but is "
                f"{list(steps)}. Give e.g. [1000,750,500,250]."
            )
        if critic_steps < 1 or not 0.0 <= context_noise < 1.0:
            raise ConfigError(
                "objective.critic_steps must be at least 1 and objective.context_noise lie in "
                f"[0, 1), but are {critic_steps} and {context_noise}. 5 and 0 are usual."
            )
        if len(time_range) != 2 or not 0.0 < time_range[0] < time_range[1] < 1.0:
            raise ConfigError(
                "objective.time_range must be [low, high] with 0 < low < high < 1, but is "
                f"{list(time_range)}. Give e.g. [0.02,0.98]."
            )
        self.process = LinearFlow()
        self.times = (ShiftedTable(shift).warped(torch.tensor(list(steps))) / 1000).tolist()
        self.shift = float(shift)
        self.guidance_scale = float(guidance_scale)
        self.critic_steps = critic_steps
        self.gradient_frames = gradient_frames
        self.context_noise = float(context_noise)
        self.time_range = (float(time_range[0]), float(time_range[1]))
        self.time_input: TimeInput = time_input

    def view(
        self, backbone: Backbone, tokenizer: Any = None, *, shape: tuple[int, ...] | None = None
    ) -> CachedView:
        """Return the generator view, which remembers earlier frames."""
        return CachedView(backbone, self.process, "velocity", self.time_input, shape=shape)

    def loss(self, backbone: Backbone, batch: Batch, rng: StepRandom) -> LossOutput:
        """Refuse to train one network alone.

        Raises:
            ConfigError: always; there is no teacher here and no optimizer of a critic.
        """
        raise ConfigError(
            "objective=self_forcing trains a generator and a critic against a teacher, but one "
            "network with one optimizer was given. Train with objective=teacher_forcing first, "
            "and build genscale.training.self_forcing.SelfForcingTraining from the result."
        )

    def stop_step(self, seed: int, step: int) -> int:
        """Return the place in the list at which blocks end in an optimizer step."""
        keys = rng.key(seed, torch.tensor([step]), Purpose.CRITIC)
        return int(rng.integers(keys, len(self.times)))

    def rollout(
        self,
        generator: Backbone,
        cond: Conditioning,
        shape: Sequence[int],
        draws: StepRandom,
        stop: int,
    ) -> Tensor:
        """Make videos as sampling does, with gradient at one step of each block.

        Args:
            generator: block-causal network.
            cond: conditions of B videos.
            shape: ``(C, F, H, W)``.
            draws: of B samples.
            stop: place in the list of steps at which each block ends.

        Returns:
            ``(B, C, F, H, W)``.
        """
        view = self.view(generator)
        channels, frames, *sides = shape
        first_frame = bool(getattr(generator, "independent_first_frame", False))
        spans = block_spans(frames, view.block_size, short_first=first_frame)
        since = 0 if self.gradient_frames is None else frames - self.gradient_frames
        memory, parts = view.begin(len(draws.position), tuple(shape)), []
        for start, end in spans:
            part = (channels, end - start, *sides)
            x = self._noise(draws, part, view, start, 0)
            for place, time in enumerate(self.times[: stop + 1]):
                learns = place == stop and start >= since
                with _gradient(learns):
                    found = view(x, self.process.level(time), cond, memory)
                memory = found.memory
                if place < stop:
                    noise = self._noise(draws, part, view, start, place + 1)
                    x = self._noised(found.clean, noise, self.process.level(self.times[place + 1]))
            parts.append(found.clean)
            if end < frames:
                level = self.process.level(self.context_noise)
                done = found.clean.detach()
                if self.context_noise > 0.0:
                    noise = self._noise(draws, part, view, start, len(self.times))
                    done = self._noised(done, noise, level)
                with torch.no_grad():
                    memory = view.refresh(done, level, cond, memory).memory
                memory = commit_frames(memory, end - start)
        return torch.cat(parts, dim=2)

    def generator_loss(
        self,
        generator: Backbone,
        teacher: Backbone,
        critic: Backbone,
        batch: Batch,
        draws: StepRandom,
        *,
        stop: int,
    ) -> LossOutput:
        """Return the distribution matching loss; ``batch`` gives shape and conditions alone."""
        x = self.rollout(generator, batch.cond, batch.clean.shape[1:], draws, stop)
        time = self._judged_at(draws, x)
        level = self.process.level(time)
        with torch.no_grad():
            noise = self._draw(draws, x)
            noisy = self._noised(x, noise, level)
            fake = self._whole(critic)(noisy, level, batch.cond).clean
            real = self._guided(teacher, noisy, level, batch.cond)
            axes = tuple(range(1, x.dim()))
            size = (x - real).abs().mean(axes, keepdim=True).clamp_min(1e-6)
            towards = x - (fake - real) / size
        per_sample = 0.5 * (x - towards).square().flatten(1).mean(1)
        return LossOutput(per_sample.mean(), {}, per_sample.detach(), time.float())

    def critic_loss(
        self,
        generator: Backbone,
        critic: Backbone,
        batch: Batch,
        draws: StepRandom,
        *,
        stop: int,
    ) -> LossOutput:
        """Return the flow matching loss of the critic on videos of the generator."""
        with torch.no_grad():
            x = self.rollout(generator, batch.cond, batch.clean.shape[1:], draws, stop)
        time, noise = self._judged_at(draws, x), self._draw(draws, x)
        level = self.process.level(time)
        found = self._whole(critic)(self._noised(x, noise, level), level, batch.cond)
        off = (found.noise - found.clean) - (noise - x)
        per_sample = off.square().flatten(1).mean(1)
        return LossOutput(per_sample.mean(), {}, per_sample.detach(), time.float())

    def _whole(self, network: Backbone) -> Denoiser:
        """Return the view of a network that sees whole clips, all frames at one level."""
        return NetworkView(network, self.process, "velocity", self.time_input)

    def _guided(self, teacher: Backbone, x: Tensor, level: Level, cond: Conditioning) -> Tensor:
        own = self._whole(teacher)(x, level, cond).clean
        conditional = not (cond.labels is None and cond.text is None)
        if not conditional or self.guidance_scale == 1.0:
            return own
        other = self._whole(teacher)(x, level, cond.null()).clean
        return other + self.guidance_scale * (own - other)

    def _judged_at(self, draws: StepRandom, like: Tensor) -> Tensor:
        """Draw the time of each video's judgement, float64 ``(B,)`` on the CPU."""
        time = shifted(draws.uniform(Purpose.CRITIC).cpu(), self.shift)
        return time.clamp(*self.time_range)

    def _draw(self, draws: StepRandom, like: Tensor) -> Tensor:
        keys = rng.key(draws.seed, draws.position, Purpose.CRITIC, Purpose.NOISE)
        return rng.normal(keys.to(like.device), tuple(like.shape[1:])).to(like.dtype)

    def _noise(
        self, draws: StepRandom, shape: tuple[int, ...], view: CachedView, frame: int, place: int
    ) -> Tensor:
        """Draw the noise of a block at a step of its list."""
        keys = rng.key(draws.seed, draws.position, frame, place, Purpose.STEP)
        return rng.normal(keys.to(view.device), shape)

    def _noised(self, clean: Tensor, noise: Tensor, level: Level) -> Tensor:
        return on(level.alpha, clean) * clean + on(level.sigma, clean) * noise


def _gradient(learns: bool) -> AbstractContextManager[Any]:
    return nullcontext() if learns else torch.no_grad()
