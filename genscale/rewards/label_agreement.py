"""Is a picture what its label says? The judge of evaluations as a reward."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from genscale.errors import ConfigError, DataError
from genscale.io.images import to_uint8
from genscale.metrics.agreement import MAX_JUDGE_IMAGES, Judge
from genscale.metrics.subsets import stratified_rows
from genscale.rewards.base import Request, Reward, RewardOutput

if TYPE_CHECKING:
    from genscale.data.module import ImageDataModule

_TRAINED: dict[tuple[str, int, int], Judge] = {}  # by the data and the settings


class LabelAgreement(Reward):
    """1 where the support vector machine of evaluations sees the label asked for, else 0.

    It shares nothing with networks, so that it tells whether what pleases one is there.

    Args:
        max_images: pictures trained on at most, stratified over the classes.
        seed: key of that choice.
    """

    needs = frozenset({"label"})
    learns = True

    def __init__(self, *, max_images: int = MAX_JUDGE_IMAGES, seed: int = 0) -> None:
        self.max_images = max_images
        self.seed = seed
        self._judge: Judge | None = None

    @property
    def label(self) -> str:
        """Name and settings."""
        return f"LabelAgreement({Judge.description}, {self.max_images}, seed {self.seed})"

    def fit(self, datamodule: ImageDataModule) -> None:
        """Train on the training split, or take what was trained before on the same.

        Raises:
            DataError: pictures without labels.
        """
        train = datamodule.train
        if train.labels is None:
            raise DataError(
                f"reward {self.label} learns from labelled pictures, but '{train.name}' has no "
                "labels. Choose another reward=..."
            )
        recipe = (train.fingerprint(), self.max_images, self.seed)
        if recipe not in _TRAINED:
            rows = stratified_rows(train.labels, self.max_images, self.seed)
            judge = Judge(max_images=self.max_images, seed=self.seed)
            _TRAINED[recipe] = judge.fit(train.images(rows), train.labels[rows])
        self._judge = _TRAINED[recipe]

    def score(self, images: Tensor, handle: tuple[Request, ...], index: Tensor) -> RewardOutput:
        """Judge pictures, rounded to 8 bits.

        Raises:
            ConfigError: the reward has not been fitted.
        """
        if self._judge is None:
            raise ConfigError(
                f"reward {self.label} has not seen the data it learns from. Call "
                "reward.fit(datamodule) first."
            )
        pixels = to_uint8(2.0 * images.detach() - 1.0)
        asked = torch.tensor([handle[row].label for row in index.tolist()])
        right = (self._judge.predict(pixels) == asked).float()
        return RewardOutput(right.to(images.device))
