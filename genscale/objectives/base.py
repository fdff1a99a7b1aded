"""The contract of an objective, and what passes between objectives, guidance and samplers.

A network's parameterisation (noise, velocity, ...) is known to its objective alone. Samplers,
guidance and search see a :class:`Denoiser`: (noisy sample, level) -> clean and noise estimates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from genscale.backbones.base import Backbone
from genscale.conditioning.base import Conditioning
from genscale.layers.scales import Scales
from genscale.rng import StepRandom

if TYPE_CHECKING:
    from genscale.objectives.schedule import NoiseProcess

Family = Literal["diffusion", "scale_wise"]


@dataclass(frozen=True, slots=True)
class Level:
    """A noise level: x_t = alpha x_0 + sigma eps.

    The numbers are float64 and stay on the CPU, so that schedules are exact and that guidance
    can branch on them without waiting for a device. Shape ``(B,)``, or ``(1,)`` when all
    particles share one level (networks then compute their time embedding once). Where the frames
    of a clip have levels of their own, ``(B, F)`` or ``(1, F)``.

    Attributes:
        alpha: signal coefficient.
        sigma: noise coefficient.
        time: the noising process's own time, where the caller knows it; None lets the objective
            find the time of equal signal-to-noise ratio.
    """

    alpha: Tensor
    sigma: Tensor
    time: Tensor | None = None

    def __len__(self) -> int:
        return len(self.alpha)

    @property
    def by_frame(self) -> bool:
        """Whether frames have levels of their own."""
        return self.alpha.dim() > 1

    @property
    def log_snr(self) -> Tensor:
        """Lambda = log(alpha / sigma) (half the log of the signal-to-noise ratio)."""
        return torch.log(self.alpha) - torch.log(self.sigma)

    def select(self, index: Tensor) -> Level:
        """Take rows; a shared level stays shared."""
        if len(self) == 1:
            return self
        return Level(
            self.alpha[index], self.sigma[index], None if self.time is None else self.time[index]
        )

    def expand(self, n: int) -> Level:
        """Give a shared level one row a particle."""
        if len(self) == n:
            return self
        shape = (n, *self.alpha.shape[1:])
        return Level(
            self.alpha.expand(shape),
            self.sigma.expand(shape),
            None if self.time is None else self.time.expand(shape),
        )


def on(value: Tensor, like: Tensor) -> Tensor:
    """Put per-particle numbers ``(B,)`` or ``(1,)`` on ``like``'s device and dtype, broadcastable.

    Returns shape ``(B or 1, 1, ..., 1)`` with as many axes as ``like``. Numbers a frame, ``(B, F)``
    or ``(1, F)``, become ``(B or 1, 1, F, 1, 1)`` against clips ``(B, C, F, H, W)``.
    """
    value = value.to(device=like.device, dtype=like.dtype, non_blocking=True)
    if value.dim() > 1:
        return value.reshape(len(value), 1, -1, *([1] * (like.dim() - 3)))
    return value.view(-1, *([1] * (like.dim() - 1)))


@dataclass(slots=True)
class Prediction:
    """What a denoiser says of x_t.

    Attributes:
        clean: estimate of x_0, shaped as x_t.
        noise: estimate of eps. For one network it satisfies x_t = alpha clean + sigma noise;
            guidance may break the tie (CFG++ re-noises with the unconditional one).
        memory: what to hand to the next call.
        cost: ``(B,)`` float64 on the CPU: network evaluations spent on each particle.
        variance: shaped as x_t: where a network with learned variance places log sigma^2 between
            its bounds, -1 the lower and 1 the upper one (arXiv:2102.09672, eq. 15); else None.
    """

    clean: Tensor
    noise: Tensor
    memory: Any = None
    cost: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    variance: Tensor | None = None


@dataclass(slots=True)
class ScalePrediction:
    """What a scale-wise network says of the tokens of one scale.

    Attributes:
        logits: ``(B, l, V)`` float32.
        memory: what to hand to the next scale.
        cost: ``(B,)`` float64 on the CPU: network evaluations spent on each particle.
    """

    logits: Tensor
    memory: Any
    cost: Tensor


class View(ABC):
    """A network as samplers and guidance see it.

    Attributes:
        sample_shape: shape of one sample, ``(C, H, W)``.
        device: where samples live.
    """

    sample_shape: tuple[int, ...]
    device: torch.device


class Denoiser(View):
    """The one signature that samplers of diffusion models call.

    Attributes:
        process: the noising process whose levels the model was trained on.
    """

    process: NoiseProcess

    @abstractmethod
    def __call__(
        self, x: Tensor, level: Level, cond: Conditioning, memory: Any = None
    ) -> Prediction:
        """Estimate clean sample and noise of ``x`` ``(B, ...)``, float32 or float64."""

    def begin(self, batch: int, shape: tuple[int, ...]) -> Any:
        """Return the memory of ``batch`` videos of ``shape`` that begin; None where there is none.

        Without it a video begins too, at the first call; with it, videos that stand at different
        frames can be held together from the start on.
        """
        return None

    def refresh(
        self, x: Tensor, level: Level, cond: Conditioning, memory: Any = None
    ) -> Prediction:
        """Let the network read finished frames, for what it remembers of them alone.

        A guided view reads them in every branch, whatever it would guide at this level.
        """
        return self(x, level, cond, memory)


class ScaleTokens(Protocol):
    """What samplers of scale-wise models need of a tokenizer (``autoencoders.base``)."""

    @property
    def vocab_size(self) -> int:
        """Number of codes V."""

    @property
    def scales(self) -> Scales:
        """Height and width of every scale, coarse first."""

    def at_scales(self, scales: Sequence[int | Sequence[int]]) -> ScaleTokens:
        """Return this tokenizer for other scales; weights are shared."""

    def tokens(self, images: Tensor) -> Tensor:
        """Return the tokens ``(B, L)`` of all scales of images ``(B, C, H, W)`` in [-1, 1]."""

    def codes(self, tokens: Tensor) -> Tensor:
        """Return the codes ``(B, n, Cv)`` of tokens ``(B, n)``."""

    def add_scale(self, running: Tensor, codes: Tensor, scale: int) -> tuple[Tensor, Tensor | None]:
        """Add a scale's codes to the running latent; also give the next scale's features."""


class ScaleDecoder(View):
    """The one signature that the sampler of scale-wise models calls.

    Attributes:
        tokenizer: from tokens to the running latent.
        scales: height and width of every scale, coarse first.
        vocab_size: number of codes V.
        needs_prefix: whether a scale reads what earlier scales left in memory.
    """

    tokenizer: ScaleTokens
    scales: Scales
    vocab_size: int
    needs_prefix: bool

    @abstractmethod
    def begin(self, cond: Conditioning, batch: int) -> Any:
        """Return the memory of ``batch`` trajectories that begin: what is computed once a sample.

        It consists of nested dicts and lists of tensors whose first axis is the particle.
        """

    @abstractmethod
    def __call__(
        self, features: Tensor, scale: int, cond: Conditioning, memory: Any = None
    ) -> ScalePrediction:
        """Predict the tokens of one scale, the same for all rows.

        Args:
            features: ``(B, l, Cv)`` running latents as the scale sees them.
            scale: its number k; scales come in order, from 0.
            cond: conditions of B samples; read where ``memory`` is None.
            memory: what :meth:`begin` or the scale before handed back; None begins at scale 0.
        """


@dataclass(frozen=True, slots=True)
class Batch:
    """A prepared training batch.

    Shapes:
        clean: ``(B, C, H, W)`` float32 latents or pixels x_0; for scale-wise models the tokens
            ``(B, L)`` int64 of all scales.
        cond: conditions, drop-out already applied.
        position: ``(B,)`` int64 global stream positions; all randomness is keyed by them.
        features: ``(B, L, Cv)`` what a scale-wise model reads while it predicts the tokens.
        samples_seen: training progress, the same on all processes.
    """

    clean: Tensor
    cond: Conditioning
    position: Tensor
    features: Tensor | None = None
    samples_seen: int = 0


@dataclass(slots=True)
class LossOutput:
    """A loss with its parts.

    Attributes:
        loss: scalar to differentiate.
        terms: detached scalars to log, by name.
        per_sample: ``(B,)`` detached.
        t: ``(B,)`` times of the noising process, for loss-by-time plots.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    per_sample: Tensor
    t: Tensor


class Objective(ABC):
    """What is learned. Frozen settings, no state, no parameters.

    Attributes:
        family: which samplers and guidances fit: ``diffusion`` or ``scale_wise``.
        process: the noising process of a diffusion objective.
    """

    family: ClassVar[Family] = "diffusion"
    process: NoiseProcess

    @abstractmethod
    def loss(self, backbone: Backbone, batch: Batch, rng: StepRandom) -> LossOutput:
        """Compute the training loss of a batch; noise and time come from ``rng`` alone."""

    @abstractmethod
    def view(
        self, backbone: Backbone, tokenizer: Any = None, *, shape: tuple[int, ...] | None = None
    ) -> Any:
        """Return the generator view of a trained backbone.

        Args:
            backbone: the network.
            tokenizer: :class:`ScaleTokens` of a scale-wise model; others do not look at it.
            shape: of the samples to be made, where they are to have another size than the
                backbone's ``sample_shape``.

        Returns:
            a :class:`Denoiser` or a :class:`ScaleDecoder`, as the family is.
        """
