"""Teacher forcing: every block is denoised behind the clean blocks of the same clip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from genscale import rng
from genscale.backbones.base import Backbone, BackboneOutput
from genscale.errors import ConfigError
from genscale.objectives.base import Batch, LossOutput, on
from genscale.objectives.block_schedules import Ramp
from genscale.objectives.diffusion_forcing import (
    DiffusionForcing,
    ForcingTarget,
    ForcingWeighting,
    LevelsPer,
    check_name,
    frame_error,
)
from genscale.objectives.network import velocity_is_reversed
from genscale.objectives.time_input import TimeInput, time_input_of
from genscale.objectives.time_sampler import TimeLaw
from genscale.rng import Purpose, StepRandom

VelocityForcing = Literal["off", "context_mix", "literal"]


class TeacherForcing(DiffusionForcing):
    """Denoise each block of a clip, seeing the clean blocks before it (arXiv:2506.08009, fig. 2).

    The network reads the clip twice, clean and noisy, in one pass; a noisy block attends the clean
    blocks before it and itself, which is what it will find in its cache while sampling.

    Args:
        augmentation: the clean half is noised at a time drawn in [0, this], one a block, so that
            errors of generated history are no surprise; 0 leaves it clean.
        velocity_forcing: a second error |v - (eps - gamma x_cond)|^2 (BlockVid, arXiv:2511.22973).
            ``off`` has none. In ``context_mix`` x_cond = (1 - rho) x_0 + rho c, in ``literal`` it
            is c alone, c being the mean of the blocks before, x_0 itself in the first one. The
            paper does not say how c is built, and nothing is claimed for ``literal``.
        velocity_forcing_mix: rho of ``context_mix``.
        velocity_forcing_scale: gamma.
        target: see :class:`~genscale.objectives.diffusion_forcing.DiffusionForcing`.
        levels: see there.
        weighting: see there.
        time_law: see there.
        time_mean: see there.
        time_std: see there.
        time_shift: see there.
        time_input: see there.
        noise_floor: see there.
        noise_ramp: see there.

    Raises:
        ConfigError: an unknown name, an impossible number, or velocity forcing of another target.
    """

    def __init__(
        self,
        *,
        augmentation: float = 0.0,
        velocity_forcing: VelocityForcing | Literal[False] = "off",
        velocity_forcing_mix: float = 0.05,
        velocity_forcing_scale: float = 1.0,
        target: ForcingTarget = "velocity",
        levels: LevelsPer = "block",
        weighting: ForcingWeighting = "none",
        time_law: TimeLaw = "uniform",
        time_mean: float = 0.0,
        time_std: float = 1.0,
        time_shift: float = 1.0,
        time_input: TimeInput = "index",
        noise_floor: Sequence[float] | None = None,
        noise_ramp: Ramp = "cosine",
    ) -> None:
        super().__init__(
            target=target,
            levels=levels,
            weighting=weighting,
            time_law=time_law,
            time_mean=time_mean,
            time_std=time_std,
            time_shift=time_shift,
            time_input=time_input,
            noise_floor=noise_floor,
            noise_ramp=noise_ramp,
        )
        # YAML 1.1 reads a bare off as false
        kind = "off" if velocity_forcing is False else velocity_forcing
        check_name("velocity_forcing", kind, get_args(VelocityForcing))
        if kind != "off" and target != "velocity":
            raise ConfigError(
                f"objective.velocity_forcing={kind} compares velocities, but "
                f"objective.target is {target}. Use target=velocity, or velocity_forcing=off."
            )
        for name, value in (
            ("augmentation", augmentation),
            ("velocity_forcing_mix", velocity_forcing_mix),
        ):
            if not 0.0 <= value <= 1.0:
                raise ConfigError(
                    f"objective.{name} must lie in [0, 1], but is {value}. 0.05 is much already."
                )
        self.augmentation = float(augmentation)
        self.velocity_forcing: VelocityForcing = kind
        self.velocity_forcing_mix = float(velocity_forcing_mix)
        self.velocity_forcing_scale = float(velocity_forcing_scale)

    def predict(
        self,
        backbone: Backbone,
        x: Tensor,
        number: Tensor,
        batch: Batch,
        rng: StepRandom,
        sizes: Sequence[int],
    ) -> BackboneOutput:
        """Ask the network about noisy clips, with the clean ones beside them."""
        clean = batch.clean
        if self.augmentation == 0.0:
            time = torch.zeros(1, clean.shape[2], dtype=torch.float64, device=clean.device)
            time = time.expand(len(clean), -1)
        else:
            time = self.history_times(rng, sizes).to(clean.device, non_blocking=True)
        alpha, sigma = self.process.coefficients(time)
        history = clean
        if self.augmentation > 0.0:
            noise = rng.normal(Purpose.HISTORY, tuple(clean.shape[1:])).to(clean, non_blocking=True)
            history = on(alpha, clean) * clean + on(sigma, clean) * noise
        network: Any = backbone
        output: BackboneOutput = network(
            x,
            number,
            batch.cond,
            clean=history,
            clean_t=time_input_of(self.time_input, time, alpha, sigma),
        )
        return output

    def history_times(self, step: StepRandom, sizes: Sequence[int]) -> Tensor:
        """Draw the times ``(B, F)`` at which the clean half is noised, one a block."""
        keys = rng.key(step.seed, step.position, Purpose.TIME, Purpose.HISTORY)
        time = self.augmentation * rng.uniform(keys, (len(sizes),))
        return time.repeat_interleave(torch.tensor(sizes, device=time.device), dim=1)

    def complete(
        self,
        result: LossOutput,
        output: BackboneOutput,
        clean: Tensor,
        noise: Tensor,
        sizes: Sequence[int],
    ) -> LossOutput:
        """Add the error of velocity forcing."""
        if self.velocity_forcing == "off":
            return result
        context = context_mean(clean, sizes)
        if self.velocity_forcing == "context_mix":
            context = clean + self.velocity_forcing_mix * (context - clean)
        target = noise - self.velocity_forcing_scale * context
        if velocity_is_reversed(self.target, self.time_input):
            target = -target
        error = frame_error(output.sample, target).mean(1)
        terms = {
            **result.terms,
            "loss_denoising": result.loss.detach(),
            "loss_velocity_forcing": error.detach().mean(),
        }
        return replace(
            result,
            loss=result.loss + error.mean(),
            per_sample=result.per_sample + error.detach(),
            terms=terms,
        )


def context_mean(clean: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return for every frame the mean of the frames at its place in the blocks before.

    Blocks of another length are resampled by their nearest frames; the first block, which has no
    context, gets itself.

    Args:
        clean: ``(B, C, F, H, W)``.
        sizes: frames of each block.
    """
    blocks = clean.split(list(sizes), dim=2)
    parts, before = [blocks[0]], [blocks[0]]
    for block in blocks[1:]:
        parts.append(torch.stack([_resampled(b, block.shape[2]) for b in before]).mean(0))
        before.append(block)
    return torch.cat(parts, dim=2)


def _resampled(block: Tensor, frames: int) -> Tensor:
    """Return a block with another number of frames, the nearest ones."""
    own = block.shape[2]
    if own == frames:
        return block
    places = ((torch.arange(frames) + 0.5) * own / frames).long().clamp(max=own - 1)
    return block[:, :, places.to(block.device)]
