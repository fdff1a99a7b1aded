"""Training of latent upscalers in three stages: latents, latents and pixels, pixels.

Razin, Kazantsev and Makarov, "One Small Step in Latent, One Giant Leap for Pixels",
arXiv:2511.10629. The curriculum is no option there: from pixels alone, latents leave the range of
the decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from genscale import rng as keyed
from genscale.autoencoders.base import Autoencoder
from genscale.data.base import ImageDataset
from genscale.errors import ConfigError, did_you_mean
from genscale.metrics.features import FeatureNetwork
from genscale.rng import Purpose, StepRandom
from genscale.training.kept_latents import KeptLatents
from genscale.training.reconstruction import lacking, map_distance, psnr
from genscale.training.trainable import MODEL, GroupLosses, PictureBatch
from genscale.training.upscaling import UpscalerRecipe, UpscalerTraining, interpolated, reduced
from genscale.upscaling.interpolation import Interpolation
from genscale.upscaling.latent_space import autoencoder_facts, decoder_affine, space_of
from genscale.upscaling.loading import UpscalerFacts, load_upscaler
from genscale.upscaling.losses import (
    FourierNorm,
    HighPass,
    downscaled_loss,
    eagle_loss,
    fourier_loss,
    high_frequency_loss,
    l1_loss,
)
from genscale.upscaling.lua import LUA, adapt_channels

# stage -> what is lost there, by name; the weights of the paper
PUBLISHED_WEIGHTS: dict[str, dict[str, float]] = {
    "latent": {"latent_l1": 1.0, "latent_fourier": 0.1},
    "latent_pixel": {
        "latent_l1": 1.0,
        "latent_fourier": 0.1,
        "downscaled": 0.1,
        "high_frequency": 0.05,
    },
    "pixel": {"pixel_l1": 10.0, "pixel_fourier": 1.0, "eagle": 5e-5},
}
_OF_LATENTS = ("latent_l1", "latent_fourier")
_OF_PIXELS = ("downscaled", "high_frequency", "pixel_l1", "pixel_fourier", "eagle", "perceptual")
_MEASURED = 64  # pictures encoded at once where latents are measured


@dataclass(frozen=True, slots=True)
class Stage:
    """Where a step stands in the curriculum.

    Attributes:
        name: ``latent``, ``latent_pixel`` or ``pixel``.
        number: 1, 2 or 3.
        weights: of the losses that are not 0.
        one_head: whether one scale, drawn by the step, learns alone.
    """

    name: str
    number: int
    weights: dict[str, float]
    one_head: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentUpscaling(UpscalerRecipe):
    """LUA's curriculum, counted in optimizer steps.

    A run that is longer than all stages stays in its last one; a stage of 0 steps is left out.
    Losses of pixels compare the decoder's pictures, in [-1, 1] as it gives them, with the data's.

    Args:
        stages: optimizer steps of ``latent``, ``latent_pixel`` and ``pixel``.
        weights: of single losses, by stage, where they differ from the published ones.
        perceptual: a feature network that gives maps with gradients, or None. Their distance is
            a further loss of pixels, ours, with the weight that ``weights`` gives ``perceptual``.
        one_head_last: share of every stage, at its end, in which each step trains one scale that
            is drawn; published: 50k of 125k steps.
        fourier_norm: of the Fourier losses; the paper does not say.
        downscaled_by: how much smaller pictures are compared in stage 2: 2 (as in the paper's
            appendix), or ``match_scale`` (as in its text).
        highpass: of EAGLE; see :func:`~genscale.upscaling.losses.eagle_weight`.
        encode_once: encode all pictures before the first step and keep their latents in memory,
            rather than encode every batch; for data that are neither cut, turned nor mirrored.
        start: a run, folder or file of a LUA to go on from; None starts anew.
        adapt: start the convolutions that touch latents anew: ``start`` is of another latent space
            of as many channels. With other channels that is done in any case.
        frozen_steps: optimizer steps at first in which these convolutions alone learn.

    Raises:
        ConfigError: a value out of range, or an unknown name.
    """

    stages: Mapping[str, int] = field(
        default_factory=lambda: dict.fromkeys(PUBLISHED_WEIGHTS, 125_000)
    )
    weights: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    perceptual: FeatureNetwork | None = None
    one_head_last: float = 0.4
    fourier_norm: FourierNorm = "ortho"
    downscaled_by: int | Literal["match_scale"] = 2
    highpass: HighPass = "paper"
    encode_once: bool = False
    start: str | None = None
    adapt: bool = False
    frozen_steps: int = 0

    def __post_init__(self) -> None:
        UpscalerRecipe.__post_init__(self)
        _check_names("objective.stages", self.stages, PUBLISHED_WEIGHTS)
        _check_names("objective.weights", self.weights, PUBLISHED_WEIGHTS)
        for stage, weights in self.weights.items():
            _check_names(f"objective.weights.{stage}", weights, (*_OF_LATENTS, *_OF_PIXELS))
        steps = [self.stages.get(name, 0) for name in PUBLISHED_WEIGHTS]
        if min(steps) < 0 or sum(steps) < 1:
            raise ConfigError(
                "objective.stages must give optimizer steps of 0 or more, and not all 0, but "
                f"{dict(self.stages)} was given. Give e.g. {{latent: 600, latent_pixel: 200, "
                "pixel: 200}."
            )
        for stage in (name for name in PUBLISHED_WEIGHTS if self.stages.get(name, 0)):
            found = self.weights_of(stage)
            if not found or min(found.values()) < 0:
                raise ConfigError(
                    f"objective.weights.{stage} must not be negative and leave some loss, but "
                    f"{dict(self.weights[stage])} was given. Leave one out, or give {stage}=0 "
                    "steps."
                )
        judged = any("perceptual" in self.weights_of(stage) for stage in PUBLISHED_WEIGHTS)
        if judged != (self.perceptual is not None):
            raise ConfigError(
                "objective.perceptual is a network and objective.weights.pixel.perceptual its "
                f"weight, but {'only the weight' if judged else 'only the network'} was given. "
                "Give both, or neither."
            )
        if not 0.0 <= self.one_head_last <= 1.0:
            raise ConfigError(
                f"objective.one_head_last must lie in [0, 1], but {self.one_head_last} was given."
            )
        if self.downscaled_by != "match_scale" and not int(self.downscaled_by) >= 1:
            raise ConfigError(
                "objective.downscaled_by must be a whole number from 1 on or match_scale, but "
                f"{self.downscaled_by} was given."
            )
        if self.encode_once and (self.patch_size is not None or self.turned):
            raise ConfigError(
                "objective.encode_once=true keeps the latents of whole pictures, but patch_size="
                f"{self.patch_size} and turned={self.turned} change them at every step. Give one "
                "or the other."
            )
        if self.frozen_steps < 0 or (self.start is None and (self.frozen_steps or self.adapt)):
            raise ConfigError(
                f"objective.frozen_steps={self.frozen_steps} and adapt={self.adapt} are of a LUA "
                "to go on from. Give objective.start=<its run>, or leave them out."
            )

    def check(self) -> list[str]:
        """Return a sentence for what the feature network lacks."""
        return lacking(self.perceptual)

    def weights_of(self, stage: str) -> dict[str, float]:
        """Return the weights of a stage's losses; those that are 0 are left out."""
        merged = {**PUBLISHED_WEIGHTS[stage], **self.weights.get(stage, {})}
        return {name: float(weight) for name, weight in merged.items() if weight}

    def stage_at(self, step: int) -> Stage:
        """Return where optimizer step ``step`` (from 0) stands."""
        used = [(name, self.stages.get(name, 0)) for name in PUBLISHED_WEIGHTS]
        used = [(name, steps) for name, steps in used if steps]
        start = 0
        for name, steps in used:
            if step < start + steps or name == used[-1][0]:
                # a last stage goes on past its steps, where a share of 0 still means never
                late = self.one_head_last > 0 and step - start >= steps * (1 - self.one_head_last)
                number = list(PUBLISHED_WEIGHTS).index(name) + 1
                return Stage(name, number, self.weights_of(name), late)
            start += steps
        raise AssertionError("the last stage has no end")

    def build(
        self, model: nn.Module, *, seed: int, autoencoder: Autoencoder | None = None
    ) -> LatentUpscalingTraining:
        """Return the training of a LUA; see :meth:`UpscalerRecipe.build`."""
        if not isinstance(model, LUA):
            raise ConfigError(
                "objective=lua trains an upscaler of latents, but the model is "
                f"{type(model).__name__}. Give model=lua, or another objective=..."
            )
        if autoencoder is None or autoencoder.downsample == 1:
            raise ConfigError(
                f"{type(model).__name__} enlarges latents, but no autoencoder was given to make "
                "them. Give autoencoder=run autoencoder.run=<run of model=kl_small>."
            )
        if autoencoder.latent_channels != model.channels:
            raise ConfigError(
                f"model.channels={model.channels}, but the latents of the autoencoder have "
                f"{autoencoder.latent_channels} channels. Leave model.channels out."
            )
        if self.start is not None:
            self._go_on(model, seed)
        return LatentUpscalingTraining(model, self, seed, autoencoder)

    def _go_on(self, model: LUA, seed: int) -> None:
        """Take over the weights of an earlier upscaler."""
        assert self.start is not None
        earlier, _ = load_upscaler(self.start)
        if not isinstance(earlier, LUA):
            raise ConfigError(
                f"objective.start={self.start} holds a {type(earlier).__name__}, but a LUA was "
                "expected. Give the run of model=lua, or a file such as lua_flux.pth."
            )
        if self.adapt or earlier.channels != model.channels:
            earlier = adapt_channels(earlier, model.channels, seed=seed)
        try:
            model.load_state_dict(earlier.state_dict())
        except RuntimeError as error:
            raise ConfigError(
                f"The LUA of objective.start={self.start} has other settings than the model: "
                f"{dict(earlier.config)}. Give model.hidden_size and so on as there."
            ) from error


class LatentUpscalingTraining(UpscalerTraining):
    """A LUA, the frozen autoencoder whose latents it enlarges, and the losses.

    Latents are those that the decoder takes, neither shifted nor scaled; of a posterior, its mean.

    Args:
        model: the upscaler.
        recipe: settings.
        seed: of the run.
        autoencoder: no part of what is trained or saved.
    """

    def __init__(
        self, model: LUA, recipe: LatentUpscaling, seed: int, autoencoder: Autoencoder
    ) -> None:
        super().__init__(model, recipe, seed)
        self.recipe = recipe
        self._autoencoder = (autoencoder.eval().requires_grad_(False),)
        self._latent_stats: dict[str, list[float]] | None = None
        self.kept: KeptLatents | None = None

    @property
    def autoencoder(self) -> Autoencoder:
        """Whose latents are enlarged."""
        return self._autoencoder[0]

    def losses(self, batch: PictureBatch, rng: StepRandom) -> GroupLosses:
        """Return the losses of one batch; see :meth:`Trainable.losses`."""
        stage = self.recipe.stage_at(batch.step)
        self.model.freeze_trunk(batch.step < self.recipe.frozen_steps)
        images = self.patches(batch, rng)
        kept = self.kept
        target = self.encode(images) if kept is None else kept.of(batch, 1)
        total = target.new_zeros(())
        terms = {"stage": total + stage.number}
        for scale in self.scales_of(batch.step, stage):
            small = self.encode(reduced(images, scale)) if kept is None else kept.of(batch, scale)
            made = self.model(small, scale).float()
            pictures = None
            if any(name in _OF_PIXELS for name in stage.weights):
                pictures = self.decode(made)
                terms[f"psnr_x{scale}"] = psnr((pictures - images).square().mean().detach())
            for name, weight in stage.weights.items():
                both = (made, target) if name in _OF_LATENTS else (pictures, images)
                loss = self._distances(scale)[name](*both)
                total = total + weight * loss
                terms[f"loss_{name}_x{scale}"] = loss.detach()
        return GroupLosses({MODEL: total}, terms)

    def scales_of(self, step: int, stage: Stage) -> tuple[int, ...]:
        """Return the scales that learn in a step: all, or one drawn, the same everywhere."""
        scales: tuple[int, ...] = self.model.scales
        if not stage.one_head or len(scales) == 1:
            return scales
        keys = keyed.key(self.seed, torch.tensor([step]), Purpose.HEAD)
        drawn = keyed.integers(keys, len(scales))
        return (scales[int(drawn)],)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the latents ``(B, C, h, w)`` of pictures in [-1, 1], as the decoder takes them."""
        latents = self.autoencoder.to(images.device).encode(images.float()).float()
        shift, scale = decoder_affine(self.autoencoder, latents)
        return latents / scale + shift

    def decode(self, latents: Tensor) -> Tensor:
        """Return the pictures of such latents, with gradient; not clipped."""
        shift, scale = decoder_affine(self.autoencoder, latents)
        return self.autoencoder.decode((latents - shift) * scale).float()

    def enlarge(self, network: Any, images: Tensor, scale: int) -> Tensor:
        """Return pictures made small, encoded, enlarged and decoded; see the base class."""
        latents = self.encode(reduced(images, scale))
        return self.decode(network(latents, scale).float()).clamp(-1.0, 1.0)

    def baselines(self, images: Tensor, scale: int) -> dict[str, Tensor]:
        """Return the base class's, and what else autoencoder and bicubic filter make.

        ``bicubic_decoded`` reads what LUA reads: it enlarges the small picture that the decoder
        makes of the latents, as a pipeline without an upscaler would. ``bicubic_latent`` enlarges
        the latents. ``autoencoder`` is what an upscaler attains that makes no mistake.
        """
        bicubic = Interpolation(channels=self.model.channels, scales=self.model.scales)
        small = self.decode(self.encode(reduced(images, scale))).clamp(-1.0, 1.0)
        return {
            **super().baselines(images, scale),
            "bicubic_decoded": interpolated(small, scale),
            "bicubic_latent": self.enlarge(bicubic, images, scale),
            "autoencoder": self.decode(self.encode(images)).clamp(-1.0, 1.0),
        }

    def keep(self, pictures: ImageDataset, seed: int) -> None:
        """Encode pictures once where the recipe says so, rather than at every step.

        Args:
            pictures: of training.
            seed: of their stream.
        """
        if self.recipe.encode_once:
            self.kept = KeptLatents(
                pictures, seed=seed, encode=self.encode, reduce=reduced, scales=self.model.scales
            )

    def measure(self, images: Tensor) -> None:
        """Measure mean and deviation of every channel of the inputs of the first scale."""
        parts = torch.split(images, _MEASURED)
        small = torch.cat([self.encode(reduced(p, self.model.scales[0])) for p in parts]).double()
        std = small.std((0, 2, 3)).clamp(min=1e-6)
        self._latent_stats = {"mean": small.mean((0, 2, 3)).tolist(), "std": std.tolist()}

    def facts(self, **known: Any) -> UpscalerFacts:
        """Return what must be known of the upscaler, its latent space included."""
        return super().facts(
            family=space_of(self.autoencoder),
            latent_stats=self._latent_stats,
            autoencoder=autoencoder_facts(self.autoencoder),
            **known,
        )

    def input_shape(self, resolution: int) -> tuple[int, ...]:
        """Return the shape of one input's latents."""
        channels, height, width = super().input_shape(resolution)
        return (
            channels,
            height // self.autoencoder.downsample,
            width // self.autoencoder.downsample,
        )

    def _distances(self, scale: int) -> dict[str, Callable[..., Tensor]]:
        by = self.recipe.downscaled_by
        fourier = partial(fourier_loss, norm=self.recipe.fourier_norm)
        return {
            "latent_l1": l1_loss,
            "latent_fourier": fourier,
            "downscaled": partial(
                downscaled_loss, factor=scale if by == "match_scale" else int(by)
            ),
            "high_frequency": high_frequency_loss,
            "pixel_l1": l1_loss,
            "pixel_fourier": fourier,
            "eagle": partial(eagle_loss, highpass=self.recipe.highpass),
            "perceptual": self._unlike,
        }

    def _unlike(self, made: Tensor, images: Tensor) -> Tensor:
        assert self.recipe.perceptual is not None
        return map_distance(self.recipe.perceptual.to(images.device), images, made)


def _check_names(where: str, given: Any, known: Any) -> None:
    """Raise a :class:`ConfigError` unless a mapping's names are all known."""
    for name in given:
        if name not in known:
            raise ConfigError(
                f"{where} names '{name}', but one of {', '.join(known)} was expected."
                f"{did_you_mean(str(name), list(known))}"
            )
