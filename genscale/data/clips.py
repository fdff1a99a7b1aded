"""Clips as data: the contract of a clip data set, one in memory, and the module that feeds them.

A clip is a picture with one more axis: everything that holds for pictures
(:mod:`genscale.data.base`) holds for clips ``(C, T, H, W)``. A still picture is a clip of equal
frames, shown at an infinite number of frames a second.
"""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from genscale.data.base import ImageDataset, SomeImages, TensorImages, row_numbers
from genscale.data.module import UNLABELLED, ImageDataModule, mirrored
from genscale.errors import ConfigError, DataError
from genscale.rng import Purpose, for_step, key, permutation

STILL = math.inf  # frames a second of a still picture: its frames lie no time apart


class ClipDataset(ImageDataset):
    """Clips that all have one size and one number of frames, addressed by row.

    Attributes:
        num_frames: frames of a clip, T.
        usual_frame_rate: frames a second that samples are made for unless told otherwise.
        replaces_damaged: another clip takes the place of one that cannot be read.
    """

    usual_frame_rate: float
    replaces_damaged: bool = False

    @abstractmethod
    def images(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Return one fixed clip of each row: uint8 ``(len(indices), C, T, H, W)``.

        Raises:
            IndexError: if a row is below 0 or not below ``len(self)``.
            DataError: if a clip cannot be read; the sentence names the file.
        """

    @abstractmethod
    def frame_rate(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Return the frames a second of each row's fixed clip: float32 ``(len(indices),)``."""

    def clips(self, indices: Tensor | Sequence[int], keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return a clip of each row as keys choose it, for training.

        Args:
            indices: rows ``(n,)``.
            keys: ``(n,)`` int64, see :mod:`genscale.rng`: they choose where a clip begins and its
                frame rate, as far as the data leave a choice.

        Returns:
            uint8 ``(n, C, T, H, W)`` and the frames a second, float32 ``(n,)``.
        """
        return self.images(indices), self.frame_rate(indices)

    def taken(self, indices: Tensor | Sequence[int], keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return :meth:`clips`, and the rows they are of: others where a file is damaged.

        Returns:
            uint8 ``(n, C, T, H, W)``; frames a second, float32 ``(n,)``; rows, int64 ``(n,)``.
        """
        return *self.clips(indices, keys), row_numbers(indices, len(self))

    def mirrored_caption(self, caption: str) -> str:
        """Return what a caption says of the mirrored clip: the same, unless it names sides."""
        return caption

    def some(self, rows: Tensor) -> ClipDataset:
        """Return a data set of some rows ``(n,)``, in their order; this one stays as it is."""
        return SomeClips(self, rows)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.name}, {len(self)} clips, {self.channels}x"
            f"{self.num_frames}x{self.resolution}x{self.resolution}, {self.num_classes} classes)"
        )


class SomeClips(SomeImages, ClipDataset):
    """Some rows of another clip data set, which stays as it is.

    Args:
        source: the data set.
        rows: ``(n,)`` its rows in the order wanted.
    """

    def __init__(self, source: ClipDataset, rows: Tensor) -> None:
        super().__init__(source, rows)
        self._clips = source
        self.usual_frame_rate = source.usual_frame_rate

    def frame_rate(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Return the frame rates of some rows; see :meth:`ClipDataset.frame_rate`."""
        return self._clips.frame_rate(self._rows[row_numbers(indices, len(self))])

    def clips(self, indices: Tensor | Sequence[int], keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return clips as keys choose them; see :meth:`ClipDataset.clips`."""
        return self._clips.clips(self._rows[row_numbers(indices, len(self))], keys)

    def mirrored_caption(self, caption: str) -> str:
        """Return what a caption says of the mirrored clip."""
        return self._clips.mirrored_caption(caption)

    def some(self, rows: Tensor) -> ClipDataset:
        """Return a data set of some of these rows."""
        return SomeClips(self, rows)


class TensorClips(ClipDataset):
    """A clip data set held in memory as one uint8 tensor.

    Args:
        pixels: uint8 ``(n, C, T, H, W)``, square.
        frame_rate: frames a second of all clips, or of each ``(n,)``.
        labels: ``(n,)`` class ids below ``len(class_names)``, or None.
        class_names: one name a class; empty without labels.
        name: word for logs and file names.
        captions: one caption a clip, or None.

    Raises:
        DataError: if shapes, types, labels or frame rates do not fit together.
    """

    def __init__(
        self,
        pixels: Tensor,
        frame_rate: float | Tensor = 8.0,
        labels: Tensor | None = None,
        *,
        class_names: Sequence[str] = (),
        name: str = "tensor",
        captions: Sequence[str] | None = None,
    ) -> None:
        if pixels.dtype != torch.uint8 or pixels.dim() != 5 or pixels.shape[2] < 1:
            raise DataError(
                f"The clips of '{name}' must be one uint8 tensor of shape (n, C, T, H, H), but are "
                f"{pixels.dtype} of shape {tuple(pixels.shape)}. Convert them first."
            )
        rates = torch.as_tensor(frame_rate, dtype=torch.float32)
        if rates.shape not in ((), (len(pixels),)) or not bool((rates > 0).all()):
            raise DataError(
                f"The frame rates of '{name}' must be one number above 0, or one for each of "
                f"{len(pixels)} clips, but were given as {frame_rate}."
            )
        # what must hold of pictures must hold of first frames
        first = TensorImages(
            pixels[:, :, 0], labels, class_names=class_names, name=name, captions=captions
        )
        self.name = name
        self.channels = first.channels
        self.resolution = first.resolution
        self.class_names = first.class_names
        self.num_classes = first.num_classes
        self.captions = captions
        self.num_frames = int(pixels.shape[2])
        self.usual_frame_rate = float(rates.reshape(-1)[0])
        self._first = first
        self._pixels = pixels
        self._rates = rates.expand(len(pixels))

    def __len__(self) -> int:
        return len(self._pixels)

    @property
    def labels(self) -> Tensor | None:
        """Class ids ``(n,)`` int64, or None."""
        return self._first.labels

    def images(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Return the clips of some rows; see :meth:`ClipDataset.images`."""
        return self._pixels[row_numbers(indices, len(self))].contiguous()

    def frame_rate(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Return the frame rates of some rows; see :meth:`ClipDataset.frame_rate`."""
        return self._rates[row_numbers(indices, len(self))]

    def fingerprint(self) -> str:
        """Return the SHA-256 over pixels, frame rates, labels, class names and captions."""
        digest = hashlib.sha256(self._first.fingerprint().encode())
        digest.update(repr(tuple(self._pixels.shape)).encode())
        for start in range(0, len(self), 64):
            digest.update(self._pixels[start : start + 64].contiguous().numpy().data)
        digest.update(self._rates.contiguous().numpy().data)
        return digest.hexdigest()


class ClipDataModule(ImageDataModule):
    """Feeds a training run with clips, and with still pictures among them.

    Whether a sample is a picture, and which one, is keyed by its position, so that it does not
    depend on how a run is split or where it was resumed.

    Args:
        train: clips to train on.
        heldout: clips of the same size to compare with, or None.
        images: still pictures of the same height, width and channels, shown as clips of equal
            frames with an infinite frame rate; None: there are none.
        image_ratio: share of samples that are still pictures, 0 to 1.
        batch_size: samples of one optimizer step, over all processes and accumulated
            micro-batches.
        num_workers: processes that read ahead; 0 reads in the training process.
        flip: mirror every sample left to right with probability 1/2, its caption included.
        seed: the run's seed.
        limit: train on so many clips only, drawn with a key, and on their fixed parts; on as many
            pictures at most. None takes all.
        accumulate: micro-batches of one optimizer step on each process, see
            :class:`~genscale.data.module.ImageDataModule`.
        name: word for run folders; the train set's by default.

    Raises:
        DataError: if train, heldout and pictures do not fit together.
        ConfigError: if a number is out of range, or pictures are asked for where there are none.
    """

    train: ClipDataset

    def __init__(
        self,
        train: ClipDataset,
        heldout: ClipDataset | None = None,
        *,
        images: ImageDataset | None = None,
        image_ratio: float = 0.0,
        batch_size: int,
        num_workers: int = 0,
        flip: bool = False,
        seed: int = 0,
        limit: int | None = None,
        accumulate: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            train,
            heldout,
            batch_size=batch_size,
            num_workers=num_workers,
            flip=flip,
            seed=seed,
            limit=limit,
            accumulate=accumulate,
            name=name,
        )
        if not 0.0 <= image_ratio <= 1.0 or (image_ratio > 0 and images is None):
            raise ConfigError(
                f"data.image_ratio={image_ratio} must lie in 0 to 1, and '{train.name}' has "
                f"{'no still pictures' if images is None else 'still pictures'}. "
                "Give another share."
            )
        if images is not None:
            _check_pictures(train, images)
            if limit is not None:
                order = permutation(key(seed, Purpose.SUBSET), len(images))
                images = images.some(order[:limit])
        self.images = images
        self.image_ratio = image_ratio
        self.fixed = limit is not None

    @property
    def frame_rate(self) -> float:
        """Frames a second that samples are made for unless told otherwise."""
        return self.train.usual_frame_rate

    def fingerprint(self) -> str:
        """Return the SHA-256 of the train set, and of the pictures among it where there are any."""
        own = self.train.fingerprint()
        if self.images is None or self.image_ratio == 0:
            return own
        parts = (own, self.images.fingerprint(), self.image_ratio)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def samples(self) -> Dataset[dict[str, Any]]:
        """Return what turns (position, row) pairs into batches, in the reading processes.

        A batch is ``{"image": uint8 (B, C, T, H, W), "label", "position", "frame_rate": float32
        (B,)}``, with :attr:`with_captions` also ``"caption"``. Of data that replace
        damaged files, ``"replaced"``, bool ``(B,)``, tells which samples were.
        """
        return _ClipSamples(self)


class _ClipSamples(Dataset[dict[str, Any]]):
    """Turns (position, row) pairs into a batch; what worker processes receive."""

    def __init__(self, module: ClipDataModule) -> None:
        # not the module itself: it holds the trainer
        self._clips = module.train
        self._pictures = module.images if module.image_ratio > 0 else None
        self._ratio = module.image_ratio
        self._seed = module.seed
        self._flip = module.flip
        self._fixed = module.fixed
        self._with_captions = module.with_captions

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, pair: tuple[int, int]) -> dict[str, Any]:
        return {name: value[0] for name, value in self.__getitems__([pair]).items()}

    def __getitems__(self, pairs: Sequence[tuple[int, int]]) -> dict[str, Any]:
        # the loader fetches a whole batch through this method where a data set has it
        position, rows = torch.tensor(pairs, dtype=torch.int64).unbind(1)
        still = torch.zeros(len(rows), dtype=torch.bool)
        if self._pictures is not None:
            random = for_step(self._seed, position)
            still = random.uniform(Purpose.PICTURE) < self._ratio
            rows = torch.where(
                still, random.integers(Purpose.PICTURE_ROW, len(self._pictures)), rows
            )
        clips = self._clips
        shape = (clips.channels, clips.num_frames, clips.resolution, clips.resolution)
        image = torch.empty(len(rows), *shape, dtype=torch.uint8)
        frame_rate = torch.full((len(rows),), STILL)
        replaced = torch.zeros_like(still)
        if not bool(still.all()):
            moving = rows[~still]
            keys = key(self._seed, position[~still], Purpose.CLIP)
            # what was read decides labels and captions: a damaged file's place is taken by another
            image[~still], frame_rate[~still], rows[~still] = (
                (clips.images(moving), clips.frame_rate(moving), moving)
                if self._fixed
                else clips.taken(moving, keys)
            )
            replaced[~still] = rows[~still] != moving
        if self._pictures is not None and bool(still.any()):
            image[still] = self._pictures.images(rows[still]).unsqueeze(2)  # the same at all times
        flipped = torch.zeros_like(still)
        if self._flip:
            flipped = mirrored(self._seed, position)
            image = torch.where(flipped.view(-1, 1, 1, 1, 1), image.flip(-1), image)
        batch: dict[str, Any] = {
            "image": image,
            "label": self._labels(rows, still),
            "position": position,
            "frame_rate": frame_rate,
        }
        if clips.replaces_damaged:
            batch["replaced"] = replaced
        if self._with_captions and clips.captions is not None:
            batch["caption"] = self._captions(rows, still, flipped)
        return batch

    def _labels(self, rows: Tensor, still: Tensor) -> Tensor:
        label = torch.full_like(rows, UNLABELLED)
        for source, which in ((self._clips, ~still), (self._pictures, still)):
            labels = None if source is None else source.labels
            if labels is not None:
                label[which] = labels[rows[which]]
        return label

    def _captions(self, rows: Tensor, still: Tensor, flipped: Tensor) -> list[str]:
        texts = []
        for row, is_still, is_flipped in zip(
            rows.tolist(), still.tolist(), flipped.tolist(), strict=True
        ):
            source = self._pictures if is_still else self._clips
            captions = None if source is None else source.captions
            text = "" if captions is None else captions[row]
            texts.append(self._clips.mirrored_caption(text) if is_flipped else text)
        return texts


def _check_pictures(clips: ClipDataset, images: ImageDataset) -> None:
    """Raise a ``DataError`` unless still pictures can stand among clips."""
    if images.num_frames:
        raise DataError(
            f"'{images.name}' holds clips of {images.num_frames} frames, and still pictures were "
            "expected. Give a data set of pictures."
        )
    for attribute in ("channels", "resolution"):
        ours, theirs = getattr(clips, attribute), getattr(images, attribute)
        if ours != theirs:
            raise DataError(
                f"The clips of '{clips.name}' and the pictures of '{images.name}' differ in "
                f"{attribute}: {ours} and {theirs}. Prepare both alike."
            )
    if images.labels is not None and images.class_names != clips.class_names:
        raise DataError(
            f"The clips of '{clips.name}' and the pictures of '{images.name}' have other classes. "
            "Name the classes alike, or leave the labels of the pictures out."
        )
