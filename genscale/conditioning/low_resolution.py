"""Low-resolution references: what a model that enlarges pictures or clips is conditioned on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from genscale import rng
from genscale.errors import ConfigError
from genscale.rng import Purpose, StepRandom


@dataclass(frozen=True, slots=True, kw_only=True)
class LowResolution:
    """How references are made of data, and how they are corrupted.

    A model of a cascade (arXiv:2106.15282) learns to enlarge reduced data, but is given samples of
    a smaller model. So that it forgives their faults, references are r + l eps with unit noise
    eps, and the model is told l: in training l is uniform on [0, ``max_level``], in sampling it is
    ``level``.

    Args:
        factor: data are so many times as high and wide as references.
        max_level: largest l in training; pixels are in [-1, 1].
        level: l in sampling, in [0, max_level].

    Raises:
        ConfigError: an impossible number.
    """

    factor: int = 4
    max_level: float = 0.5
    level: float = 0.1

    def __post_init__(self) -> None:
        whole = isinstance(self.factor, int) and not isinstance(self.factor, bool)
        if not whole or self.factor < 1:
            raise ConfigError(
                f"low_resolution.factor must be a whole number of at least 1, but is "
                f"{self.factor!r}. Give e.g. low_resolution.factor=4."
            )
        if not 0.0 <= self.max_level < math.inf:
            raise ConfigError(
                f"low_resolution.max_level must be finite and not negative, but is "
                f"{self.max_level}. 0 leaves references as they are."
            )
        self.checked(self.level, "low_resolution.level")

    def checked(self, level: float | None, name: str = "reference_level") -> float:
        """Return a level of sampling, the usual one for None.

        Raises:
            ConfigError: it lies outside of what the model was trained on.
        """
        chosen = self.level if level is None else float(level)
        if not 0.0 <= chosen <= self.max_level:
            raise ConfigError(
                f"{name} must lie in [0, {self.max_level:g}], the levels of the training, but is "
                f"{chosen:g}. Give a level in between."
            )
        return chosen

    def problems(self, model_channels: int, shape: tuple[int, ...]) -> list[str]:
        """Return a sentence for everything of the data that does not fit.

        Args:
            model_channels: ``reference_channels`` of the model.
            shape: of pictures or clips: channels first, height and width last.
        """
        found = []
        if model_channels != shape[0]:
            found.append(
                f"model.reference_channels={model_channels} must be the channels of the data's "
                f"pictures, which have {shape[0]}. Give model.reference_channels={shape[0]}."
            )
        if any(side % self.factor for side in shape[-2:]):
            found.append(
                f"low_resolution.factor={self.factor} does not divide the data's pictures of "
                f"{shape[-2]}x{shape[-1]} pixels. Give a factor of both sides."
            )
        return found

    def sides_below(self, sides: Sequence[int]) -> tuple[int, int]:
        """Return height and width of the references of pictures of a height and width.

        Raises:
            ConfigError: the factor does not divide them.
        """
        height, width = sides
        if height % self.factor or width % self.factor:
            raise ConfigError(
                f"Pictures of {height} x {width} pixels are to be enlarged {self.factor} times, "
                "low_resolution.factor, which does not divide them. Give a multiple of it."
            )
        return height // self.factor, width // self.factor

    def reduced(self, images: Tensor) -> Tensor:
        """Return the means over squares of ``factor`` pixels.

        Args:
            images: ``(B, C, [T,] H, W)``.

        Returns:
            ``(B, C, [T,] H / factor, W / factor)``.
        """
        lead = images.shape[:-3]
        small = F.avg_pool2d(images.flatten(0, -4), self.factor)
        return small.view(*lead, *small.shape[1:])

    def of_data(self, images: Tensor, draws: StepRandom) -> tuple[Tensor, Tensor]:
        """Return references and levels ``(B,)`` of a training batch ``(B, C, [T,] H, W)``."""
        reference = self.reduced(images)
        level = (self.max_level * draws.uniform(Purpose.REFERENCE_LEVEL)).float()
        noise = draws.normal(Purpose.REFERENCE, tuple(reference.shape[1:]))
        return _corrupted(reference, level.to(reference.device), noise)

    def of_samples(
        self, reference: Tensor, seeds: Tensor, level: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return corrupted references ``(B, C, [T,] h, w)`` and levels ``(B,)`` in sampling.

        Args:
            reference: in about [-1, 1].
            seeds: ``(B,)`` of the samples.
            level: l, the usual one for None.
        """
        keys = rng.key(seeds, Purpose.REFERENCE).to(reference.device, non_blocking=True)
        noise = rng.normal(keys, tuple(reference.shape[1:]))
        levels = torch.full((len(reference),), self.checked(level), device=reference.device)
        return _corrupted(reference.clamp(-1.0, 1.0), levels, noise)


def _corrupted(reference: Tensor, level: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    spread = level.view(-1, *[1] * (reference.dim() - 1))
    return reference + spread * noise.to(reference, non_blocking=True), level
