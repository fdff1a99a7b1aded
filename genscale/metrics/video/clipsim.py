"""CLIPSIM: how well frames fit the caption of their clip (arXiv:2104.14806)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from genscale.errors import ConfigError
from genscale.metrics.video.clips import flat_frames
from genscale.metrics.video.measures import ClipMeasure


class TextImageModel(Protocol):
    """What CLIPSIM needs of a model: :class:`genscale.rewards.clip.CLIPScore` has it."""

    label: str

    def check(self) -> list[str]:
        """Return a sentence for everything that is missing."""

    def to(self, device: torch.device | str) -> Any:
        """Move the network."""

    def prepare(self, requests: Sequence[Any]) -> Tensor:
        """Return a handle of captions."""

    def cosines(self, images: Tensor, handle: Tensor, index: Tensor) -> Tensor:
        """Return the cosine of every picture (in [0, 1]) and its caption."""


@dataclass(frozen=True, slots=True)
class _Asked:
    caption: str


class CLIPSIM(ClipMeasure):
    """The mean over frames of cos(image embedding, text embedding), averaged over clips.

    Published numbers take CLIP ViT-B/32 with bicubic resizing to 224 pixels and a centre crop
    (``exact: true`` of the model), and captions cut to 77 tokens; some are multiplied by 100, this
    one is not. The model, its weights and the number of frames are part of the protocol.

    Args:
        model: e.g. CLIPScore of a local folder of openai/clip-vit-base-patch32.
        frames_a_pass: frames seen at once.
        name: of the metric.

    Raises:
        ConfigError: ``frames_a_pass`` is below 1.
    """

    reads_captions = True
    resize = "clip_bicubic_centre_crop"

    def __init__(
        self, model: TextImageModel, *, frames_a_pass: int = 64, name: str = "clipsim"
    ) -> None:
        if frames_a_pass < 1:
            raise ConfigError(f"frames_a_pass={frames_a_pass} is below 1. Give a positive number.")
        self.model = model
        self.frames_a_pass = frames_a_pass
        self.name = name

    @property
    def description(self) -> str:
        """The model with its settings and weights."""
        return f"cosine of {self.model.label}"

    def check(self) -> list[str]:
        """Return what the model complains of."""
        return self.model.check()

    def prepare(self, device: torch.device) -> None:
        """Choose where the model runs; its weights are read at the first clips."""
        self.model.to(device)

    def of_clips(self, clips: Tensor, captions: Sequence[str] | None) -> Tensor:
        """Return the mean cosine of each clip."""
        if captions is None:
            return torch.full((len(clips), 1), torch.nan, dtype=torch.float64)
        handle = self.model.prepare([_Asked(caption) for caption in captions])
        count = clips.shape[2]
        index = torch.arange(len(clips)).repeat_interleave(count)
        frames = flat_frames(clips, self.frames_a_pass)
        cosines = [
            self.model.cosines(part.float() / 255.0, handle, rows)
            for part, rows in zip(frames, index.split(self.frames_a_pass), strict=True)
        ]
        return torch.cat(cosines).double().unflatten(0, (len(clips), count)).mean(1, keepdim=True)
