"""What is asked of samples -> their conditions, as the network reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from genscale.backbones.base import Backbone
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.text_cache import TextCache


def sample_conditions(
    model: Backbone,
    count: int,
    *,
    labels: Tensor | None = None,
    captions: Sequence[str] | None = None,
    negative_prompt: str | None = None,
    frame_rate: float | None = None,
    image_shape: tuple[int, ...] = (),
    text: TextCache | None = None,
) -> Conditioning:
    """Return the conditions of ``count`` samples.

    Args:
        model: whose samples; it is given their size where its config has ``reads_size``.
        count: number of samples B.
        labels: ``(B,)`` int64 classes, of a model that knows them.
        captions: B prompts, of a model that reads text.
        negative_prompt: text that guidance leads away from, in place of the empty one.
        frame_rate: frames a second of clips, infinity for still pictures shown as clips; None:
            not known, and not told.
        image_shape: of a finished sample, which ends with height and width in pixels.
        text: what encodes prompts.

    Raises:
        ConfigError: a frame rate that is none, or of a model that makes pictures.
    """
    cond = Conditioning(labels=labels)
    if text is not None and captions is not None:
        cond = text.condition(captions, labels=labels, negative=negative_prompt)
    if frame_rate is not None:
        check_frame_rate(frame_rate, clips=len(model.sample_shape) == 4)
        cond = replace(cond, frame_rate=torch.full((count,), float(frame_rate)))
    if model.config.get("reads_size"):
        size = torch.tensor(image_shape[-2:], dtype=torch.float32)
        cond = replace(cond, size=size.expand(count, 2).contiguous())
    return cond


def check_frame_rate(frame_rate: object, *, clips: bool) -> None:
    """Raise unless samples of a model can have this frame rate.

    Args:
        frame_rate: frames a second, as given.
        clips: whether the model makes clips.

    Raises:
        ConfigError: the model makes pictures, or the rate is no number above 0.
    """
    if not clips:
        raise ConfigError(
            f"frame_rate={frame_rate} was given, but the samples are pictures, which have none. "
            "Leave it out."
        )
    number = isinstance(frame_rate, int | float) and not isinstance(frame_rate, bool)
    if not number or not frame_rate > 0:  # type: ignore[operator]
        raise ConfigError(
            f"frame_rate must be a number above 0, frames a second, but {frame_rate} was given. "
            "Give e.g. frame_rate=8, or inf for still pictures."
        )
