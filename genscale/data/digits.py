"""Handwritten digits that come with scikit-learn: real pictures with nothing to fetch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from genscale.data.base import TensorImages, check_channels, check_resolution
from genscale.data.transforms import resize, with_channels
from genscale.errors import ConfigError
from genscale.rng import Purpose, key, permutation

if TYPE_CHECKING:
    from genscale.data.module import ImageDataModule

HELDOUT_PER_CLASS = 36
_SPLIT_SEED = 1797  # fixed: the split is part of the data set, not of a run


class Digits(TensorImages):
    """1,797 scanned digits (UCI "Optical Recognition of Handwritten Digits", test part).

    The scans are 8x8 with values 0..16. They are brought to 0..255 and enlarged with a bicubic
    filter in one go (float64, clipped, rounded half up). Of every class 36 pictures, chosen by a
    keyed permutation, are held out: 360 held out in balance, 1,437 to train on (142, 146, 141,
    147, 145, 146, 145, 143, 138 and 144 of the digits 0 to 9). Rows keep the order of the source.

    Args:
        split: ``"train"`` (1,437 pictures) or ``"heldout"`` (360).
        resolution: 8 to 512 pixels.
        channels: 1, or 3 equal ones.

    Raises:
        ConfigError: if split, resolution or channels is not one of those.
    """

    def __init__(
        self,
        split: Literal["train", "heldout"] = "train",
        resolution: int = 16,
        channels: int = 1,
    ) -> None:
        from sklearn.datasets import load_digits

        if split not in ("train", "heldout"):
            raise ConfigError(f"split='{split}' is unknown. Digits has 'train' and 'heldout'.")
        check_resolution(resolution, 8, 512, "the digits")
        check_channels(channels)
        source = load_digits()
        scans = torch.from_numpy(source.images)[:, None]  # (1797, 1, 8, 8) float64, 0..16
        labels = torch.from_numpy(source.target).to(torch.int64)
        heldout = torch.zeros(len(labels), dtype=torch.bool)
        for label in range(10):
            rows = torch.nonzero(labels == label).flatten()
            order = permutation(key(_SPLIT_SEED, label, Purpose.SUBSET), len(rows))
            heldout[rows[order[:HELDOUT_PER_CLASS]]] = True
        chosen = heldout if split == "heldout" else ~heldout
        super().__init__(
            with_channels(resize(scans[chosen] * (255 / 16), resolution), channels),
            labels[chosen],
            class_names=tuple("0123456789"),
            name="digits",
        )


def digits_module(
    *,
    name: str,
    resolution: int,
    channels: int,
    num_classes: int,
    flip: bool,
    num_workers: int,
    batch_size: int,
    seed: int,
    limit: int | None = None,
) -> ImageDataModule:
    """Build the data module of ``data=digits``; the arguments are the keys of its YAML.

    Raises:
        ConfigError: if ``num_classes`` is not 10, or an argument is out of range.
    """
    from genscale.data.module import ImageDataModule, check_num_classes

    train = Digits("train", resolution, channels)
    check_num_classes(train, num_classes)
    return ImageDataModule(
        train,
        Digits("heldout", resolution, channels),
        name=name,
        batch_size=batch_size,
        num_workers=num_workers,
        flip=flip,
        seed=seed,
        limit=limit,
    )
