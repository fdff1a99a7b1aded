"""Where a model that enlarges takes low-resolution references from: another model, or data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from genscale.conditioning.base import Conditioning
from genscale.conditioning.low_resolution import LowResolution
from genscale.data.base import ImageDataset
from genscale.errors import ConfigError
from genscale.io.images import from_uint8


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked of a batch of samples.

    Shapes:
        ids: ``(B,)`` int64 numbers of the samples in their set.
        seeds: ``(B,)`` int64.
        labels: ``(B,)`` int64, or None.
        captions: B prompts, or None.
        negative_prompt: what guidance leads away from.
        frame_rate: frames a second of clips.
    """

    ids: Tensor
    seeds: Tensor
    labels: Tensor | None = None
    captions: tuple[str, ...] | None = None
    negative_prompt: str | None = None
    frame_rate: float | None = None


class References(ABC):
    """Low-resolution references of samples.

    Args:
        low_resolution: how the model was trained on references.
        level: of the noise added to them; None is the usual one.

    Attributes:
        nfe: network evaluations a sample spent on references, mean over those made here.
    """

    def __init__(self, low_resolution: LowResolution, level: float | None = None) -> None:
        self.low_resolution = low_resolution
        self.level = low_resolution.checked(level)
        self.nfe = 0.0

    @property
    @abstractmethod
    def source(self) -> str:
        """What protocols call where they come from."""

    @property
    def label(self) -> str:
        """What protocols say of references: their source and the noise on them."""
        return f"enlarging {self.source} at level {self.level:g}"

    def record(self) -> dict[str, Any]:
        """Return what is written beside samples."""
        return {
            "base": self.source,
            "reference_level": self.level,
            "base_nfe_per_sample": self.nfe,
        }

    @abstractmethod
    def at(self, image_shape: tuple[int, ...]) -> References:
        """Return references for samples of another size.

        Args:
            image_shape: of a sample of the model that enlarges.

        Raises:
            ConfigError: there are none for that size.
        """

    @abstractmethod
    def pictures(self, wanted: Wanted) -> Tensor:
        """Return references ``(B, C, [T,] h, w)`` in about [-1, 1], without noise."""

    def add(self, cond: Conditioning, wanted: Wanted) -> Conditioning:
        """Return conditions with references.

        Args:
            cond: of B samples.
            wanted: what they are conditions of.
        """
        pictures = self.pictures(wanted)
        reference, level = self.low_resolution.of_samples(pictures, wanted.seeds, self.level)
        return replace(cond, reference=reference, reference_level=level)


class Generating(Protocol):
    """What is looked at in a pipeline."""

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of its samples."""

    @property
    def makes_clips(self) -> bool:
        """Whether samples are clips."""

    num_classes: int
    text: Any

    def at(self, size: Sequence[int]) -> Generating:
        """Return it for pictures of another height and width."""

    def conditions(
        self,
        count: int,
        *,
        labels: Tensor | None = None,
        captions: Sequence[str] | None = None,
        negative_prompt: str | None = None,
        frame_rate: float | None = None,
    ) -> Conditioning:
        """Return the conditions of samples as its network reads them."""

    def sample(self, cond: Conditioning, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """Return samples and the evaluations spent on each."""


class BaseSamples(References):
    """Samples of a smaller model: those that it makes itself of the same seeds and prompts.

    Args:
        base: the smaller model, with its own sampler and guidance.
        image_shape: of the samples of the model that enlarges.
        low_resolution: how that was trained.
        level: see :class:`References`.
        name: what protocols call the smaller model.

    Raises:
        ConfigError: the smaller model makes other pictures than references have to be, or needs
            prompts that the other does not get.
    """

    def __init__(
        self,
        base: Generating,
        image_shape: tuple[int, ...],
        low_resolution: LowResolution,
        level: float | None = None,
        *,
        name: str = "base",
    ) -> None:
        super().__init__(low_resolution, level)
        channels, *frames, height, width = image_shape
        factor = low_resolution.factor
        expected = (channels, *frames, *low_resolution.sides_below((height, width)))
        still = (channels, *expected[-2:])  # one picture for all frames
        if base.image_shape not in (expected, still):
            raise ConfigError(
                f"base={name} makes samples of shape {list(base.image_shape)}, but references of "
                f"shape {list(expected)} are needed: low_resolution.factor is {factor} in the run "
                "that enlarges. Give base=<run> of a model of that size."
            )
        self.base, self.name = base, name
        self._made = 0

    @property
    def source(self) -> str:
        """Samples of the smaller model."""
        return f"samples of {self.name}"

    def at(self, image_shape: tuple[int, ...]) -> BaseSamples:
        """Return samples of the smaller model at the size that fits; see :class:`References`."""
        base = self.base.at(self.low_resolution.sides_below(image_shape[-2:]))
        return BaseSamples(base, image_shape, self.low_resolution, self.level, name=self.name)

    def pictures(self, wanted: Wanted) -> Tensor:
        """Return the samples that the smaller model makes of the same seeds and prompts."""
        if self.base.text is not None and wanted.captions is None:
            raise ConfigError(
                f"base={self.name} reads prompts, but the model that enlarges reads none. Give "
                "base=<run> of a model without text."
            )
        count = len(wanted.ids)
        cond = self.base.conditions(
            count,
            labels=wanted.labels if self.base.num_classes else None,
            captions=wanted.captions if self.base.text is not None else None,
            negative_prompt=wanted.negative_prompt if self.base.text is not None else None,
            frame_rate=wanted.frame_rate if self.base.makes_clips else None,
        )
        images, nfe = self.base.sample(cond, wanted.seeds)
        self.nfe = (self.nfe * self._made + float(nfe.sum())) / (self._made + count)
        self._made += count
        return images


class ReducedData(References):
    """Pictures of a data set, reduced: sample i enlarges its i-th picture, of the sample's class.

    Args:
        data: pictures or clips of the enlarged size.
        low_resolution: how the model was trained.
        level: see :class:`References`.
        device: where references go.
        size: height and width of the enlarged pictures, where they are not the data's own.

    Raises:
        ConfigError: the data's pictures cannot be had at that size.
    """

    def __init__(
        self,
        data: ImageDataset,
        low_resolution: LowResolution,
        level: float | None = None,
        *,
        device: torch.device | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(low_resolution, level)
        self.data, self.device = data, device or torch.device("cpu")
        self.size = size
        if size is not None and not data.reaches(size):
            raise ConfigError(
                f"Pictures of {size[0]} x {size[1]} are to be enlarged from reduced '{data.name}', "
                f"whose pictures cannot be had at that size. Leave size out, or give base=<run of "
                "a smaller model>."
            )

    @property
    def source(self) -> str:
        """The data set, reduced."""
        return f"reduced {self.data.name}"

    def at(self, image_shape: tuple[int, ...]) -> ReducedData:
        """Return reduced pictures of another size; see :class:`References`."""
        self.low_resolution.sides_below(image_shape[-2:])
        size = (image_shape[-2], image_shape[-1])
        return ReducedData(
            self.data, self.low_resolution, self.level, device=self.device, size=size
        )

    def pictures(self, wanted: Wanted) -> Tensor:
        """Return reduced pictures; the data may lack a class that is wanted, then any other."""
        labels, rows = self.data.labels, []
        for place, number in enumerate(wanted.ids.tolist()):
            known = torch.arange(len(self.data))
            if labels is not None and wanted.labels is not None:
                of_class = (labels == wanted.labels[place]).nonzero()[:, 0]
                known = of_class if len(of_class) else known
            rows.append(int(known[number % len(known)]))
        data, size = self.data, self.size
        images = data.images(rows) if size is None else data.images_at(rows, size)
        return self.low_resolution.reduced(from_uint8(images).to(self.device))
