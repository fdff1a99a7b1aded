"""The protocol of one result of a suite: how samples were made, and how they were looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from genscale.errors import DataError
from genscale.metrics.agreement import Judge
from genscale.metrics.captioned import CaptionedMetric
from genscale.metrics.clip_protocol import ClipProtocol
from genscale.metrics.comparison import MEASURES, MeasureSettings, settings_of
from genscale.metrics.features import FeatureNetwork
from genscale.metrics.holders import Holder
from genscale.metrics.label_metrics import LabelMetrics
from genscale.metrics.names import PlannedMetric
from genscale.metrics.protocol import EvalProtocol
from genscale.metrics.single import SampleMetrics
from genscale.metrics.video.clips import ClipNetwork


def result_protocol(
    planned: PlannedMetric,
    holder: Holder,
    base: EvalProtocol,
    *,
    settings: MeasureSettings,
    reference: Mapping[str, Any],
    clips: ClipProtocol | None,
) -> EvalProtocol:
    """Return the protocol of a metric.

    Args:
        planned: the metric.
        holder: what it was computed by.
        base: how the samples were made.
        settings: numbers of the measures.
        reference: fields that tell the reference.
        clips: of what clips; None for pictures.
    """
    if clips is not None and base.clips is not None:  # pixels do not tell how fast they are shown
        clips = replace(clips, frame_rate=base.clips.frame_rate)
    facts: dict[str, Any] = {"num_samples": holder.num_samples, "clips": clips}
    if isinstance(holder, LabelMetrics):
        facts |= {
            "features": Judge.description,
            "resize": "none",
            "settings": (("max_images", holder.max_images), ("seed", holder.seed)),
        }
    elif isinstance(holder, CaptionedMetric):
        facts |= {
            "features": holder.description,
            "resize": "none",
            "settings": holder.settings,
        }
    elif isinstance(holder, SampleMetrics):
        measure = holder.by_name[planned.measure]
        facts |= {
            "features": measure.description,
            "features_sha256": measure.sha256,
            "resize": measure.resize,
            "settings": measure.settings,
        }
    else:
        facts |= {
            "features": holder.network.description,
            "features_sha256": holder.network.sha256,
            "resize": holder.network.resize,
            "settings": settings_of(planned.measure, settings),
            "clips": _as_read(holder.network, clips),
        }
        if MEASURES[planned.measure].covariance == "biased":
            facts["covariance"] = "biased"
    if planned.has_reference:
        facts |= reference
    return base.replace(**facts)


def clips_of(samples: Tensor) -> ClipProtocol | None:
    """Return what clips themselves tell of their protocol; None for pictures."""
    if samples.dim() != 5:
        return None
    frames, height, width = samples.shape[2:]
    return ClipProtocol(frames=frames, size=f"{height}x{width}")


def check_alike(
    samples: Tensor, clips: ClipProtocol | None, networks: Sequence[FeatureNetwork]
) -> None:
    """Refuse clips of another length than the reference's where a network reads whole ones.

    Raises:
        DataError: names both lengths.
    """
    if clips is None or samples.dim() != 5 or samples.shape[2] == clips.frames:
        return
    for network in networks:
        if isinstance(network, ClipNetwork) and network.frames is None:
            raise DataError(
                f"The samples have {samples.shape[2]} frames and the clips they are compared with "
                f"{clips.frames}, but '{network.name}' reads whole clips. Give it frames=<as many "
                "as both have>."
            )


def _as_read(network: FeatureNetwork, clips: ClipProtocol | None) -> ClipProtocol | None:
    """Return the clips as a network reads them, which may take a part of their frames."""
    if clips is None or not isinstance(network, ClipNetwork):
        return clips
    return replace(
        clips, frames=network.frames_of(clips.frames), stride=clips.stride * network.stride
    )
