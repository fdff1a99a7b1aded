"""Buckets of shapes: all pictures of a step have one size; which one is keyed by its place.

All processes and micro-batches of a step share its bucket. Nothing is remembered: the bucket of a
step and the rows in it are functions of the seed and the global position, as everything else.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from genscale.data.base import ImageDataset
from genscale.data.stream import GlobalStream
from genscale.errors import ConfigError, DataError
from genscale.rng import Purpose, key, permutation

Size = tuple[int, int]

logger = logging.getLogger(__name__)


class BucketedStream(GlobalStream):
    """An endless sequence of row numbers in which every batch has one size.

    Pictures that are stored go to the bucket nearest to their proportions, and among buckets of
    equal proportions to the largest that does not enlarge them. Every bucket has its own endless
    shuffled sequence; rounds of batches, shuffled too, give each its share, so that all pictures
    are seen about equally often. Pictures that are drawn suit any shape: they come in one
    sequence, every row once an epoch, and every bucket has as many batches.

    Args:
        images: the pictures.
        sizes: (height, width) of every bucket.
        batch_size: samples of one optimizer step, over all processes and micro-batches.
        seed: the run's seed.

    Attributes:
        sizes: of the buckets that have pictures.
        counts: pictures in each of them; of drawn pictures, all.

    Raises:
        ConfigError: there is no bucket, one stands twice, or one is no size.
        DataError: the data cannot be had at these sizes.
    """

    def __init__(
        self, images: ImageDataset, sizes: Sequence[Size], *, batch_size: int, seed: int
    ) -> None:
        super().__init__(len(images), seed)
        self.batch_size = batch_size
        wanted = check_buckets(sizes, images)
        stored = images.stored_sizes()
        if stored is None:
            self.sizes = wanted
            self.counts = [len(images)] * len(wanted)
            self._shares = torch.ones(len(wanted), dtype=torch.int64)
            self._rows: list[Tensor] = []
            self._streams: list[GlobalStream] = []
        else:
            bucket = nearest_buckets(stored, wanted)
            filled = [number for number in range(len(wanted)) if bool((bucket == number).any())]
            self.sizes = [wanted[number] for number in filled]
            self._rows = [(bucket == number).nonzero().flatten() for number in filled]
            self.counts = [len(rows) for rows in self._rows]
            self._shares = _shares(self.counts, batch_size)
            self._streams = [
                GlobalStream(count, int(key(seed, number, Purpose.BUCKET)))
                for number, count in enumerate(self.counts)
            ]
            told = ", ".join(
                f"{height}x{width}: {int((bucket == number).sum())}"
                for number, (height, width) in enumerate(wanted)
            )
            logger.info("%s: pictures by bucket: %s", images.name, told)
        self._round: tuple[int, Tensor] | None = None

    def bucket(self, position: int) -> int:
        """Return the number of the bucket, in :attr:`sizes`, that a global position lies in."""
        return self._place(position // self.batch_size)[0]

    def size(self, position: int) -> Size:
        """Return height and width of the picture at a global position."""
        return self.sizes[self.bucket(position)]

    def rows(self, start: int, count: int) -> Tensor:
        """Return the rows at global positions ``start .. start + count - 1``: int64 ``(count,)``.

        Raises:
            DataError: ``start`` is negative, or the positions belong to different steps.
        """
        step, offset = divmod(start, self.batch_size)
        if offset + count > self.batch_size:
            raise DataError(
                f"Positions {start} to {start + count - 1} lie in different batches of "
                f"{self.batch_size}, which have shapes of their own. Resume with the batch_size "
                "the run began with."
            )
        if not self._rows or start < 0:
            return super().rows(start, count)
        bucket, batch = self._place(step)
        taken = self._streams[bucket].rows(batch * self.batch_size + offset, count)
        return self._rows[bucket][taken]

    def _place(self, step: int) -> tuple[int, int]:
        """Return the bucket of a step, and how many earlier steps had the same."""
        number, place = divmod(step, int(self._shares.sum()))
        if self._round is None or self._round[0] != number:
            every = torch.repeat_interleave(torch.arange(len(self.sizes)), self._shares)
            order = permutation(key(self.seed, number, Purpose.BUCKET), len(every))
            self._round = (number, every[order])
        schedule = self._round[1]
        bucket = int(schedule[place])
        before = int((schedule[:place] == bucket).sum())
        return bucket, number * int(self._shares[bucket]) + before


def check_buckets(sizes: Sequence[Sequence[int]], images: ImageDataset) -> list[Size]:
    """Return buckets as pairs of height and width.

    Raises:
        ConfigError: there is none, one stands twice, or one is no size the data have.
        DataError: the pictures have one size alone.
    """
    found: list[Size] = []
    for size in sizes:
        sides = tuple(size) if isinstance(size, Sequence) else (size,)
        if len(sides) != 2 or any(isinstance(s, bool) or not isinstance(s, int) for s in sides):
            raise ConfigError(
                f"data.buckets holds {size!r}, but every bucket is a height and a width in pixels. "
                "Give e.g. data.buckets=[[32,32],[24,40],[40,24]]."
            )
        if sides in found:
            raise ConfigError(f"data.buckets names {list(sides)} twice. Name every bucket once.")
        found.append((sides[0], sides[1]))
    if not found:
        raise ConfigError(
            "data.buckets is empty. Give heights and widths, e.g. [[32,32],[24,40]], or null for "
            "pictures of one size."
        )
    for size in found:
        images.images_at([], size)  # raises where it cannot be had
    return found


def nearest_buckets(stored: Tensor, sizes: Sequence[Size]) -> Tensor:
    """Return the bucket of every picture: int64 ``(n,)``.

    The nearest ratio of height to width wins, in logarithms; of equal ratios the largest bucket
    that does not enlarge the picture, else the smallest.

    Args:
        stored: ``(n, 2)`` heights and widths.
        sizes: of the buckets.
    """
    wanted = torch.tensor(sizes, dtype=torch.float64)
    height, width = stored.double().unbind(1)
    ratio = (height / width).log()[:, None] - (wanted[:, 0] / wanted[:, 1]).log()[None]
    # rounded: equal ratios of different sizes must tie
    distance = (ratio.abs() * 1e9).round()
    near = distance == distance.amin(1, keepdim=True)
    enlarges = (stored.double()[:, None] < wanted[None]).any(-1)
    area = wanted.prod(1)
    # among the near ones: those that do not enlarge by area, above those that do, by less area
    rank = torch.where(enlarges, -area, area).masked_fill(~near, -torch.inf)
    return rank.argmax(1)


def _shares(counts: Sequence[int], batch_size: int) -> Tensor:
    """Return batches of every bucket in a round: in proportion to its pictures, one at least.

    A round is as long as the smallest bucket needs for one batch, or as few pictures as it has.
    """
    unit = min(batch_size, *counts)
    return torch.tensor([max(1, round(count / unit)) for count in counts])
