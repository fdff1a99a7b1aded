"""Folders of videos as clips: cut when asked for, at moments that a key chooses."""

from __future__ import annotations

import copy
import functools
import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor

from genscale.data.base import check_channels, check_resolution, row_numbers
from genscale.data.caption_files import WAYS, Captions, read_captions
from genscale.data.clip_cutting import (
    BEGINS,
    CROPS,
    FILTERS,
    SHORT,
    Begin,
    ClipTimes,
    Crop,
    Filter,
    Short,
    fit_frames,
    with_luma,
)
from genscale.data.clips import ClipDataset
from genscale.data.image_folder import class_folders
from genscale.data.paths import Paths, held_out
from genscale.data.video_checks import check_videos
from genscale.data.video_files import find_videos, needs_decoder, size_of
from genscale.data.video_reader import (
    BACKENDS,
    Backend,
    Unreadable,
    VideoInfo,
    VideoReader,
    decoder,
    open_video,
)
from genscale.errors import ConfigError, DataError, did_you_mean
from genscale.rng import key, uniform

_TRIES = 16  # damaged files in a row before a sample gives up

logger = logging.getLogger(__name__)
T = TypeVar("T")


class VideoFolder(ClipDataset):
    """Every video below a folder, in order of its path; clips are decoded when asked for.

    A video is a file (mp4, mkv, webm, ...), an animated picture (gif, webp, apng), an array (npy,
    npz) or a folder of frames, see :func:`~genscale.data.video_files.find_videos`. What a clip
    shows depends on the file and the sample's key alone, so that an interrupted run goes on with
    the clips it would have seen.

    Args:
        root: the folder.
        resolution: height and width of a clip, 8 to 2048 pixels.
        num_frames: frames of a clip, T.
        frame_rate: frames a second of a clip; several to draw from; None: each video's own.
        channels: 3, or 1 for grey (BT.601 luma).
        labels: ``"folders"``: each folder directly below ``root`` is a class, in order of their
            names; ``"none"``: no classes, any layout.
        captions: where they lie, see :func:`~genscale.data.caption_files.read_captions`.
        backend: what decodes video files, see :func:`~genscale.data.video_reader.decoder`.
        exact: see :func:`~genscale.data.video_reader.open_video`.
        assumed_rate: frames a second of arrays and folders of frames that state none.
        verify: what is checked before training. ``"headers"`` opens every video and keeps its
            sizes and length; ``"frames"`` decodes every frame; ``"none"`` trusts the folder.
        damaged: what happens to videos that cannot be read. ``"error"`` raises. ``"skip"`` leaves
            out those that ``verify`` finds; where one is found later, another takes its place
            that the same key chooses, with its own label and caption. Both are counted and told.
        short: what happens to videos shorter than a clip: ``"error"`` raises, ``"drop"`` leaves
            them out (needs ``verify``), ``"loop"`` and ``"hold"`` fill the clip, see
            :class:`~genscale.data.clip_cutting.ClipTimes`. Counted and told.
        begin: where the fixed clip of :meth:`images` lies: ``"middle"`` or ``"first"``.
        crop: ``"center"``, ``"random"`` (keyed; the fixed clip's is central) or ``"squash"``.
        resize: filter, see :func:`~genscale.data.clip_cutting.fit_frames`.
        name: word for logs and file names; the folder's name by default.

    Attributes:
        root: the folder.
        left_out: paths, relative to ``root``, of damaged and short videos that were left out.

    Raises:
        DataError: the folder is missing or holds no videos, its layout does not fit ``labels``, a
            video is damaged or too short, or captions are missing.
        ConfigError: an argument is not one of those above.
        ImportError: there are video files, and nothing decodes them.
    """

    def __init__(
        self,
        root: str | Path,
        resolution: int,
        num_frames: int,
        *,
        frame_rate: float | Sequence[float] | None = None,
        channels: int = 3,
        labels: Literal["folders", "none"] = "folders",
        captions: Captions = "auto",
        backend: Backend = "auto",
        exact: bool = True,
        assumed_rate: float = 25.0,
        verify: Literal["headers", "frames", "none"] = "headers",
        damaged: Literal["error", "skip"] = "error",
        short: Short = "error",
        begin: Begin = "middle",
        crop: Crop = "center",
        resize: Filter = "antialias",
        name: str | None = None,
    ) -> None:
        check_resolution(resolution, 8, 2048, "video folders")
        check_channels(channels)
        _check_words(
            labels=(labels, ("folders", "none")),
            captions=(captions, WAYS),
            backend=(backend, BACKENDS),
            verify=(verify, ("headers", "frames", "none")),
            damaged=(damaged, ("error", "skip")),
            short=(short, SHORT),
            begin=(begin, BEGINS),
            crop=(crop, CROPS),
            resize=(resize, FILTERS),
        )
        if short == "drop" and verify == "none":
            raise ConfigError(
                "data.short=drop leaves out videos by their length, but data.verify=none looks at "
                "none. Set data.verify=headers, or data.short=loop or hold."
            )
        if not assumed_rate > 0:
            raise ConfigError(f"data.assumed_rate={assumed_rate} must be above 0 frames a second.")
        self.root = Path(root).expanduser()
        self.name = name or self.root.resolve().name
        self.resolution, self.num_frames, self.channels = resolution, num_frames, channels
        rates = () if frame_rate is None else _rates(frame_rate)
        self.times = ClipTimes(num_frames, rates, short, begin)
        self.crop: Crop = crop
        self.resize: Filter = resize
        self.replaces_damaged = damaged == "skip"
        self._open = (backend, exact, float(assumed_rate))
        paths = self._found()
        self.decoder = decoder(backend) if needs_decoder(paths) else "none"
        self.class_names = class_folders(paths, self.root, "videos") if labels == "folders" else ()
        self.num_classes = len(self.class_names)
        self.left_out: tuple[str, ...] = ()
        self._infos: Tensor | None = None
        if verify != "none":
            paths = self._checked(paths, whole=verify == "frames")
        self._paths = Paths(paths)
        self._labels: Tensor | None = None
        if self.class_names:
            number = {name: i for i, name in enumerate(self.class_names)}
            self._labels = torch.tensor([number[path.split("/", 1)[0]] for path in paths])
        self.captions = read_captions(self.root, paths, captions)
        # which files were found damaged later; reading processes share it
        self._damaged = _shared_flags(len(paths))
        self.usual_frame_rate = rates[0] if rates else self._own_rate()

    def __len__(self) -> int:
        return len(self._paths)

    @property
    def labels(self) -> Tensor | None:
        """Class ids ``(n,)`` int64, or None."""
        return self._labels

    @property
    def damaged(self) -> tuple[str, ...]:
        """Paths of videos that were found damaged while clips were read, by any process here."""
        return tuple(self._paths[row] for row in self._damaged.nonzero().flatten().tolist())

    def path(self, index: int) -> str:
        """Return the path of a row, relative to ``root``, with forward slashes."""
        return self._paths[int(row_numbers([index], len(self))[0])]

    def images(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Return the fixed clip of some rows; see :meth:`ClipDataset.images`.

        With ``damaged="skip"`` a damaged video is replaced by the next one of its class.

        Raises:
            DataError: a video cannot be read; the sentence names it.
        """
        rows = row_numbers(indices, len(self))
        clips = self._room(len(rows))
        for place, row in enumerate(rows.tolist()):
            clips[place] = self._first_readable(self._neighbours(row), self._fixed)[0][0]
        return clips

    def frame_rate(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Return the frames a second of each row's fixed clip; see :class:`ClipDataset`."""
        rows = row_numbers(indices, len(self)).tolist()

        def rate(row: int) -> float:
            return self._choose(row, self.times.fixed, self._info(row))[1]

        rates = [self._first_readable(self._neighbours(row), rate)[0] for row in rows]
        return torch.tensor(rates, dtype=torch.float32)

    def source_size(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Return height and width of some rows' videos before cropping: float32 ``(n, 2)``."""
        infos = [self._info(row) for row in row_numbers(indices, len(self)).tolist()]
        return torch.tensor([[info.height, info.width] for info in infos]).float().reshape(-1, 2)

    def clips(self, indices: Tensor | Sequence[int], keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return clips as keys choose them; see :meth:`ClipDataset.clips`."""
        clips, frame_rate, _ = self.taken(indices, keys)
        return clips, frame_rate

    def taken(self, indices: Tensor | Sequence[int], keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return clips as keys choose them, and of which rows they are.

        Args:
            indices: rows ``(n,)``.
            keys: ``(n,)`` int64: they choose frame rate, beginning and random crop, and, where
                damaged videos are skipped, what takes their place.

        Returns:
            uint8 ``(n, C, T, H, W)``; frames a second, float32 ``(n,)``; rows, int64 ``(n,)``.

        Raises:
            DataError: a video cannot be read, or 16 in a row cannot; the sentence names it.
        """
        rows = row_numbers(indices, len(self)).clone()
        clips, rates = self._room(len(rows)), torch.empty(len(rows))
        for place in range(len(rows)):
            one = keys[place]
            further = key(one, torch.arange(1, _TRIES))
            candidates = [int(rows[place]), *(uniform(further) * len(self)).long().tolist()]
            draws = uniform(one, (3,)).tolist()
            read = functools.partial(self._drawn, draws=draws)
            (clips[place], rates[place]), rows[place] = self._first_readable(candidates, read)
        return clips, rates, rows

    def some(self, rows: Tensor) -> VideoFolder:
        """Return a data set of some rows ``(n,)``; damaged videos are replaced among them."""
        rows = row_numbers(rows, len(self))
        part = copy.copy(self)
        part.__dict__.pop("_fingerprint", None)
        part._paths = Paths([self._paths[row] for row in rows.tolist()])
        part._labels = None if self._labels is None else self._labels[rows]
        part._infos = None if self._infos is None else self._infos[rows]
        part._damaged = _shared_flags(len(rows))
        if self.captions is not None:
            part.captions = [self.captions[row] for row in rows.tolist()]
        return part

    def split(self, heldout_fraction: float) -> tuple[VideoFolder, VideoFolder]:
        """Divide into (train, held out) by a keyed hash of each relative path.

        Raises:
            ConfigError: if the fraction is not between 0 and 1.
            DataError: if a side would be empty.
        """
        heldout = held_out(self._paths, heldout_fraction, "videos")
        return self.some((~heldout).nonzero().flatten()), self.some(heldout.nonzero().flatten())

    def fingerprint(self) -> str:
        """Return the SHA-256 over (path, size in bytes) and all that decides what clips show.

        Nothing is decoded: a file rewritten with the same name and size goes unnoticed.
        """
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        how = (
            *(self.resolution, self.channels, self.class_names, self.times),
            *(self.crop, self.resize, self.decoder, self._open[1:], self.replaces_damaged),
        )
        digest = hashlib.sha256(repr(how).encode())
        for row, path in enumerate(self._paths):
            digest.update(f"{path}\0{size_of(self.root / path)}\n".encode(errors="surrogateescape"))
            if self.captions is not None:
                digest.update(f"{self.captions[row]}\n".encode())
        return digest.hexdigest()

    def _found(self) -> list[str]:
        paths, others = find_videos(self.root)
        if others:
            told = ", ".join(f"{count} {ending}" for ending, count in sorted(others.items()))
            logger.info("%s: passed over files that are no videos: %s", self.root, told)
        return paths

    def _own_rate(self) -> float:
        """Return the middle frame rate of the videos; where none were opened, the first one's."""
        if self._infos is None:
            return self._first_readable(range(len(self))[:_TRIES], self._info)[0].frame_rate
        return float(self._infos[:, 3].median())

    def _info(self, row: int) -> VideoInfo:
        if self._infos is not None:
            height, width, duration, rate = self._infos[row].tolist()
            return VideoInfo(int(height), int(width), duration, rate)
        with self._opened(self._paths[row]) as reader:
            return reader.info

    def _opened(self, path: str) -> VideoReader:
        backend, exact, assumed_rate = self._open
        return open_video(self.root / path, backend=backend, exact=exact, assumed_rate=assumed_rate)

    def _checked(self, paths: list[str], *, whole: bool) -> list[str]:
        """Look at all videos, keep what they say, and return the paths of those that will serve."""
        infos = check_videos(
            self.root,
            paths,
            self._opened,
            times=self.times,
            whole=whole,
            skips=self.replaces_damaged,
        )
        self.left_out = tuple(path for path in paths if path not in infos)
        rows = [[i.height, i.width, i.duration, i.frame_rate] for i in infos.values()]
        self._infos = torch.tensor(rows, dtype=torch.float64)
        return list(infos)

    def _room(self, count: int) -> Tensor:
        side = self.resolution
        return torch.empty(count, self.channels, self.num_frames, side, side, dtype=torch.uint8)

    def _neighbours(self, row: int) -> list[int]:
        """Return a row and those after it that can stand in for it in an evaluation."""
        alike = torch.arange(len(self))
        if self._labels is not None:
            alike = (self._labels == self._labels[row]).nonzero().flatten()
        place = int((alike == row).nonzero())
        return alike.roll(-place)[:_TRIES].tolist()

    def _first_readable(self, candidates: Sequence[int], read: Callable[[int], T]) -> tuple[T, int]:
        """Read the first candidate; where damaged videos are skipped, the first that can be.

        Returns:
            what was read, and the row.
        """
        for row in candidates:
            try:
                return read(row), row
            except Unreadable as error:
                if not self.replaces_damaged:
                    raise
                if not bool(self._damaged[row]):
                    self._damaged[row] = True
                    logger.warning(
                        "%s cannot be read as a video: %s. Another takes its place.",
                        error.path,
                        error.why,
                    )
        raise DataError(
            f"{len(candidates)} videos drawn in a row cannot be read (the last: "
            f"{self.root / self._paths[candidates[-1]]}). Look at data.root={self.root}."
        )

    def _fixed(self, row: int) -> tuple[Tensor, float]:
        return self._cut(row, self.times.fixed, 0.5)

    def _drawn(self, row: int, draws: Sequence[float]) -> tuple[Tensor, float]:
        return self._cut(row, lambda info: self.times.drawn(info, (draws[0], draws[1])), draws[2])

    def _choose(
        self,
        row: int,
        choose: Callable[[VideoInfo], tuple[list[float], float]],
        info: VideoInfo,
    ) -> tuple[list[float], float]:
        try:
            return choose(info)
        except DataError as error:
            path = self.root / self._paths[row]
            raise DataError(f"{path} is too short for a clip: {error}") from error

    def _cut(
        self, row: int, choose: Callable[[VideoInfo], tuple[list[float], float]], place: float
    ) -> tuple[Tensor, float]:
        """Decode a clip ``(C, T, H, W)`` and return it with its frame rate."""
        with self._opened(self._paths[row]) as reader:
            moments, rate = self._choose(row, choose, reader.info)
            frames = reader.frames(moments)
        frames = fit_frames(
            with_luma(frames, self.channels),
            self.resolution,
            self.resolution,
            crop=self.crop,
            place=place,
            resize=self.resize,
        )
        return frames.transpose(0, 1), rate


def _shared_flags(count: int) -> Tensor:
    """Return booleans that all processes started from this one see."""
    flags: Tensor = torch.zeros(count, dtype=torch.bool).share_memory_()  # type: ignore[no-untyped-call]
    return flags


def _check_words(**choices: tuple[str, Sequence[str]]) -> None:
    """Raise a ``ConfigError`` for the first key whose word is none of those known."""
    for key_, (given, known) in choices.items():
        if given not in known:
            raise ConfigError(
                f"data.{key_}='{given}' is unknown. Choose {', '.join(known[:-1])} or {known[-1]}."
                f"{did_you_mean(str(given), list(known))}"
            )


def _rates(given: float | Sequence[float]) -> tuple[float, ...]:
    return (float(given),) if isinstance(given, int | float) else tuple(map(float, given))
