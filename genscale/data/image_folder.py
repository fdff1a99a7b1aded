"""Folders of PNG, JPEG, WebP and BMP files, cropped as ADM crops ImageNet."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import struct
import zlib
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from genscale.data.base import (
    ImageDataset,
    check_channels,
    check_resolution,
    check_size,
    row_numbers,
)
from genscale.data.paths import Paths, held_out
from genscale.data.transforms import center_crop, to_rgb, to_tensor
from genscale.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL import Image

    from genscale.data.module import ImageDataModule

LOWEST, HIGHEST = 8, 2048  # pixels a side
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_ORIENTATION = 0x0112  # EXIF tag; these values turn a picture by a quarter
_ON_THEIR_SIDE = (5, 6, 7, 8)
_SHOWN = 20  # names of damaged files in one log record; all are in ``damaged``

logger = logging.getLogger(__name__)


class ImageFolder(ImageDataset):
    """Every picture below a folder, in order of its path, read when asked for.

    A picture is converted to RGB (:func:`~genscale.data.transforms.to_rgb`) and cropped with
    ADM's centre crop (:func:`~genscale.data.transforms.center_crop`); nothing is drawn at random.
    Names beginning with a dot are passed over; files with other endings are passed over, counted
    by ending and logged. Links to folders are followed.

    Args:
        root: the folder.
        resolution: 8 to 2048 pixels.
        channels: 3, or 1 for grey (BT.601 luma).
        labels: ``"folders"``: each folder directly below ``root`` is a class, in order of their
            names, and may hold further folders; ``"none"``: no classes, any layout.
        verify: what is checked before training. ``"headers"`` opens every file and reads its
            size (some 0.05 ms a file on a local disk); ``"pixels"`` decodes every file and so
            finds truncated ones too; ``"none"`` trusts the folder. Whatever is not found here
            raises when the picture is read.
        on_damage: what happens to files that fail ``verify``: ``"raise"``, or ``"skip"``, which
            leaves them out, logs their number and names once and lists them in :attr:`damaged`.
        name: word for logs and file names; the folder's name by default.

    Attributes:
        root: the folder.
        damaged: paths, relative to ``root``, of files that were left out.

    Raises:
        DataError: if the folder is missing or holds no pictures, its layout does not fit
            ``labels``, or a file is damaged.
        ConfigError: if an argument is not one of those above.
    """

    def __init__(
        self,
        root: str | Path,
        resolution: int,
        *,
        channels: int = 3,
        labels: Literal["folders", "none"] = "folders",
        verify: Literal["headers", "pixels", "none"] = "headers",
        on_damage: Literal["raise", "skip"] = "raise",
        name: str | None = None,
    ) -> None:
        check_resolution(resolution, LOWEST, HIGHEST, "picture folders")
        check_channels(channels)
        for what, given, known in (
            ("labels", labels, ("folders", "none")),
            ("verify", verify, ("headers", "pixels", "none")),
            ("on_damage", on_damage, ("raise", "skip")),
        ):
            if given not in known:
                raise ConfigError(f"data.{what}='{given}' is unknown. Choose {_either(known)}.")
        if on_damage == "skip" and verify == "none":
            raise ConfigError(
                "data.on_damage=skip leaves out files that fail the check, but data.verify=none "
                "checks nothing. Set data.verify=headers or pixels."
            )
        self.root = Path(root).expanduser()
        self.name = name or self.root.resolve().name
        self.resolution = resolution
        self.channels = channels
        paths, ignored = _scan(self.root)
        if ignored:
            told = ", ".join(f"{count} {ending}" for ending, count in sorted(ignored.items()))
            logger.info("%s: passed over files that are no pictures: %s", self.root, told)
        self.class_names = class_folders(paths, self.root) if labels == "folders" else ()
        self.num_classes = len(self.class_names)
        self.damaged: tuple[str, ...] = ()
        if verify != "none":
            paths = self._without_damaged(paths, whole=verify == "pixels", skip=on_damage == "skip")
        self._paths = Paths(paths)
        self._sizes: Tensor | None = None
        self._labels: Tensor | None = None
        if self.class_names:
            number = {name: i for i, name in enumerate(self.class_names)}
            self._labels = torch.tensor([number[path.split("/", 1)[0]] for path in paths])

    def __len__(self) -> int:
        return len(self._paths)

    @property
    def labels(self) -> Tensor | None:
        """Class ids ``(n,)`` int64, or None."""
        return self._labels

    def path(self, index: int) -> str:
        """Return the path of a row, relative to ``root``, with forward slashes."""
        return self._paths[int(row_numbers([index], len(self))[0])]

    def images(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Read the pictures of some rows; see :meth:`ImageDataset.images`.

        Raises:
            DataError: if a file cannot be decoded or is gone; the sentence names it.
        """
        return self.images_at(indices, (self.resolution, self.resolution))

    def images_at(self, indices: Tensor | Sequence[int], size: tuple[int, int]) -> Tensor:
        """Read the pictures of some rows cropped to a size; see :meth:`ImageDataset.images_at`.

        Files smaller than that are enlarged; :meth:`reaches` tells whether there are any.

        Raises:
            ConfigError: a side is out of range.
            DataError: if a file cannot be decoded or is gone; the sentence names it.
        """
        check_size(size, LOWEST, HIGHEST, "picture folders")
        rows = row_numbers(indices, len(self)).tolist()
        result = torch.empty(len(rows), self.channels, *size, dtype=torch.uint8)
        for place, row in enumerate(rows):
            result[place] = self._read(self._paths[row], size)
        return result

    def stored_sizes(self) -> Tensor:
        """Return height and width of every file, int64 ``(n, 2)``; headers are read once.

        Raises:
            DataError: a header cannot be read; the sentence names the file.
        """
        if self._sizes is None:
            self._sizes = torch.tensor([self._size(path) for path in self._paths])
        return self._sizes

    def reaches(self, size: tuple[int, int]) -> bool:
        """Return whether every file has at least so many pixels in height and width."""
        if not all(LOWEST <= side <= HIGHEST for side in size):
            return False
        return bool((self.stored_sizes() >= torch.tensor(size)).all())

    def split(self, heldout_fraction: float) -> tuple[ImageFolder, ImageFolder]:
        """Divide into (train, held out) by a keyed hash of each relative path.

        A file's side depends on its path alone, so it stays there when files are added.

        Raises:
            ConfigError: if the fraction is not between 0 and 1.
            DataError: if a side would be empty.
        """
        heldout = held_out(self._paths, heldout_fraction)
        return self._select(~heldout), self._select(heldout)

    def fingerprint(self) -> str:
        """Return the SHA-256 over sorted (path, size in bytes), crop size, channels and classes.

        Pictures are not read: a file rewritten with the same name and size goes unnoticed.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        how = (self.resolution, self.channels, self.class_names, "adm centre crop")
        digest = hashlib.sha256(repr(how).encode())
        for path in self._paths:
            try:
                size = (self.root / path).stat().st_size
            except FileNotFoundError as error:
                raise DataError(
                    f"{self.root / path} was there at the start and is gone. Put it back, or "
                    "start again."
                ) from error
            digest.update(f"{path}\0{size}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def _select(self, mask: Tensor) -> ImageFolder:
        part = copy.copy(self)
        part.__dict__.pop("_fingerprint", None)
        kept = mask.tolist()
        part._paths = Paths([path for path, keep in zip(self._paths, kept, strict=True) if keep])
        part._labels = None if self._labels is None else self._labels[mask]
        part._sizes = None if self._sizes is None else self._sizes[mask]
        return part

    def _read(self, path: str, size: tuple[int, int]) -> Tensor:
        try:
            with _open(self.root / path) as image:
                return to_tensor(center_crop(to_rgb(image), size), self.channels)
        except _read_errors() as error:
            raise self._unreadable(path, error) from error

    def _size(self, path: str) -> tuple[int, int]:
        try:
            with _open(self.root / path) as image:
                width, height = image.size
                turned = image.getexif().get(_ORIENTATION, 1) in _ON_THEIR_SIDE
        except _read_errors() as error:
            raise self._unreadable(path, error) from error
        return (width, height) if turned else (height, width)

    def _unreadable(self, path: str, error: Exception) -> DataError:
        return DataError(
            f"{self.root / path} cannot be read as a picture ({_reason(error)}). Remove or "
            "replace it, or find all such files at the start with data.verify=pixels and "
            "data.on_damage=skip."
        )

    def _without_damaged(self, paths: list[str], *, whole: bool, skip: bool) -> list[str]:
        """Check all files; return the good ones, or raise if there are bad ones to raise for."""
        damaged: dict[str, str] = {}
        for path in paths:
            try:
                with _open(self.root / path) as image:
                    if whole:
                        to_rgb(image)
            except _read_errors() as error:
                damaged[path] = _reason(error)
        if not damaged:
            return paths
        names = list(damaged)
        shown = "; ".join(f"{name} ({damaged[name]})" for name in names[:_SHOWN])
        if len(names) > _SHOWN:
            shown += f"; and {len(names) - _SHOWN} more"
        if not skip:
            raise DataError(
                f"{len(names)} of {len(paths)} files in {self.root} cannot be read as pictures: "
                f"{shown}. Remove or replace them, or leave them out with data.on_damage=skip."
            )
        if len(names) == len(paths):
            raise DataError(
                f"None of the {len(paths)} files in {self.root} can be read as a picture: {shown}. "
                "Check data.root."
            )
        logger.warning("%s: left out %d damaged files: %s", self.root, len(names), shown)
        self.damaged = tuple(names)
        return [path for path in paths if path not in damaged]


def _scan(root: Path) -> tuple[list[str], Counter[str]]:
    """Return the pictures below ``root`` (relative, sorted) and what else lies there by ending."""
    if not root.is_dir():
        raise DataError(
            f"There is no folder {root}. Give data.root=<folder of pictures>, or of class folders "
            "that hold pictures."
        )
    paths: list[str] = []
    ignored: Counter[str] = Counter()
    visited: set[str] = set()
    for folder, folders, files in os.walk(root, onerror=_refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:  # a link that leads back up, or to a folder that was read already
            raise DataError(
                f"{folder} is a link to a folder that is read already ({real}); its pictures would "
                "count twice. Remove the link."
            )
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = os.path.relpath(folder, root).replace(os.sep, "/")
        for name in files:
            ending = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                continue
            if ending in SUFFIXES:
                paths.append(name if inside == "." else f"{inside}/{name}")
            else:
                ignored[ending or "without ending"] += 1
    if not paths:
        there = ", ".join(f"{count} {ending}" for ending, count in sorted(ignored.items()))
        raise DataError(
            f"{root} holds no pictures ({_either(SUFFIXES)}); found: {there or 'nothing'}. "
            "Check data.root."
        )
    return sorted(paths), ignored


def _refuse(error: OSError) -> None:
    """Raise where ``os.walk`` would pass over a folder it may not read."""
    raise DataError(
        f"The folder {error.filename} cannot be read ({error.strerror}), and its pictures would "
        "be missing. Give yourself the right to read it, or remove it."
    ) from error


def class_folders(paths: list[str], root: Path, what: str = "pictures") -> tuple[str, ...]:
    """Return the folders directly below ``root`` after checking that they can be classes."""
    flat = [path for path in paths if "/" not in path]
    names = {path.split("/", 1)[0] for path in paths if "/" in path}
    if flat:
        raise DataError(
            f"{root} holds {len(flat)} {what} outside class folders (first: {flat[0]}), and "
            "data.labels=folders expects each in the folder of its class. Sort them into folders, "
            "or set data.labels=none."
        )
    if len(names) == 1:
        only = next(iter(names))
        raise DataError(
            f"{root} holds {what} in one class folder only ('{only}'), and two classes or more "
            f"were expected. If the classes lie inside it, give data.root={root / only}; to train "
            "without classes set data.labels=none."
        )
    with os.scandir(root) as entries:
        folders = {entry.name for entry in entries if entry.is_dir() and entry.name[0] != "."}
    empty = sorted(folders - names)
    if empty:
        raise DataError(
            f"{root} has {len(empty)} class folders without {what} (first: '{empty[0]}'). "
            f"Remove them, or put their {what} there."
        )
    return tuple(sorted(names))


def _open(path: Path) -> Image.Image:
    """Open a file as one of our formats whatever its ending says; reads the header only."""
    from PIL import Image

    return Image.open(path, formats=_FORMATS)


def _read_errors() -> tuple[type[Exception], ...]:
    """Return what Pillow and :func:`to_rgb` raise of files that are damaged or no pictures."""
    from PIL import Image

    damaged = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)
    return (*damaged, Image.DecompressionBombError, DataError)


def _reason(error: Exception) -> str:
    """Return what went wrong without the path, which the caller names."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "no PNG, JPEG, WebP or BMP header"
    if isinstance(error, FileNotFoundError):
        return "the file is gone"
    return str(error).rstrip(".") or type(error).__name__


def _either(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def image_folder_module(
    *,
    name: str,
    root: str | None,
    resolution: int,
    channels: int,
    num_classes: int | None,
    labels: Literal["folders", "none"],
    verify: Literal["headers", "pixels", "none"],
    on_damage: Literal["raise", "skip"],
    heldout_root: str | None,
    heldout_fraction: float,
    flip: bool,
    num_workers: int,
    batch_size: int,
    seed: int,
    limit: int | None = None,
    buckets: Sequence[Sequence[int]] | None = None,
) -> ImageDataModule:
    """Build the data module of ``data=image_folder``; the arguments are the keys of its YAML.

    Args:
        name: word for run folders.
        root: folder of the training pictures; must be set.
        resolution: height and width in pixels.
        channels: 3 or 1.
        num_classes: checked against the class folders; None counts them.
        labels: see :class:`ImageFolder`.
        verify: see :class:`ImageFolder`.
        on_damage: see :class:`ImageFolder`.
        heldout_root: folder of the held-out pictures, laid out as ``root``, or None.
        heldout_fraction: share of ``root`` to hold out instead; 0 holds nothing out.
        flip: mirror samples at random.
        num_workers: reading processes.
        batch_size: samples of one optimizer step.
        seed: the run's seed.
        limit: train on so many pictures only.
        buckets: heights and widths to train on by turns; None: ``resolution`` alone.

    Raises:
        ConfigError: if ``root`` is not set, both ways of holding out are used, or the number of
            classes is another.
        DataError: if a folder is missing, empty or damaged.
    """
    from genscale.data.module import ImageDataModule, check_num_classes

    if root is None:
        raise ConfigError(
            f"data.root is not set, and data={name} needs the folder of its pictures. "
            "Give data.root=/path/to/pictures (one folder a class, or data.labels=none)."
        )
    if heldout_root is not None and heldout_fraction:
        raise ConfigError(
            f"data.heldout_root={heldout_root} and data.heldout_fraction={heldout_fraction} both "
            "say what is held out. Set one of them."
        )

    def read(folder: str) -> ImageFolder:
        return ImageFolder(
            folder,
            resolution,
            channels=channels,
            labels=labels,
            verify=verify,
            on_damage=on_damage,
            name=name,
        )

    train, heldout = read(root), None
    check_num_classes(train, num_classes)
    if heldout_root is not None:
        heldout = read(heldout_root)
    elif heldout_fraction:
        train, heldout = train.split(heldout_fraction)
    return ImageDataModule(
        train,
        heldout,
        name=name,
        batch_size=batch_size,
        num_workers=num_workers,
        flip=flip,
        seed=seed,
        limit=limit,
        buckets=buckets,
    )
