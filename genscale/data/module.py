"""The data module: batches with global positions, the same for any split over processes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from genscale.data.base import ImageDataset
from genscale.data.buckets import BucketedStream, check_buckets
from genscale.data.stream import GlobalStream, StreamBatchSampler
from genscale.errors import CheckpointError, ConfigError, DataError, ParallelError
from genscale.rng import Purpose, for_step, key, permutation

UNLABELLED = -1  # label of every sample of a set without labels: the null class


class ImageDataModule(LightningDataModule):
    """Feeds a training run from a :class:`~genscale.data.stream.GlobalStream`.

    The one number that says where a run stands is :attr:`samples_seen`. The training loop sets it
    after every optimizer step; it is saved with the checkpoint and, on resume, restored before
    the loader is asked for. The loader itself never moves it: workers read ahead, and what was
    read ahead has not been trained on.

    Args:
        train: pictures to train on.
        heldout: pictures of the same size and classes to compare with, or None.
        batch_size: samples of one optimizer step, over all processes and accumulated
            micro-batches.
        num_workers: processes that read ahead; 0 reads in the training process.
        flip: mirror every sample left to right with probability 1/2, keyed by its position.
        seed: the run's seed.
        limit: train on so many pictures only, drawn with a key from ``train``; None takes all.
            For learning a few by heart while debugging.
        buckets: heights and widths that pictures have by turns, one a step; None: all have their
            usual size. See :class:`~genscale.data.buckets.BucketedStream`.
        accumulate: micro-batches of one optimizer step on each process. None takes the attached
            trainer's ``accumulate_grad_batches``, and 1 without a trainer; give it where the
            training loop accumulates by itself.
        name: word for run folders; the train set's by default.

    Attributes:
        samples_seen: samples trained on so far; a plain int.
        with_captions: whether batches carry the captions of their pictures; off until a model
            that reads them asks for it.

    Raises:
        DataError: if train and heldout differ in size, channels or classes, or the data cannot be
            had in the shapes of the buckets.
        ConfigError: if batch_size, num_workers, limit or a bucket is out of range.
    """

    def __init__(
        self,
        train: ImageDataset,
        heldout: ImageDataset | None = None,
        *,
        batch_size: int,
        num_workers: int = 0,
        flip: bool = False,
        seed: int = 0,
        limit: int | None = None,
        buckets: Sequence[Sequence[int]] | None = None,
        accumulate: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size} is below 1. Give the samples of one step.")
        if num_workers < 0:
            raise ConfigError(
                f"data.num_workers={num_workers} is negative. Give 0 to read in the training "
                "process, or the number of reading processes."
            )
        if heldout is not None:
            _check_alike(train, heldout)
        self.train = train if limit is None else _draw(train, limit, seed)
        self.heldout = heldout
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.flip = flip
        self.seed = seed
        self.buckets = None if buckets is None else check_buckets(buckets, self.train)
        self.accumulate = accumulate
        self.samples_seen = 0
        self.with_captions = False
        self.name = name or train.name

    @property
    def channels(self) -> int:
        """Channels of a picture: 1 or 3."""
        return self.train.channels

    @property
    def resolution(self) -> int:
        """Height and width of a picture."""
        return self.train.resolution

    @property
    def num_frames(self) -> int:
        """Frames of a clip; 0 for pictures."""
        return self.train.num_frames

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for an unlabelled set."""
        return self.train.num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name a class."""
        return self.train.class_names

    def fingerprint(self) -> str:
        """Return the SHA-256 of the train set, and of the shapes it is shown in."""
        own = self.train.fingerprint()
        if self.buckets is None:
            return own
        return hashlib.sha256(f"{own} in {self.buckets}".encode()).hexdigest()

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return the endless loader of this process, from position ``samples_seen`` on.

        A batch is ``{"image": uint8 (B, C, H, W), "label": int64 (B,), "position": int64 (B,)}``
        where B is the micro-batch of this process. Labels are -1 (the null class) throughout
        where the set has none. With :attr:`with_captions`, ``"caption"`` is a list of B texts.

        Raises:
            ParallelError: if ``batch_size`` does not divide over processes and micro-batches, or
                processes see different data.
        """
        rank, world_size, accumulate = self._split()
        if world_size > 1:
            _check_same_data(self.train)
        sampler = StreamBatchSampler(
            self.stream,
            global_batch_size=self.batch_size,
            rank=rank,
            world_size=world_size,
            start_position=self.samples_seen,
            accumulate=accumulate,
        )
        on_cuda = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return DataLoader(
            self.samples(),
            batch_sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=_keep,
            pin_memory=on_cuda,
            # workers are seeded from it; the default would draw from the global generator
            generator=torch.Generator().manual_seed(self.seed),
            persistent_workers=self.num_workers > 0,
        )

    def samples(self) -> Dataset[dict[str, Any]]:
        """Return what turns (position, row) pairs into batches, in the reading processes."""
        captions = self.train.captions if self.with_captions else None
        stream = self.stream if isinstance(self.stream, BucketedStream) else None
        return _Samples(self.train, self.seed, self.flip, captions, stream)

    @cached_property
    def stream(self) -> GlobalStream:
        """The sequence of rows that is trained on; with buckets, of their shapes too."""
        if self.buckets is None:
            return GlobalStream(len(self.train), self.seed)
        return BucketedStream(self.train, self.buckets, batch_size=self.batch_size, seed=self.seed)

    def pictures(self) -> ImageDataModule:
        """Return the module of the pictures that samples are compared with: this one."""
        return self

    def _split(self) -> tuple[int, int, int]:
        """Return (rank, world size, micro-batches a step)."""
        if self.trainer is None:
            return 0, 1, self.accumulate or 1
        stated = self.trainer.accumulate_grad_batches
        if self.accumulate is not None and stated not in (1, self.accumulate):
            raise ParallelError(
                f"The trainer accumulates {stated} micro-batches but the data module was made for "
                f"accumulate={self.accumulate}. Give the number in one place only."
            )
        return self.trainer.global_rank, self.trainer.world_size, self.accumulate or stated

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: ``samples_seen`` and the data's fingerprint."""
        return {"samples_seen": self.samples_seen, "fingerprint": self.fingerprint()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore ``samples_seen``; Lightning calls this before it asks for the loader.

        Raises:
            CheckpointError: if the state does not hold ``samples_seen``.
            DataError: if the checkpoint was trained on other pictures: positions would then
                mean other samples.
        """
        if "samples_seen" not in state_dict:
            raise CheckpointError(
                "The checkpoint's data state has no 'samples_seen' (found: "
                f"{', '.join(sorted(state_dict)) or 'nothing'}). It was not written by this data "
                "module; start a new run."
            )
        stated = state_dict.get("fingerprint", self.fingerprint())
        if stated != self.fingerprint():
            raise DataError(
                f"The checkpoint was trained on data with fingerprint {stated[:12]}, but this "
                f"data set '{self.name}' has {self.fingerprint()[:12]}: pictures, labels, size or "
                "split changed. Bring the data back, or start a new run."
            )
        self.samples_seen = int(state_dict["samples_seen"])


class _Samples(Dataset[dict[str, Any]]):
    """Turns (position, row) pairs into a batch; what worker processes receive."""

    def __init__(
        self,
        images: ImageDataset,
        seed: int,
        flip: bool,
        captions: Sequence[str] | None = None,
        buckets: BucketedStream | None = None,
    ) -> None:
        self._images = images
        self._seed = seed
        self._flip = flip
        self._captions = captions
        self._buckets = buckets

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, pair: tuple[int, int]) -> dict[str, Any]:
        return {name: value[0] for name, value in self.__getitems__([pair]).items()}

    def __getitems__(self, pairs: Sequence[tuple[int, int]]) -> dict[str, Any]:
        # the loader fetches a whole batch through this method where a data set has it
        position, rows = torch.tensor(pairs, dtype=torch.int64).unbind(1)
        if self._buckets is None:
            images = self._images.images(rows)
        else:  # a batch never leaves its step
            images = self._images.images_at(rows, self._buckets.size(pairs[0][0]))
        if self._flip:
            which = mirrored(self._seed, position)
            images = torch.where(which[:, None, None, None], images.flip(-1), images)
        labels = self._images.labels
        label = torch.full_like(rows, UNLABELLED) if labels is None else labels[rows]
        batch: dict[str, Any] = {"image": images, "label": label, "position": position}
        if self._captions is not None:
            batch["caption"] = [self._captions[row] for row in rows.tolist()]
        return batch


def mirrored(seed: int, position: Tensor) -> Tensor:
    """Return which samples of a batch are mirrored: bool ``(B,)``, true with probability 1/2."""
    return for_step(seed, position).uniform(Purpose.FLIP) < 0.5


def _keep(batch: Any) -> Any:
    """Collate nothing: ``_Samples`` returns whole batches."""
    return batch


def check_num_classes(images: ImageDataset, stated: int | None) -> None:
    """Raise a ``ConfigError`` if the configured number of classes is not the data's.

    Args:
        images: the data set.
        stated: ``data.num_classes``; None takes whatever the data has.
    """
    if stated is not None and stated != images.num_classes:
        raise ConfigError(
            f"data.num_classes={stated}, but '{images.name}' has {images.num_classes} classes. "
            f"Set data.num_classes={images.num_classes}."
        )


def _draw(images: ImageDataset, limit: int, seed: int) -> ImageDataset:
    """Return ``limit`` pictures, a keyed draw: rows are often sorted by class."""
    if not 1 <= limit <= len(images):
        raise ConfigError(
            f"data.limit={limit} is outside 1 to {len(images)}, the pictures of '{images.name}'. "
            "Give a number in that range."
        )
    return images.some(permutation(key(seed, Purpose.SUBSET), len(images))[:limit])


def _check_alike(train: ImageDataset, heldout: ImageDataset) -> None:
    """Raise a ``DataError`` unless both sets have one size and the same classes."""
    for attribute in ("channels", "resolution", "num_frames", "num_classes"):
        ours, theirs = getattr(train, attribute), getattr(heldout, attribute)
        if ours != theirs:
            raise DataError(
                f"The train and held-out pictures of '{train.name}' differ in {attribute}: "
                f"{ours} and {theirs}. Prepare both alike."
            )
    for ours, theirs in zip(train.class_names, heldout.class_names, strict=True):
        if ours != theirs:
            raise DataError(
                f"The train and held-out classes of '{train.name}' differ: where one has "
                f"'{ours}', the other has '{theirs}'. Name the classes alike."
            )


def _check_same_data(images: ImageDataset) -> None:
    """Raise on every process if processes hold different pictures (a folder half copied)."""
    if not torch.distributed.is_initialized():
        return
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, (len(images), images.fingerprint()))
    if len(set(found)) > 1:
        told = "; ".join(f"rank {i}: {n} pictures, {f[:12]}" for i, (n, f) in enumerate(found))
        raise ParallelError(
            f"Processes read different data for '{images.name}' ({told}). "
            "Give every machine the same folder."
        )
