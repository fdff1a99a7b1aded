"""Fashion-MNIST: 70,000 grey pictures of clothes in ten classes (arXiv:1708.07747)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from genscale.data.idx import IDXFolder, Split
from genscale.errors import DataError

if TYPE_CHECKING:
    from genscale.data.module import ImageDataModule

FOLDERS = (Path("data/fashion-mnist"), Path("/usr/share/datasets/fashion-mnist"))
"""Where the files are looked for: what the script writes, and Debian's package."""

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


class FashionMNIST(IDXFolder):
    """60,000 pictures to train on and 10,000 held out, ten balanced classes; MIT licence.

    Stored at 28 pixels; see :class:`~genscale.data.idx.IDXFolder` for other resolutions.

    Args:
        root: folder of the four IDX files; None looks into :data:`FOLDERS`.
        split: ``"train"`` or ``"heldout"``.
        resolution: 8 to 512 pixels.
        channels: 1, or 3 equal ones.

    Raises:
        DataError: if the files are missing or damaged.
        ConfigError: if an argument is not one of those above.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        split: Split = "train",
        resolution: int = 32,
        channels: int = 1,
    ) -> None:
        super().__init__(
            _default_root() if root is None else root,
            split,
            resolution,
            channels,
            class_names=CLASS_NAMES,
            name="fashion_mnist",
        )


def _default_root() -> Path:
    for folder in FOLDERS:
        if folder.is_dir():
            return folder
    raise DataError(
        f"Fashion-MNIST is in none of {' and '.join(map(str, FOLDERS))}. "
        "Get it with scripts/prepare_fashion_mnist.sh, or give data.root=<folder of its IDX files>."
    )


def fashion_mnist_module(
    *,
    name: str,
    root: str | None,
    resolution: int,
    channels: int,
    num_classes: int,
    flip: bool,
    num_workers: int,
    batch_size: int,
    seed: int,
    limit: int | None = None,
) -> ImageDataModule:
    """Build the data module of ``data=fashion_mnist``; the arguments are the keys of its YAML.

    Raises:
        ConfigError: if ``num_classes`` is not 10, or an argument is out of range.
        DataError: if the files are missing or damaged.
    """
    from genscale.data.module import ImageDataModule, check_num_classes

    train = FashionMNIST(root, "train", resolution, channels)
    check_num_classes(train, num_classes)
    return ImageDataModule(
        train,
        FashionMNIST(root, "heldout", resolution, channels),
        name=name,
        batch_size=batch_size,
        num_workers=num_workers,
        flip=flip,
        seed=seed,
        limit=limit,
    )
