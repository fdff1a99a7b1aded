"""The contract of an image data set: 8-bit pictures of one size, with class ids where known."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from genscale.errors import ConfigError, DataError


class ImageDataset(ABC):
    """Pictures that all have one size, addressed by row; 8-bit until the training step.

    A data set has no order of its own and draws no random numbers: shuffling belongs to
    :class:`~genscale.data.stream.GlobalStream`, flips to the data module.

    Attributes:
        name: word for logs, file names and protocols.
        channels: 1 (grey) or 3 (RGB).
        resolution: height and width in pixels.
        num_classes: number of classes; 0 for an unlabelled set.
        class_names: one name a class, in order of the class ids; empty for an unlabelled set.
        captions: one caption a picture, or None where the set has none.
        num_frames: frames of a clip; 0 for pictures. Clips are described in
            :mod:`genscale.data.clips`.
    """

    name: str
    channels: int
    resolution: int
    num_classes: int
    class_names: tuple[str, ...]
    captions: Sequence[str] | None = None
    num_frames: int = 0

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def labels(self) -> Tensor | None:
        """Class ids ``(n,)`` int64, or None for an unlabelled set."""

    @abstractmethod
    def images(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Return the pictures of some rows: uint8 ``(len(indices), C, H, W)``, repeats allowed.

        Raises:
            IndexError: if a row is below 0 or not below ``len(self)``.
            DataError: if a picture cannot be read; the sentence names the file.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a SHA-256 (64 hex digits) that changes when any picture or label would."""

    def stored_sizes(self) -> Tensor | None:
        """Return height and width of every picture as it is stored: int64 ``(n, 2)``.

        None: pictures are drawn, and no shape suits one better than another.
        """
        return torch.full((len(self), 2), self.resolution)

    def reaches(self, size: tuple[int, int]) -> bool:
        """Return whether every picture can be had at a size, (height, width), without enlarging."""
        return tuple(size) == (self.resolution, self.resolution)

    def images_at(self, indices: Tensor | Sequence[int], size: tuple[int, int]) -> Tensor:
        """Return the pictures of some rows at another size: uint8 ``(len(indices), C, *size)``.

        Args:
            indices: rows, as :meth:`images` takes them.
            size: height and width.

        Raises:
            DataError: the set has pictures of its own size alone.
        """
        if not self.reaches(size):
            raise DataError(
                f"The pictures of '{self.name}' have {self.resolution}x{self.resolution} pixels, "
                f"and {size[0]}x{size[1]} were asked for. Take data that are drawn or cropped at "
                "any size, e.g. data=scenes or data=image_folder."
            )
        return self.images(indices)

    def image(self, index: int) -> Tensor:
        """Return one picture: uint8 ``(C, H, W)``."""
        return self.images([index])[0]

    def some(self, rows: Tensor) -> ImageDataset:
        """Return a data set of some rows ``(n,)``, in their order; this one stays as it is."""
        return SomeImages(self, rows)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.name}, {len(self)} pictures, "
            f"{self.channels}x{self.resolution}x{self.resolution}, {self.num_classes} classes)"
        )


def row_numbers(indices: Tensor | Sequence[int], count: int) -> Tensor:
    """Check row numbers and return them as int64 ``(n,)``.

    Raises:
        IndexError: if one lies outside ``0 .. count - 1``. Negative rows are refused too: a row
            number computed wrongly must not quietly read from the end.
    """
    rows = torch.as_tensor(indices, dtype=torch.int64).reshape(-1)
    if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= count):
        wrong = int(rows.min()) if int(rows.min()) < 0 else int(rows.max())
        raise IndexError(f"Row {wrong} does not exist: the data set has rows 0 to {count - 1}.")
    return rows


def check_resolution(resolution: int, lowest: int, highest: int, what: str) -> None:
    """Raise a ``ConfigError`` unless ``lowest <= resolution <= highest``."""
    check_size((resolution,), lowest, highest, what, f"data.resolution={resolution}")


def check_size(
    size: Sequence[int], lowest: int, highest: int, what: str, given: str | None = None
) -> None:
    """Raise a ``ConfigError`` unless every side is within ``lowest`` and ``highest``.

    Args:
        size: sides in pixels.
        lowest: the least.
        highest: the most.
        what: the data, in the plural.
        given: how the size was given; None: by its numbers.
    """
    if not all(lowest <= side <= highest for side in size):
        raise ConfigError(
            f"{given or f'a size of {size[0]}x{size[-1]}'} is outside the range of {what}. "
            f"Choose {lowest} to {highest} pixels."
        )


def check_channels(channels: int) -> None:
    """Raise a ``ConfigError`` unless there are 1 or 3 channels."""
    if channels not in (1, 3):
        raise ConfigError(f"data.channels={channels} is neither 1 (grey) nor 3 (RGB). Choose one.")


class TensorImages(ImageDataset):
    """A data set held in memory as one uint8 tensor.

    Args:
        pixels: uint8 ``(n, C, H, W)``, square. A grey set asked for in colour may be an expanded
            view (stride 0 over the channels); it then costs no memory.
        labels: ``(n,)`` class ids below ``len(class_names)``, or None.
        class_names: one name a class; empty without labels.
        name: word for logs and file names.
        captions: one caption a picture, or None.

    Raises:
        DataError: if shapes, types or labels do not fit together, or there are no pictures.
    """

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor | None = None,
        *,
        class_names: Sequence[str] = (),
        name: str = "tensor",
        captions: Sequence[str] | None = None,
    ) -> None:
        if pixels.dtype != torch.uint8 or pixels.dim() != 4 or pixels.shape[2] != pixels.shape[3]:
            raise DataError(
                f"The pictures of '{name}' must be one uint8 tensor of shape (n, C, H, H), but are "
                f"{pixels.dtype} of shape {tuple(pixels.shape)}. Convert them first."
            )
        if len(pixels) == 0:
            raise DataError(f"The data set '{name}' holds no pictures. Give at least one.")
        check_channels(pixels.shape[1])
        if labels is not None:
            labels = labels.to(torch.int64)
            if labels.shape != (len(pixels),):
                raise DataError(
                    f"The data set '{name}' has {len(pixels)} pictures but labels of shape "
                    f"{tuple(labels.shape)}. Give one label a picture."
                )
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= len(class_names):
                raise DataError(
                    f"The labels of '{name}' run from {low} to {high}, but it has "
                    f"{len(class_names)} class names. Labels count from 0; name every class."
                )
        elif class_names:
            raise DataError(
                f"The data set '{name}' has {len(class_names)} class names but no labels. "
                "Give both or neither."
            )
        if captions is not None and len(captions) != len(pixels):
            raise DataError(
                f"The data set '{name}' has {len(pixels)} pictures but {len(captions)} captions. "
                "Give one caption a picture."
            )
        self.name = name
        self.channels = int(pixels.shape[1])
        self.resolution = int(pixels.shape[2])
        self.class_names = tuple(class_names)
        self.num_classes = len(self.class_names)
        self.captions = captions
        self._pixels = pixels
        self._labels = labels

    def __len__(self) -> int:
        return len(self._pixels)

    @property
    def labels(self) -> Tensor | None:
        """Class ids ``(n,)`` int64, or None."""
        return self._labels

    def images(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Return the pictures of some rows; see :meth:`ImageDataset.images`."""
        return self._pixels[row_numbers(indices, len(self))].contiguous()

    def fingerprint(self) -> str:
        """Return the SHA-256 over shape, pixels, labels, class names and captions."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(repr(tuple(self._pixels.shape)).encode())
        for start in range(0, len(self), 1024):  # expanded views are copied a part at a time
            digest.update(self._pixels[start : start + 1024].contiguous().numpy().data)
        if self._labels is not None:
            digest.update(self._labels.contiguous().numpy().data)
        digest.update(repr((self.class_names, self.captions and tuple(self.captions))).encode())
        return digest.hexdigest()


class SomeImages(ImageDataset):
    """Some rows of another data set, which stays as it is.

    Args:
        source: the data set.
        rows: ``(n,)`` its rows in the order wanted.
    """

    def __init__(self, source: ImageDataset, rows: Tensor) -> None:
        self._source = source
        self._rows = row_numbers(rows, len(source))
        self.name = source.name
        self.channels = source.channels
        self.resolution = source.resolution
        self.class_names = source.class_names
        self.num_classes = source.num_classes
        self.num_frames = source.num_frames
        captions = source.captions
        self.captions = None if captions is None else [captions[i] for i in self._rows.tolist()]

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def labels(self) -> Tensor | None:
        """Class ids ``(n,)`` int64, or None; all classes of the source count as known."""
        labels = self._source.labels
        return None if labels is None else labels[self._rows]

    def images(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Return the pictures of some rows; see :meth:`ImageDataset.images`."""
        return self._source.images(self._rows[row_numbers(indices, len(self))])

    def stored_sizes(self) -> Tensor | None:
        """Return height and width of every picture as the source stores it."""
        sizes = self._source.stored_sizes()
        return None if sizes is None else sizes[self._rows]

    def reaches(self, size: tuple[int, int]) -> bool:
        """Return whether the source does."""
        return self._source.reaches(size)

    def images_at(self, indices: Tensor | Sequence[int], size: tuple[int, int]) -> Tensor:
        """Return the pictures of some rows at a size; see :meth:`ImageDataset.images_at`."""
        return self._source.images_at(self._rows[row_numbers(indices, len(self))], size)

    def fingerprint(self) -> str:
        """Return the SHA-256 over the source's fingerprint and the rows."""
        digest = hashlib.sha256(self._source.fingerprint().encode())
        digest.update(self._rows.contiguous().numpy().data)
        return digest.hexdigest()
