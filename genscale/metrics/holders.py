"""What a suite collects samples in: one metric a feature network, one for labels, and so on."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from genscale.metrics.captioned import CaptionedMetric
from genscale.metrics.comparison import MeasureSettings
from genscale.metrics.feature_metrics import FeatureMetrics
from genscale.metrics.features import FeatureNetwork
from genscale.metrics.label_metrics import LabelMetrics
from genscale.metrics.names import (
    EVERY_PIXEL,
    OF_CAPTIONS,
    OF_CLIPS,
    OF_LABELS,
    OF_PICTURES,
    OF_TRACKS,
    PlannedMetric,
)
from genscale.metrics.picture_measures import PictureMeasure, PictureMetrics
from genscale.metrics.pixels import Pixels
from genscale.metrics.protocol import EvalProtocol
from genscale.metrics.scene_agreement import SceneAgreement
from genscale.metrics.single import SampleMetrics
from genscale.metrics.tracking_agreement import TrackingAgreement
from genscale.metrics.video.measures import ClipMeasure, ClipMetrics

Holder = FeatureMetrics | LabelMetrics | CaptionedMetric | SampleMetrics


def build_holders(
    planned: Mapping[str, Sequence[str]],
    features: Sequence[FeatureNetwork],
    clip_measures: Sequence[ClipMeasure],
    picture_measures: Sequence[PictureMeasure] = (),
    *,
    settings: MeasureSettings,
    keep_features: bool,
    max_judge_images: int,
) -> dict[str, Holder]:
    """Return a holder for every network, or kind of measure, that something is planned for.

    Args:
        planned: names of measures by network, see :mod:`genscale.metrics.names`.
        features: feature networks.
        clip_measures: measures of single clips.
        picture_measures: measures of single pictures.
        settings: numbers of the measures.
        keep_features: keep features also where moments are enough.
        max_judge_images: pictures a judge is trained on, at most.
    """
    holders: dict[str, Holder] = {}
    for network in (*features, Pixels(None, name=EVERY_PIXEL)):
        if measures := planned.get(network.name):
            holders[network.name] = FeatureMetrics(
                network, measures, settings=settings, keep_features=keep_features
            )
    if measures := planned.get(OF_LABELS):
        holders[OF_LABELS] = LabelMetrics(measures, max_images=max_judge_images, seed=settings.seed)
    if measures := planned.get(OF_CAPTIONS):
        holders[OF_CAPTIONS] = SceneAgreement(measures)
    if measures := planned.get(OF_TRACKS):
        holders[OF_TRACKS] = TrackingAgreement(measures)
    if measures := planned.get(OF_CLIPS):
        holders[OF_CLIPS] = ClipMetrics([each for each in clip_measures if each.name in measures])
    if measures := planned.get(OF_PICTURES):
        holders[OF_PICTURES] = PictureMetrics(
            [each for each in picture_measures if each.name in measures]
        )
    return holders


def fit_judge(
    holder: Holder,
    train: tuple[Tensor | None, Tensor | None],
    heldout: tuple[Tensor | None, ...],
    patch: tuple[int, int] | None,
) -> dict[str, str]:
    """Let measures by labels train their judge on real pictures with labels.

    Args:
        holder: of measures by labels; of others nothing is done.
        train: pictures and labels to learn from.
        heldout: pictures and labels to score on.
        patch: height and width of real pictures that are smaller than samples; None: as large.

    Returns:
        reasons by measure: what cannot be computed; under the empty name: nothing can.
    """
    if not isinstance(holder, LabelMetrics):
        return {}
    images, labels = train
    if images is None or labels is None:
        return {"": "the reference has no labels"}
    holder.fit_judge(images, labels, *heldout)
    if None in heldout:
        reason = "the reference has no held-out pictures with labels"
        return {name: reason for name in holder.measures if name != "label_agreement"}
    if patch is not None and "samples_to_real_accuracy" in holder.measures:
        # the judge averages what is larger than the data; one that learns from samples cannot
        return {"samples_to_real_accuracy": "samples are larger than the data"}
    return {}


def feed(
    holder: Holder,
    images: Tensor,
    labels: Tensor | None,
    captions: Sequence[str] | None,
    sample_ids: Tensor | None,
    *,
    device: torch.device,
) -> None:
    """Show a holder samples with what it reads of them, on ``device`` where networks run."""
    if isinstance(holder, FeatureMetrics):
        holder.update(images.to(device), sample_ids)
    elif isinstance(holder, SampleMetrics):
        holder.update(images.to(device), captions, sample_ids)
    elif isinstance(holder, CaptionedMetric):
        holder.update(images, captions, sample_ids)
    else:
        holder.update(images, labels, sample_ids)


def tell_frame_rate(holders: Iterable[Holder], protocol: EvalProtocol | None) -> None:
    """Tell those that judge speeds how many frames a second the samples have, where it is known."""
    rate = 0.0 if protocol is None or protocol.clips is None else protocol.clips.frame_rate
    for holder in holders:
        if isinstance(holder, TrackingAgreement) and rate > 0:
            holder.frame_rate = rate


def warn_left_out(skipped: Mapping[str, str], warned: set[str]) -> None:
    """Say of every reason which metrics are left out for it, once as long as ``warned`` lives."""
    for reason in dict.fromkeys(skipped.values()):
        names = ", ".join(name for name, why in skipped.items() if why == reason)
        if names not in warned:
            warned.add(names)
            warnings.warn(f"Left out of the evaluation: {names}, as {reason}.", stacklevel=3)


def lacking(holder: Holder, planned: PlannedMetric, values: dict[str, float]) -> str:
    """Return why a metric is not among the values its holder computed, as a reason."""
    if isinstance(holder, SampleMetrics):
        return holder.reasons[planned.measure]
    return planned.lacking(values)
