"""Measures of samples that were generated for labels, as one torchmetrics metric."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from genscale.errors import ConfigError, DataError, did_you_mean
from genscale.metrics.agreement import Agreement, Judge
from genscale.metrics.features import check_images
from genscale.metrics.keyed import KeyedMetric

LABEL_MEASURES = ("label_agreement", "judge_accuracy", "samples_to_real_accuracy")
UNLABELLED = -1


class LabelMetrics(KeyedMetric):
    """Agreement of samples with their labels.

    - ``label_agreement``: share of samples in which a judge, trained on real pictures, sees the
      label they were generated for.
    - ``judge_accuracy``: the judge's own accuracy on real held-out pictures, the ceiling.
    - ``samples_to_real_accuracy``: accuracy on real held-out pictures of the same kind of judge
      trained on the samples; high only if samples are right, varied and like the data.

    Args:
        measures: names out of :data:`LABEL_MEASURES`.
        max_images: pictures a judge is trained on at most.
        seed: key of that choice.

    Raises:
        ConfigError: if a measure is unknown.
    """

    def __init__(self, measures: Sequence[str], *, max_images: int = 10_000, seed: int = 0) -> None:
        for name in measures:
            if name not in LABEL_MEASURES:
                raise ConfigError(
                    f"'{name}' is no measure of labels. Known are {', '.join(LABEL_MEASURES)}."
                    f"{did_you_mean(name, LABEL_MEASURES)}"
                )
        super().__init__(measures, {"images": (4, torch.uint8), "labels": (1, torch.int64)})
        self.max_images = max_images
        self.seed = seed
        self._judge: Judge | None = None
        self._heldout: tuple[Tensor, Tensor] | None = None
        self._judge_accuracy: Agreement | None = None

    def fit_judge(
        self,
        images: Tensor,
        labels: Tensor,
        heldout_images: Tensor | None,
        heldout_labels: Tensor | None,
    ) -> None:
        """Train the judge on real pictures and measure it on held-out ones, if there are any.

        Args:
            images: uint8 ``(n, C, H, W)``.
            labels: ``(n,)`` int64.
            heldout_images: uint8 ``(m, C, H, W)`` or None.
            heldout_labels: ``(m,)`` int64 or None.
        """
        self._judge = Judge(max_images=self.max_images, seed=self.seed).fit(images, labels)
        self._heldout = self._judge_accuracy = None
        if heldout_images is not None and heldout_labels is not None:
            self._heldout = heldout_images, heldout_labels
            self._judge_accuracy = self._judge.agreement(heldout_images, heldout_labels)

    def update(
        self, images: Tensor, labels: Tensor | None = None, sample_ids: Tensor | None = None
    ) -> None:
        """Keep pictures with the labels they were generated for.

        Args:
            images: uint8 ``(B, C, H, W)``.
            labels: ``(B,)`` int64; -1 for a sample without label, None for none at all.
            sample_ids: ``(B,)`` int64 global numbers; on one process they may be left out.
        """
        if labels is None:
            labels = torch.full((len(images),), UNLABELLED, dtype=torch.int64)
        if labels.shape != (len(images),):
            raise DataError(
                f"{len(images)} images came with labels of shape {tuple(labels.shape)}. "
                "Give one label an image."
            )
        rows = {"images": check_images(images), "labels": labels}
        self._append(sample_ids, len(images), rows)

    def compute(self) -> dict[str, float]:
        """Return every active measure by name; an empty dict if no sample has a label.

        Raises:
            DataError: if there are no samples, no judge, or no held-out pictures to score on.
        """
        _, rows = self.collected()
        self.details = {}
        labelled = rows["labels"] >= 0
        if not bool(labelled.any()):
            return {}
        images, labels = rows["images"][labelled], rows["labels"][labelled]
        values = {}
        for name in self.active:
            started = time.perf_counter()
            result, trained = self._measure(name, images, labels)
            values[name] = result.share
            self.details[name] = {
                "n": result.count,
                "judge_n": trained,
                "per_class": {str(label): share for label, share in result.per_class.items()},
                "seconds": round(time.perf_counter() - started, 3),
            }
        return values

    def _measure(self, name: str, images: Tensor, labels: Tensor) -> tuple[Agreement, int]:
        if self._judge is None:
            raise DataError(
                f"'{name}' needs a judge trained on real labelled pictures. Call fit_reference "
                "with training images and labels first."
            )
        if name == "label_agreement":
            return self._judge.agreement(images, labels), self._judge.num_trained
        if self._heldout is None or self._judge_accuracy is None:
            raise DataError(
                f"'{name}' is scored on real held-out pictures with labels, but there are none. "
                "Give them to fit_reference."
            )
        if name == "judge_accuracy":
            return self._judge_accuracy, self._judge.num_trained
        student = Judge(max_images=self.max_images, seed=self.seed).fit(images, labels)
        return student.agreement(*self._heldout), student.num_trained
