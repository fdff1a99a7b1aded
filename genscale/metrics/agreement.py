"""Do samples show what their labels say? Judged by a classifier of real pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.errors import DataError
from genscale.metrics.features import check_images
from genscale.metrics.subsets import stratified_rows

MAX_JUDGE_IMAGES = 10_000
_LARGEST_SIDE = 32


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
    model cannot please it by sharing their taste. Pictures above 32 pixels are averaged over boxes,
    and larger ones than it was trained on to the size of those.

    Args:
        max_images: pictures trained on at most, stratified over the classes.
        seed: key of that choice.
    """

    description = "svc_rbf_c10_pixels_at_most_32"

    def __init__(self, *, max_images: int = MAX_JUDGE_IMAGES, seed: int = 0) -> None:
        self.max_images = max_images
        self.seed = seed
        self._machine: _Machine | None = None
        self._only_class: int | None = None
        self._sides = (_LARGEST_SIDE, _LARGEST_SIDE)
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
        self._sides = min(images.shape[2], _LARGEST_SIDE), min(images.shape[3], _LARGEST_SIDE)
        self._only_class = int(targets[0]) if len(targets.unique()) == 1 else None
        if self._only_class is None:
            model = SVC(kernel="rbf", C=10.0, gamma="scale", cache_size=1000)
            seen = _flat(images[rows.to(images.device)], self._sides)
            model.fit(seen.numpy(), targets.numpy())
            self._machine = _Machine.of(model)
        return self

    def predict(self, images: Tensor) -> Tensor:
        """Return the predicted labels ``(n,)`` int64 of uint8 images.

        Raises:
            DataError: if the judge has not been trained, or the images are smaller than those it
                was trained on.
        """
        if self._only_class is not None:
            return torch.full((len(images),), self._only_class, dtype=torch.int64)
        if self._machine is None:
            raise DataError("The judge has not been trained. Call fit(images, labels) first.")
        if any(own < side for own, side in zip(images.shape[2:], self._sides, strict=True)):
            raise DataError(
                f"The judge knows pictures of {self._sides[0]}x{self._sides[1]} pixels, but got "
                f"{images.shape[2]}x{images.shape[3]}. Give pictures at least as large."
            )
        parts = [_flat(part, self._sides) for part in images.split(1024)]
        return torch.cat([self._machine.predict(part) for part in parts])

    def agreement(self, images: Tensor, labels: Tensor) -> Agreement:
        """Compare predictions with labels ``(n,)``."""
        labels = labels.cpu()
        right = self.predict(images) == labels
        per_class = {
            int(label): float(right[labels == label].double().mean()) for label in labels.unique()
        }
        return Agreement(float(right.double().mean()), per_class, len(labels))


@dataclass(frozen=True, slots=True)
class _Machine:
    """A trained machine's numbers, evaluated with one matrix product a batch.

    libsvm computes a kernel row at a time; the same votes come some 20 times as fast this way.
    """

    classes: Tensor  # (K,)
    support: Tensor  # (n, d) support vectors, grouped by class
    starts: list[int]  # first support vector of each class, and n
    dual: Tensor  # (K - 1, n) coefficients as libsvm lays them out
    intercepts: Tensor  # (K (K - 1) / 2,), one a pair of classes
    gamma: float

    @classmethod
    def of(cls, model: Any) -> _Machine:
        counts = torch.from_numpy(model.n_support_).to(torch.int64)
        # for two classes scikit-learn hands out libsvm's numbers with the sign turned
        sign = -1.0 if len(model.classes_) == 2 else 1.0
        return cls(
            classes=torch.from_numpy(model.classes_).to(torch.int64),
            support=torch.from_numpy(model.support_vectors_),
            starts=[0, *counts.cumsum(0).tolist()],
            dual=sign * torch.from_numpy(model.dual_coef_),
            intercepts=sign * torch.from_numpy(model.intercept_),
            gamma=float(model._gamma),
        )

    def predict(self, x: Tensor) -> Tensor:
        """Return the class that wins most duels of two, the lower one at a tie: ``(B,)``."""
        squared = x.square().sum(1)[:, None] + self.support.square().sum(1)[None]
        kernel = torch.exp(-self.gamma * (squared - 2.0 * (x @ self.support.T)))
        votes = torch.zeros(len(x), len(self.classes), dtype=torch.int64)
        pair = 0
        for i in range(len(self.classes)):
            own = slice(self.starts[i], self.starts[i + 1])
            for j in range(i + 1, len(self.classes)):
                other = slice(self.starts[j], self.starts[j + 1])
                decision = kernel[:, own] @ self.dual[j - 1, own] + self.intercepts[pair]
                decision += kernel[:, other] @ self.dual[i, other]
                won = decision > 0
                votes[:, i] += won
                votes[:, j] += ~won
                pair += 1
        return self.classes[votes.argmax(dim=1)]


def _flat(images: Tensor, sides: tuple[int, int]) -> Tensor:
    """Return pixels in [0, 1], averaged to some sides, as a float64 matrix ``(n, C * H * W)``."""
    pixels = check_images(images).cpu().to(torch.float64) / 255.0
    return F.adaptive_avg_pool2d(pixels, sides).flatten(1)
