"""Scenes as a data set: pictures drawn when asked for, captions written when asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from genscale.data.base import ImageDataset, check_resolution, check_size, row_numbers
from genscale.data.captioned import WrittenCaptions, check_tasks
from genscale.data.scenes.grammar import MAX_OBJECTS, TASKS, Task
from genscale.data.scenes.renderer import HIGHEST, LOWEST, render
from genscale.data.scenes.sampling import CaptionedScene, scene_at
from genscale.errors import ConfigError

if TYPE_CHECKING:
    from genscale.data.module import ImageDataModule

_KEPT_BYTES = 1 << 30  # pictures drawn once are kept in memory up to this size of the set
_PROBES = 16  # rows whose pixels go into the fingerprint


class Scenes(ImageDataset):
    """Pictures of coloured shapes, with captions that say everything about them.

    Row i is a function of (seed, i) and of the tasks alone: another resolution shows the same
    scene, a larger ``count`` has the same first rows. Nothing is drawn before it is asked for;
    drawn pictures are kept where the whole set takes at most 1 GiB.

    Args:
        count: number of rows.
        split: ``"train"`` or ``"heldout"``: two sets without a common key.
        resolution: 16 to 512 pixels; the oracle reads scenes exactly from 32 pixels on.
        tasks: kinds of captions: ``count``, ``colour``, ``shape``, ``relation``, ``multi``.
        max_objects: objects of a scene at most, 2 to 6.
        seed: key of the data set; no concern of a run's seed.

    Raises:
        ConfigError: if an argument is not one of those above.
    """

    def __init__(
        self,
        count: int,
        *,
        split: Literal["train", "heldout"] = "train",
        resolution: int = 32,
        tasks: Sequence[Task] = TASKS,
        max_objects: int = MAX_OBJECTS,
        seed: int = 0,
    ) -> None:
        if split not in ("train", "heldout"):
            raise ConfigError(f"split='{split}' is unknown. Scenes has 'train' and 'heldout'.")
        if count < 1 or seed < 0:
            raise ConfigError(
                f"Scenes of data.count={count} and data.scene_seed={seed} cannot be drawn. Give a "
                "count of at least 1 and a seed of at least 0."
            )
        if not 2 <= max_objects <= MAX_OBJECTS:
            raise ConfigError(
                f"data.max_objects={max_objects} is outside 2 to {MAX_OBJECTS}, the numbers a "
                "caption can count to. Choose one of them."
            )
        check_resolution(resolution, LOWEST, HIGHEST, "scenes")
        self.tasks = check_tasks(tasks, TASKS)
        self.max_objects = max_objects
        self.name = "scenes"
        self.channels = 3
        self.resolution = resolution
        self.num_classes = 0
        self.class_names = ()
        self.captions = WrittenCaptions(count, self._caption)
        self._key = 2 * seed + (split == "heldout")
        self._count = count
        self._drawn: Tensor | None = None
        self._kept: Tensor | None = None

    def __len__(self) -> int:
        return self._count

    @property
    def labels(self) -> None:
        """None: scenes have captions in place of classes."""
        return None

    def captioned(self, index: int) -> CaptionedScene:
        """Return the scene of a row with its caption and kind.

        Raises:
            IndexError: if there is no such row.
        """
        row = int(row_numbers([index], len(self)))
        return scene_at(self._key, row, self.tasks, self.max_objects)

    def images(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Return the pictures of some rows; see :meth:`ImageDataset.images`."""
        rows, own = row_numbers(indices, len(self)), (self.resolution, self.resolution)
        if len(self) * 3 * self.resolution**2 > _KEPT_BYTES:
            return self._draw(rows, own)
        if self._kept is None or self._drawn is None:
            # pages of memory that were never written to are not taken
            self._kept = torch.empty(len(self), 3, *2 * (self.resolution,), dtype=torch.uint8)
            self._drawn = torch.zeros(len(self), dtype=torch.bool)
        missing = torch.unique(rows[~self._drawn[rows]])
        if len(missing):
            self._kept[missing] = self._draw(missing, own)
            self._drawn[missing] = True
        return self._kept[rows]

    def stored_sizes(self) -> None:
        """None: scenes are drawn."""
        return None

    def reaches(self, size: tuple[int, int]) -> bool:
        """Return whether scenes are drawn at a size: 16 to 512 pixels a side."""
        return all(LOWEST <= side <= HIGHEST for side in size)

    def images_at(self, indices: Tensor | Sequence[int], size: tuple[int, int]) -> Tensor:
        """Draw the scenes of some rows at a size; see :meth:`ImageDataset.images_at`.

        Raises:
            ConfigError: a side is out of range.
        """
        check_size(size, LOWEST, HIGHEST, "scenes")
        if tuple(size) == (self.resolution, self.resolution):
            return self.images(indices)
        return self._draw(row_numbers(indices, len(self)), size)

    def _caption(self, row: int) -> str:
        return self.captioned(row).caption

    def _draw(self, rows: Tensor, size: tuple[int, int]) -> Tensor:
        images = torch.empty(len(rows), 3, *size, dtype=torch.uint8)
        for i, row in enumerate(rows.tolist()):
            images[i] = torch.from_numpy(render(self.captioned(row).scene, size))
        return images

    def fingerprint(self) -> str:
        """Return the SHA-256 over what fixes every row, and over the pixels of a few."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        settings = (self._key, self._count, self.resolution, self.tasks, self.max_objects)
        digest = hashlib.sha256(repr(settings).encode())
        for row in range(min(_PROBES, len(self))):  # another grammar or renderer shows here
            digest.update(self.captioned(row).caption.encode())
            digest.update(self.image(row).numpy().data)
        return digest.hexdigest()


def scenes_module(
    *,
    name: str,
    count: int,
    heldout_count: int,
    resolution: int,
    channels: int,
    num_classes: int,
    tasks: Sequence[Task],
    max_objects: int,
    scene_seed: int,
    flip: bool,
    num_workers: int,
    batch_size: int,
    seed: int,
    limit: int | None = None,
    buckets: Sequence[Sequence[int]] | None = None,
) -> ImageDataModule:
    """Build the data module of ``data=scenes``; the arguments are the keys of its YAML.

    Raises:
        ConfigError: if an argument is out of range, or pictures were to be mirrored: a mirrored
            picture no longer is what "left of" and "right of" say.
    """
    from genscale.data.module import ImageDataModule, check_num_classes

    if channels != 3:
        raise ConfigError(
            f"data.channels={channels} cannot show scenes, whose captions name colours. "
            "Set data.channels=3."
        )
    if flip and "relation" in tasks:
        raise ConfigError(
            "data.flip=true would mirror scenes whose captions say 'left of' and 'right of'. Set "
            "data.flip=false, or leave relation out of data.tasks."
        )

    def scenes(split: Literal["train", "heldout"], rows: int) -> Scenes:
        return Scenes(
            rows,
            split=split,
            resolution=resolution,
            tasks=list(tasks),
            max_objects=max_objects,
            seed=scene_seed,
        )

    train = scenes("train", count)
    check_num_classes(train, num_classes)
    return ImageDataModule(
        train,
        scenes("heldout", heldout_count),
        name=name,
        batch_size=batch_size,
        num_workers=num_workers,
        flip=flip,
        seed=seed,
        limit=limit,
        buckets=buckets,
    )
