"""IDX files, the format of MNIST and its relatives."""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from genscale.data.base import TensorImages, check_channels, check_resolution
from genscale.data.transforms import resize, with_channels
from genscale.errors import ConfigError, DataError

Split = Literal["train", "heldout"]

_UNSIGNED_BYTES = 0x08  # third byte of the magic number: the element type
_NAME = re.compile(
    r"^(?P<subset>.*?)[-_.]?(?P<split>train|t10k|test)[-_.](?P<kind>images|labels)"
    r"[-_.]idx[13][-_.]ubyte(\.gz)?$"
)


def read_idx(path: str | Path) -> Tensor:
    """Read one IDX file of unsigned bytes, gzip-compressed or not (told by its first bytes).

    The format: two zero bytes, a type byte, the number of axes, the axes as big-endian uint32,
    then the elements.

    Returns:
        uint8 tensor of the stated axes.

    Raises:
        FileNotFoundError: if there is no such file.
        DataError: if it is damaged, truncated, longer than it says, or of another type.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} is a damaged gzip file ({error}). Fetch or copy it again."
        ) from error
    if len(raw) < 4 or raw[:2] != b"\0\0":
        raise DataError(
            f"{path} is no IDX file: it must begin with two zero bytes, a type and a number of "
            f"axes, but begins with {raw[:4].hex(' ') or 'nothing'}. Fetch or copy it again."
        )
    kind, axes = raw[2], raw[3]
    if kind != _UNSIGNED_BYTES:
        raise DataError(
            f"{path} holds IDX type 0x{kind:02x}, and unsigned bytes (0x08) were expected. "
            "Convert it to 8 bits."
        )
    start = 4 + 4 * axes
    if axes == 0 or len(raw) < start:
        raise DataError(
            f"{path} ends inside its header of {axes} axes ({len(raw)} bytes). "
            "Fetch or copy it again."
        )
    shape = struct.unpack(f">{axes}I", raw[4:start])
    if len(raw) - start != math.prod(shape):
        raise DataError(
            f"{path} says {' x '.join(map(str, shape))} = {math.prod(shape)} bytes but holds "
            f"{len(raw) - start}. It is truncated or damaged; fetch or copy it again."
        )
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=start).copy()).view(shape)


class IDXFolder(TensorImages):
    """A folder of IDX files: MNIST, Fashion-MNIST, KMNIST, EMNIST and what is laid out alike.

    The files are ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the same with
    ``t10k`` (or ``test``) for the held-out split, each with or without ``.gz``. EMNIST puts a
    subset before these names (``emnist-balanced-train-...``).

    28-pixel pictures get a black margin of 2 (32 pixels), unless 28 is asked for; other
    resolutions are resized from that, so that all resolutions show the same frame. Class ids
    count from 0 in the order of the labels that occur in the train split (EMNIST's letters are
    labelled from 1).

    Args:
        root: the folder.
        split: ``"train"`` or ``"heldout"``.
        resolution: 8 to 512 pixels.
        channels: 1, or 3 equal ones.
        subset: what stands before the names, where the folder holds several sets.
        class_names: one name a class; the labels themselves by default.
        name: word for logs and file names; the folder's name by default.
        transpose: swap rows and columns, as EMNIST needs.

    Raises:
        DataError: if the folder or a file is missing or damaged, or files do not fit together.
        ConfigError: if an argument is not one of those above.
    """

    def __init__(
        self,
        root: str | Path,
        split: Split = "train",
        resolution: int = 32,
        channels: int = 1,
        *,
        subset: str | None = None,
        class_names: Sequence[str] | None = None,
        name: str | None = None,
        transpose: bool = False,
    ) -> None:
        if split not in ("train", "heldout"):
            raise ConfigError(f"split='{split}' is unknown. IDX sets have 'train' and 'heldout'.")
        check_resolution(resolution, 8, 512, "IDX pictures")
        check_channels(channels)
        root = Path(root).expanduser()
        files = _find_files(root, subset)
        pixels, labels = _read_pair(files, split, root)
        known = labels if split == "train" else _read_labels(files, "train", root)
        classes = torch.unique(known)
        ids = torch.searchsorted(classes, labels)
        foreign = classes[ids.clamp(max=len(classes) - 1)] != labels
        if bool(foreign.any()):
            raise DataError(
                f"The {split} labels in {root} hold class {int(labels[foreign][0])}, which the "
                "train labels do not. Check that the files belong together."
            )
        if class_names is not None and len(class_names) != len(classes):
            raise DataError(
                f"The labels in {root} hold {len(classes)} classes, but {len(class_names)} class "
                "names were given. Give one a class."
            )
        grey = pixels[:, None].transpose(2, 3) if transpose else pixels[:, None]
        if grey.shape[-1] == 28 and resolution != 28:
            grey = pad(grey, (2, 2, 2, 2))
        super().__init__(
            with_channels(resize(grey.contiguous(), resolution), channels),
            ids,
            class_names=class_names or [str(label) for label in classes.tolist()],
            name=name or root.name,
        )


def _find_files(root: Path, subset: str | None) -> dict[tuple[str, str], Path]:
    """Return the files of one set by (split, kind)."""
    if not root.is_dir():
        raise DataError(
            f"There is no folder {root}. Give data.root the folder with train-images-idx3-ubyte "
            "(.gz) and its three companions."
        )
    found: dict[str, dict[tuple[str, str], Path]] = {}
    for path in sorted(root.iterdir()):
        match = _NAME.match(path.name)
        if match:
            split = "train" if match["split"] == "train" else "heldout"
            # a plain file comes before its .gz twin in sorted order, and is read faster
            found.setdefault(match["subset"], {}).setdefault((split, match["kind"]), path)
    if subset is None and len(found) == 1:
        return next(iter(found.values()))
    if (subset or "") in found:
        return found[subset or ""]
    if not found:
        raise DataError(
            f"{root} holds no IDX files (expected names such as train-images-idx3-ubyte.gz). "
            "Check data.root."
        )
    raise DataError(
        f"{root} holds the sets {', '.join(repr(word) for word in found)} and subset={subset!r} "
        "is none of them. Choose one with subset=..."
    )


def _file(files: dict[tuple[str, str], Path], split: str, kind: str, root: Path) -> Path:
    try:
        return files[split, kind]
    except KeyError:
        present = ", ".join(path.name for path in files.values())
        raise DataError(
            f"{root} has no {kind} of the {split} split (found: {present}). "
            f"Expected {'train' if split == 'train' else 't10k'}-{kind}-idx"
            f"{3 if kind == 'images' else 1}-ubyte(.gz) beside them."
        ) from None


def _read_labels(files: dict[tuple[str, str], Path], split: str, root: Path) -> Tensor:
    path = _file(files, split, "labels", root)
    labels = read_idx(path)
    if labels.dim() != 1 or len(labels) == 0:
        raise DataError(
            f"{path} holds an array of shape {tuple(labels.shape)}, and labels (n,), n > 0, were "
            "expected. The files may be swapped."
        )
    return labels.to(torch.int64)


def _read_pair(files: dict[tuple[str, str], Path], split: str, root: Path) -> tuple[Tensor, Tensor]:
    path = _file(files, split, "images", root)
    labels = _read_labels(files, split, root)
    pixels = read_idx(path)
    if pixels.dim() != 3 or pixels.shape[1] != pixels.shape[2]:
        raise DataError(
            f"{path} holds an array of shape {tuple(pixels.shape)}, and square pictures (n, H, H) "
            "were expected. The files may be swapped."
        )
    if len(pixels) != len(labels):
        raise DataError(
            f"{path} holds {len(pixels)} pictures, but there are {len(labels)} labels in {root}. "
            "Fetch or copy both files again."
        )
    return pixels, labels
