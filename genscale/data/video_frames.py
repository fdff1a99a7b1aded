"""Videos that need no decoder: animated pictures, arrays, and folders of frames."""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genscale.data.transforms import to_rgb, to_tensor
from genscale.data.video_reader import VIDEO_SUFFIXES, Unreadable, VideoInfo, VideoReader
from genscale.errors import DataError

ANIMATION_SUFFIXES = (".gif", ".webp", ".apng")
ARRAY_SUFFIXES = (".npy", ".npz")
FRAME_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
_ANIMATIONS = ("GIF", "WEBP", "PNG")
_PICTURES = ("PNG", "JPEG", "BMP")
# durations that browsers, too, take for a tenth of a second
_HASTY, _USUAL = 10.0, 100.0  # milliseconds
_RATES = ("frame_rate", "fps")  # entries of an npz
_NUMBERS = re.compile(r"(\d+)")


def open_frames(path: Path, assumed_rate: float) -> VideoReader:
    """Open a video that is none to a decoder; see :func:`~genscale.data.video_reader.open_video`.

    Args:
        path: a gif, webp or apng, an npy or npz, or a folder of pictures.
        assumed_rate: frames a second where none are stated.

    Raises:
        DataError: it is missing or damaged, or of no kind that is known.
    """
    if path.is_dir():
        return FolderReader(path, assumed_rate)
    if not path.is_file():
        raise Unreadable(path, "it is gone")
    if not path.stat().st_size:
        raise Unreadable(path, "it has no bytes")
    ending = path.suffix.lower()
    if ending in ANIMATION_SUFFIXES:
        return AnimationReader(path)
    if ending in ARRAY_SUFFIXES:
        return ArrayReader(path, assumed_rate)
    known = (*VIDEO_SUFFIXES, *ANIMATION_SUFFIXES, *ARRAY_SUFFIXES)
    raise DataError(
        f"{path} does not end as a video does ({', '.join(known)}, or a folder of frames). "
        "Rename or convert it."
    )


class AnimationReader(VideoReader):
    """Reads animated GIF, WebP and PNG through Pillow; transparency is laid on white.

    A frame that is to be shown for at most a hundredth of a second is shown for a tenth, as
    browsers do. A still picture is a video of one frame.

    Args:
        path: of the file.

    Raises:
        DataError: it is damaged.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        from PIL import Image

        try:
            self._image = Image.open(path, formats=_ANIMATIONS)
            durations = [self._duration(i) for i in range(getattr(self._image, "n_frames", 1))]
        except _damages() as error:
            raise Unreadable(path, _told(error)) from error
        ends = np.cumsum(durations) / 1000
        self._begins = [0.0, *ends[:-1].tolist()]
        width, height = self._image.size
        self.info = VideoInfo(height, width, float(ends[-1]), len(durations) / float(ends[-1]))

    def close(self) -> None:
        """Close the file."""
        self._image.close()

    def frames(self, times: Sequence[float]) -> Tensor:
        """Return the frames shown at some moments; see :meth:`VideoReader.frames`."""
        numbers = [bisect_right(self._begins, time) - 1 for time in times]
        shown: dict[int, Tensor] = {}
        try:
            for number in sorted(set(numbers)):  # Pillow decodes forwards
                self._image.seek(number)
                shown[number] = to_tensor(to_rgb(self._image), 3)
        except _damages() as error:
            raise Unreadable(self.path, _told(error)) from error
        return _stacked([shown[number] for number in numbers], self.info)

    def _duration(self, number: int) -> float:
        self._image.seek(number)
        self._image.load()  # WebP knows durations once a frame is decoded
        stated = float(self._image.info.get("duration") or 0.0)
        return stated if stated > _HASTY else _USUAL


class ArrayReader(VideoReader):
    """Reads uint8 arrays ``(T, H, W, 3)``, ``(T, H, W, 1)`` or ``(T, H, W)``.

    Of an ``.npz`` the only array counts that has such a shape; a number ``frame_rate`` or ``fps``
    beside it is its frame rate.

    Args:
        path: of the file.
        assumed_rate: frames a second where the file states none.

    Raises:
        DataError: it is damaged, or holds something else.
    """

    def __init__(self, path: Path, assumed_rate: float) -> None:
        super().__init__(path)
        try:
            loaded = np.load(path, mmap_mode="r", allow_pickle=False)
            found = {"": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise Unreadable(path, _told(error)) from error
        rates = [float(found[name]) for name in _RATES if name in found and found[name].size == 1]
        arrays = [value for value in found.values() if value.ndim >= 3]
        if len(arrays) != 1 or not _is_clip(arrays[0]):
            shapes = ", ".join(f"{value.dtype} {value.shape}" for value in found.values())
            raise Unreadable(
                path, f"it holds {shapes or 'nothing'}, and uint8 (T, H, W, 3) was expected"
            )
        self._array = arrays[0][..., None] if arrays[0].ndim == 3 else arrays[0]
        count, height, width, _ = self._array.shape
        rate = rates[0] if rates else assumed_rate
        if not rate > 0:
            raise Unreadable(path, f"it states {rate} frames a second")
        self.info = VideoInfo(height, width, count / rate, rate)

    def frames(self, times: Sequence[float]) -> Tensor:
        """Return the frames shown at some moments; see :meth:`VideoReader.frames`."""
        numbers = _numbers(times, self.info)
        pixels = torch.from_numpy(np.ascontiguousarray(self._array[numbers])).permute(0, 3, 1, 2)
        return pixels.expand(-1, 3, -1, -1).contiguous()


class FolderReader(VideoReader):
    """Reads a folder of PNG, JPEG or BMP files, one a frame, in the order of the numbers in names.

    Args:
        path: of the folder.
        assumed_rate: frames a second.

    Raises:
        DataError: it holds no pictures, or the first is damaged.
    """

    def __init__(self, path: Path, assumed_rate: float) -> None:
        super().__init__(path)
        self._files = frame_files(path)
        if not self._files:
            raise Unreadable(path, f"the folder holds no frames ({', '.join(FRAME_SUFFIXES)})")
        height, width = self._frame(0).shape[1:]
        duration = len(self._files) / assumed_rate
        self.info = VideoInfo(height, width, duration, assumed_rate)

    def frames(self, times: Sequence[float]) -> Tensor:
        """Return the frames shown at some moments; see :meth:`VideoReader.frames`."""
        numbers = _numbers(times, self.info)
        shown = {number: self._frame(number) for number in sorted(set(numbers))}
        for number, pixels in shown.items():
            if pixels.shape[1:] != (self.info.height, self.info.width):
                raise Unreadable(
                    self._files[number],
                    f"it has {pixels.shape[1]} x {pixels.shape[2]} pixels, and the first frame of "
                    f"its folder {self.info.height} x {self.info.width}",
                )
        return _stacked([shown[number] for number in numbers], self.info)

    def _frame(self, number: int) -> Tensor:
        from PIL import Image

        try:
            with Image.open(self._files[number], formats=_PICTURES) as image:
                return to_tensor(to_rgb(image), 3)
        except _damages() as error:
            raise Unreadable(self._files[number], _told(error)) from error


def frame_files(folder: Path) -> list[Path]:
    """Return the pictures of a folder in the order of the numbers in their names."""
    files = [
        file
        for file in folder.iterdir()
        if file.suffix.lower() in FRAME_SUFFIXES and not file.name.startswith(".")
    ]
    return sorted(files, key=lambda file: _in_order(file.name))


def _in_order(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts ``2.png`` before ``10.png``."""
    parts = _NUMBERS.split(name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _numbers(times: Sequence[float], info: VideoInfo) -> list[int]:
    """Return which frames of an even rate are shown at some moments."""
    last = round(info.duration * info.frame_rate) - 1
    return [min(int(time * info.frame_rate + 1e-6), last) for time in times]


def _is_clip(array: Any) -> bool:
    fits = array.ndim == 3 or (array.ndim == 4 and array.shape[3] in (1, 3))
    return bool(fits and array.dtype == np.uint8 and min(array.shape) > 0)


def _stacked(frames: list[Tensor], info: VideoInfo) -> Tensor:
    if not frames:
        return torch.empty(0, 3, info.height, info.width, dtype=torch.uint8)
    return torch.stack(frames)


def _damages() -> tuple[type[Exception], ...]:
    """Return what Pillow and :func:`to_rgb` raise of damaged files."""
    from PIL import Image

    damaged = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)
    return (*damaged, Image.DecompressionBombError, DataError)


def _told(error: Exception) -> str:
    """Return what went wrong without the path, which the caller names."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "it has no header of such a picture"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
