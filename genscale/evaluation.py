"""A pipeline measured by an evaluation suite: what ``evaluate.py`` and the callback share."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from genscale import rng
from genscale.conditioning.labels import LabelLaw
from genscale.data.base import ImageDataset
from genscale.data.module import ImageDataModule
from genscale.errors import DataError
from genscale.metrics.clip_protocol import ClipProtocol
from genscale.metrics.protocol import EvalProtocol, MetricValue
from genscale.metrics.suite import EvaluationSuite
from genscale.pipeline import Generated, GenerationPipeline
from genscale.rng import Purpose
from genscale.samplers.base import Sampler

_LARGEST_REFERENCE = 2 << 30  # bytes of a split's pictures at another size


def fit_reference(
    suite: EvaluationSuite, datamodule: ImageDataModule, size: tuple[int, int] | None = None
) -> None:
    """Give the suite a data set's training and held-out pictures; of latents, those encoded.

    Of more than ``suite.max_reference`` pictures of a split, a keyed random subset is taken; the
    protocol states the count. Samples of another size than the data's are compared with the data
    drawn or cropped at that size, where that takes no enlarging; else patches of them are
    compared with the data as they are, see :meth:`EvaluationSuite.compare_patches`.

    Args:
        suite: what is to measure.
        datamodule: the data.
        size: height and width of the samples; None: the data's.

    Raises:
        DataError: the samples are smaller than data that cannot be had at their size.
    """
    datamodule = datamodule.pictures()
    train, heldout = datamodule.train, datamodule.heldout
    own = (datamodule.resolution, datamodule.resolution)
    shown, named, digest = own, str(datamodule.resolution), train.fingerprint()
    if size is not None and size != own and datamodule.num_frames == 0:
        if all(part.reaches(size) for part in (train, heldout) if part is not None):
            shown, named = size, f"{size[0]}x{size[1]}"
            digest = hashlib.sha256(f"{digest} at {named}".encode()).hexdigest()
        elif size[0] < own[0] or size[1] < own[1]:
            raise DataError(
                f"Samples of {size[0]}x{size[1]} pixels were to be compared with '{train.name}', "
                f"whose pictures have {own[0]}x{own[1]} and cannot be had smaller. Give a size "
                "of at least that, or reference=<npz of pictures of the samples' size>."
            )
        else:
            suite.compare_patches(own)
    fitting = suite.max_reference
    if shown != own:
        fitting = min(fitting, max(2, _LARGEST_REFERENCE // (train.channels * math.prod(shown))))
    rows = _some_rows(len(train), fitting)
    others = _some_rows(0 if heldout is None else len(heldout), fitting)

    def pictures(part: ImageDataset, chosen: torch.Tensor) -> torch.Tensor:
        return part.images(chosen) if shown == own else part.images_at(chosen, shown)

    suite.fit_reference(
        pictures(train, rows),
        None if train.labels is None else train.labels[rows],
        None if heldout is None else pictures(heldout, others),
        None if heldout is None or heldout.labels is None else heldout.labels[others],
        fingerprint=digest,
        name=f"{datamodule.name}-{named}-train",
    )


def _some_rows(count: int, most: int) -> torch.Tensor:
    """Return all rows of ``count``, or a keyed subset of ``most``, in order."""
    if count <= most:
        return torch.arange(count)
    order = rng.permutation(rng.key(0, Purpose.SUBSET), count)
    return order[:most].sort().values


def heldout_captions(datamodule: ImageDataModule, count: int) -> list[str] | None:
    """Return the first ``count`` held-out captions, or as many as there are; None without any.

    Where nothing is held out, they are the training pictures' own.
    """
    part = datamodule.heldout or datamodule.train
    captions = part.captions
    if captions is None:
        return None
    return [captions[i] for i in range(min(count, len(captions)))]


def class_law(labels: LabelLaw, num_classes: int) -> str:
    """Name a label law as protocols do."""
    if num_classes == 0:
        return "unconditional"
    if isinstance(labels, str):
        return {"balanced": "balanced", "random": "uniform_random"}[labels]
    return "listed"


def describe(
    pipeline: GenerationPipeline,
    *,
    labels: LabelLaw,
    num_samples: int,
    nfe: float,
    weights: str,
    texts: str = "heldout_captions",
    search: str | None = None,
) -> EvalProtocol:
    """Return the protocol of samples a pipeline makes; the suite fills in its own fields.

    Args:
        pipeline: what makes them.
        labels: law of their classes.
        num_samples: their number.
        nfe: network evaluations of one.
        weights: name of the weights.
        texts: where prompts came from, for a model that reads text.
        search: how the samples were searched for; None: they were not.
    """
    sampler, guidance = pipeline.sampler, pipeline.ready(pipeline.guidance)
    scale = getattr(guidance, "scale", None)
    interval = getattr(guidance, "interval", None)
    guided = guidance.active
    return EvalProtocol(
        num_samples=num_samples,
        class_law=class_law(labels, pipeline.num_classes) if pipeline.text is None else texts,
        sampler=sampler.label
        + _cached(pipeline)
        + ("" if pipeline.references is None else f", {pipeline.references.label}")
        + _sized(pipeline)
        + ("" if pipeline.upscaling is None else f", {pipeline.upscaling.label}")
        + ("" if search is None else f", {search}"),
        steps=sampler.num_steps,
        nfe=nfe,
        solver=_solver(sampler),
        guidance=guidance.label if guided else "none",
        guidance_scale=scale if guided else None,
        guidance_interval=tuple(interval) if guided and interval is not None else None,
        network_dtype=pipeline.precision,
        decoder_dtype=pipeline.precision,
        autoencoder=pipeline.autoencoder.protocol_name,
        weights=weights,
        clips=clip_protocol(pipeline.image_shape, pipeline.frame_rate),
    )


def clip_protocol(shape: tuple[int, ...], frame_rate: float | None) -> ClipProtocol | None:
    """Return what a protocol says of clips; None of pictures.

    Args:
        shape: of one sample, ``(C, H, W)`` or ``(C, T, H, W)``.
        frame_rate: frames a second, where they are known; still pictures have none.
    """
    if len(shape) != 4:
        return None
    rate = frame_rate if frame_rate is not None and math.isfinite(frame_rate) else 0.0
    return ClipProtocol(frames=shape[1], frame_rate=rate, size=f"{shape[2]}x{shape[3]}")


def _solver(sampler: Sampler) -> str:
    if sampler.family == "scale_wise":
        return "tokens"
    return "sde" if sampler.stochastic else "ode"


def _sized(pipeline: GenerationPipeline) -> str:
    """Return what the sampler's name in protocols says of size and resolution scaling."""
    if pipeline.size is None:
        return ""
    label = pipeline.resolution.label
    by = "" if label == "none" else f" by {label}"
    return ", at {}x{}".format(*pipeline.size) + by


def _cached(pipeline: GenerationPipeline) -> str:
    """Return what the sampler's name in protocols says of step caching; nothing without it."""
    label = pipeline.step_cache.label
    return "" if label == "none" else f" with {label}"


def measure(suite: EvaluationSuite, batches: Iterable[Generated]) -> float:
    """Feed batches of samples to the suite and return the mean network evaluations of a sample."""
    spent, count = 0.0, 0
    for batch in batches:
        suite.update(batch.images, batch.labels, batch.ids, batch.captions)
        spent += float(batch.nfe.sum())
        count += len(batch.ids)
    return spent / max(count, 1)


def periodic(
    suite: EvaluationSuite,
    datamodule: ImageDataModule,
    *,
    seed: int,
    labels: LabelLaw = "balanced",
) -> Callable[[GenerationPipeline, int, int, int], dict[str, float]]:
    """Return the function that the training callback calls; the reference is made on first use."""
    ready: list[bool] = []

    def evaluate(
        pipeline: GenerationPipeline, num_samples: int, rank: int, world_size: int
    ) -> dict[str, float]:
        if not ready:
            suite.to(pipeline.device)
            if suite.reference is None:
                fit_reference(suite, datamodule)
            ready.append(True)
        suite.reset()
        stream = pipeline.stream(
            num_samples=num_samples,
            labels=labels,
            prompts=None if pipeline.text is None else heldout_captions(datamodule, num_samples),
            seed=seed,
            rank=rank,
            world_size=world_size,
        )
        nfe = measure(suite, stream)
        protocol = describe(
            pipeline, labels=labels, num_samples=num_samples, nfe=nfe, weights="ema"
        )
        return {value.name: value.value for value in suite.compute(protocol)}

    return evaluate


def as_record(values: list[MetricValue]) -> dict[str, Any]:
    """Return numbers and protocols as ``metrics.json`` stores them."""
    protocols = {v.protocol_hash: v.protocol.to_dict() for v in values if v.protocol is not None}
    return {"metrics": [value.to_dict() for value in values], "protocols": protocols}
