"""Do samples show what their labels say? Judged by a classifier of real pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genscale.errors import DataError
from genscale.metrics.features import check_images
from genscale.metrics.subsets import stratified_rows

MAX_JUDGE_IMAGES = 10_000


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far predicted and given labels agree.

    Attributes:
        share: agreeing pictures over all.
        per_class: the share within each given label.
        count: number of pictures.
    """

    share: float
    per_class: dict[int, float]
    count: int


class Judge:
    """A support vector machine on pixels: RBF kernel, C = 10, gamma = 1 / (d var).

    It has nothing in common with the networks under test or with the feature networks, so that a
    model cannot please it by sharing their taste.

    Args:
        max_images: pictures trained on at most, stratified over the classes.
        seed: key of that choice.
    """

    description = "svc_rbf_c10_pixels"

    def __init__(self, *, max_images: int = MAX_JUDGE_IMAGES, seed: int = 0) -> None:
        self.max_images = max_images
        self.seed = seed
        self._model: Any = None
        self._only_class: int | None = None
        self.num_trained = 0

    def fit(self, images: Tensor, labels: Tensor) -> Judge:
        """Train on uint8 images ``(n, C, H, W)`` with labels ``(n,)``.

        A set of one class gives a judge that always answers with it.

        Raises:
            DataError: if pictures and labels differ in number or there are none.
        """
        from sklearn.svm import SVC

        labels = labels.cpu()
        if len(labels) != len(images) or len(labels) == 0:
            raise DataError(
                f"A judge needs one label a picture, but {len(images)} pictures and {len(labels)} "
                "labels were given."
            )
        rows = stratified_rows(labels, self.max_images, self.seed)
        targets = labels[rows]
        self.num_trained = len(rows)
        self._only_class = int(targets[0]) if len(targets.unique()) == 1 else None
        if self._only_class is None:
            self._model = SVC(kernel="rbf", C=10.0, gamma="scale")
            self._model.fit(_flat(images[rows.to(images.device)]), targets.numpy())
        return self

    def predict(self, images: Tensor) -> Tensor:
        """Return the predicted labels ``(n,)`` int64 of uint8 images.

        Raises:
            DataError: if the judge has not been trained.
        """
        if self._only_class is not None:
            return torch.full((len(images),), self._only_class, dtype=torch.int64)
        if self._model is None:
            raise DataError("The judge has not been trained. Call fit(images, labels) first.")
        return torch.from_numpy(self._model.predict(_flat(images))).to(torch.int64)

    def agreement(self, images: Tensor, labels: Tensor) -> Agreement:
        """Compare predictions with labels ``(n,)``."""
        labels = labels.cpu()
        right = self.predict(images) == labels
        per_class = {
            int(label): float(right[labels == label].double().mean()) for label in labels.unique()
        }
        return Agreement(float(right.double().mean()), per_class, len(labels))


def _flat(images: Tensor) -> Any:
    """Return pixels in [0, 1] as a float64 matrix ``(n, C * H * W)``."""
    return (check_images(images).cpu().flatten(1).to(torch.float64) / 255.0).numpy()
