"""Diffusion forcing: every block of a clip at a noise level of its own (arXiv:2407.01392)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from genscale import rng
from genscale.backbones.base import Backbone, BackboneOutput
from genscale.errors import ConfigError, did_you_mean
from genscale.layers.block_mask import block_spans
from genscale.objectives.base import Batch, LossOutput, on
from genscale.objectives.block_schedules import (
    Ramp,
    ShiftedTable,
    fused_snr_weights,
    ramp,
)
from genscale.objectives.cached_view import CachedView, block_size_of
from genscale.objectives.conversion import target_of
from genscale.objectives.denoising import DenoisingObjective
from genscale.objectives.network import extras_of, velocity_is_reversed
from genscale.objectives.paths import TrigonometricVP
from genscale.objectives.schedule import LinearFlow, NoiseProcess
from genscale.objectives.time_input import TimeInput, time_input_of
from genscale.objectives.time_sampler import TimeLaw, check_law, logit_normal, shifted
from genscale.rng import Purpose, StepRandom

ForcingTarget = Literal["velocity", "v"]
LevelsPer = Literal["block", "frame"]
ForcingWeighting = Literal["none", "bell", "fused_snr"]


class DiffusionForcing(DenoisingObjective):
    """Denoise clips whose blocks, or frames, have noise levels of their own (arXiv:2407.01392).

    A block-causal network sees earlier blocks at their levels while it denoises a block. Trained
    so it can sample with clean history, with noisy history, or all blocks at once.

    With target ``velocity`` the path is the straight one, x_t = (1 - t) x_0 + t eps, as in
    CausVid (arXiv:2412.07772) and Self-Forcing (arXiv:2506.08009); with ``v`` it is
    alpha = cos(pi t / 2), sigma = sin(pi t / 2).

    Args:
        target: what the network predicts: ``velocity`` or ``v``.
        levels: ``block`` draws a time a block, ``frame`` one a frame, as the original program.
        weighting: of squared errors: ``none``; ``bell``, which Self-Forcing's program puts over
            the levels of a flow; ``fused_snr`` of the original program, for ``v``.
        time_law: law of each time: ``uniform`` or ``logit_normal``.
        time_mean: mean of logit t, for ``logit_normal``.
        time_std: its standard deviation.
        time_shift: s moves times to s t / (1 + (s - 1) t); Self-Forcing has 5.
        time_input: which number the network is fed (:mod:`genscale.objectives.time_input`).
        noise_floor: least quantile of the law of time in the first block, and the one that later
            blocks rise towards: chunk-wise noise of BlockVid (arXiv:2511.22973); None has no floor.
        noise_ramp: how it rises: ``cosine`` or ``linear``.

    Raises:
        ConfigError: an unknown name, an impossible number, or a weighting of another target.

    Shapes:
        x_0: ``(B, C, F, H, W)``, roughly unit variance.
        t: ``(B, F)``.
    """

    def __init__(
        self,
        *,
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
        for name, value, known in (
            ("target", target, get_args(ForcingTarget)),
            ("levels", levels, get_args(LevelsPer)),
            ("weighting", weighting, get_args(ForcingWeighting)),
        ):
            check_name(name, value, known)
        needed = {"bell": "velocity", "fused_snr": "v"}.get(weighting, target)
        if needed != target:
            raise ConfigError(
                f"objective.weighting={weighting} is made for objective.target={needed}, but the "
                f"target is {target}. Use objective.weighting=none, or the other target."
            )
        process: NoiseProcess = LinearFlow() if target == "velocity" else TrigonometricVP()
        super().__init__(
            process=process, target=target, time_input=time_input, pyramid_weights=None
        )
        check_law(time_law, time_std, time_shift, path="objective")
        self.levels = levels
        self.weighting = weighting
        self.time_law = time_law
        self.time_mean = time_mean
        self.time_std = time_std
        self.time_shift = time_shift
        self.noise_floor = None if noise_floor is None else _checked_floor(noise_floor)
        self.noise_ramp = noise_ramp
        ramp(1, 0.0, 0.0, noise_ramp)
        self._table = ShiftedTable(time_shift)

    def sample_time(self, u: Tensor) -> Tensor:
        """Return t in [0, 1] of keyed uniforms ``u`` float64, elementwise."""
        time = u if self.time_law == "uniform" else logit_normal(u, self.time_mean, self.time_std)
        return shifted(time, self.time_shift)

    def sizes(self, backbone: Backbone, frames: int) -> list[int]:
        """Return the frames of each block of a clip, as the network's mask has them.

        Raises:
            ConfigError: a network that is not block-causal.
            ValueError: frames that do not divide into blocks.
        """
        first = bool(getattr(backbone, "independent_first_frame", False))
        spans = block_spans(frames, block_size_of(backbone), short_first=first)
        return [stop - start for start, stop in spans]

    def times(self, step: StepRandom, sizes: Sequence[int]) -> Tensor:
        """Draw the time of every frame: ``(B, F)`` float64, equal inside a block by default."""
        repeats = torch.tensor(sizes)
        count = len(sizes) if self.levels == "block" else sum(sizes)
        u = rng.uniform(rng.key(step.seed, step.position, Purpose.TIME), (count,))
        if self.noise_floor is not None:
            floor = u.new_tensor(ramp(len(sizes), *self.noise_floor, self.noise_ramp))
            if self.levels == "frame":
                floor = floor.repeat_interleave(repeats.to(u.device))
            u = torch.maximum(u, floor)
        time = self.sample_time(u)
        if self.levels == "frame":
            return time
        return time.repeat_interleave(repeats.to(u.device), dim=1)

    def loss(self, backbone: Backbone, batch: Batch, rng: StepRandom) -> LossOutput:
        """Compute the loss of a batch of clips; see the class.

        Raises:
            ConfigError: a network that is not block-causal.
            ValueError: clips that are not whole blocks.
        """
        clean = batch.clean
        sizes = self.sizes(backbone, clean.shape[2])
        time = self.times(rng, sizes).to(clean.device, non_blocking=True)
        noise = rng.normal(Purpose.NOISE, tuple(clean.shape[1:])).to(clean, non_blocking=True)
        alpha, sigma = self.process.coefficients(time)
        alpha_x, sigma_x = on(alpha, clean), on(sigma, clean)
        x = alpha_x * clean + sigma_x * noise
        number = time_input_of(self.time_input, time, alpha, sigma)
        output = self.predict(backbone, x, number, batch, rng, sizes)
        self.check_variance("variance" in output.aux)
        extras = extras_of(self.target, self.process, time, clean, self.sigma_data)
        target = target_of(self.target, clean, noise, alpha_x, sigma_x, extras)
        if velocity_is_reversed(self.target, self.time_input):
            target = -target
        error = frame_error(output.sample, target)
        weight = self.weights(time, alpha, sigma)
        per_sample = (error if weight is None else weight * error).mean(1)
        result = LossOutput(per_sample.mean(), {}, per_sample.detach(), time.mean(1).float())
        return self.complete(result, output, clean, noise, sizes)

    def predict(
        self,
        backbone: Backbone,
        x: Tensor,
        number: Tensor,
        batch: Batch,
        rng: StepRandom,
        sizes: Sequence[int],
    ) -> BackboneOutput:
        """Ask the network about noisy clips; block-causal attention among them is its own.

        Args:
            backbone: the network.
            x: ``(B, C, F, H, W)``.
            number: ``(B, F)`` what it is fed for the times.
            batch: of the step.
            rng: of the step.
            sizes: frames of each block.
        """
        return backbone(x, number, batch.cond)

    def complete(
        self,
        result: LossOutput,
        output: BackboneOutput,
        clean: Tensor,
        noise: Tensor,
        sizes: Sequence[int],
    ) -> LossOutput:
        """Add terms beside the error of the prediction; the default has none."""
        return result

    def weights(self, time: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor | None:
        """Return the weight ``(B, F)`` float32 of each frame's squared error, or None for 1."""
        if self.weighting == "none":
            return None
        if self.weighting == "fused_snr":
            return fused_snr_weights((alpha / sigma).square()).float()
        table = self._table
        place = (time[..., None] - table.sigmas.to(time.device)).abs().argmin(-1)
        return table.weights.to(time.device)[place].float()

    def view(
        self, backbone: Backbone, tokenizer: Any = None, *, shape: tuple[int, ...] | None = None
    ) -> CachedView:
        """Return the generator view of a trained backbone, which remembers earlier frames."""
        return CachedView(backbone, self.process, self.target, self.time_input, shape=shape)


def frame_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of every frame, ``(B, F)`` float32."""
    off = prediction.float() - target.float()
    return off.square().mean(dim=(1, 3, 4))


def check_name(name: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse a value of ``objective.<name>`` that is not known.

    Raises:
        ConfigError: naming the nearest one.
    """
    if value not in known:
        raise ConfigError(
            f"objective.{name} must be one of {', '.join(known)}, but is {value!r}."
            f"{did_you_mean(str(value), known)}"
        )


def _checked_floor(floor: Sequence[float]) -> tuple[float, float]:
    if len(floor) != 2 or not 0.0 <= floor[0] <= floor[1] < 1.0:
        raise ConfigError(
            "objective.noise_floor must be [first, last] with 0 <= first <= last < 1, but is "
            f"{list(floor)}. Give e.g. [0,0.2], or null for no floor."
        )
    return float(floor[0]), float(floor[1])
