"""Video files as frames at moments: one reader, whatever decodes.

A reader is asked for moments in seconds, not for frame numbers, and answers with the frames that a
player would show then. Files of variable frame rate therefore need no special care.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from genscale.errors import DataError, require

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".ogv")
BACKENDS = ("auto", "torchcodec", "pyav", "pillow")
Backend = Literal["auto", "torchcodec", "pyav", "pillow"]
_STEPS_BACK = (0.0, 2.0, 10.0)  # seconds to seek earlier where an index leads too far
_INSTALL = 'Install one with: pip install "genscale[video]"'


class Unreadable(DataError):
    """A file that cannot be read as a video, told in one sentence.

    Args:
        path: of the file.
        why: what is wrong with it.
    """

    def __init__(self, path: Path, why: str) -> None:
        self.path = path
        self.why = why.rstrip(".")
        super().__init__(
            f"{path} cannot be read as a video: {self.why}. Remove or replace it, or leave such "
            "files out with data.damaged=skip."
        )

    def __reduce__(self) -> tuple[type[Unreadable], tuple[Path, str]]:
        return type(self), (self.path, self.why)  # reading processes send it


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What a video says of itself.

    Args:
        height: of a frame as shown, in pixels.
        width: likewise.
        duration: seconds from the first frame to the end of the last.
        frame_rate: mean frames a second.
    """

    height: int
    width: int
    duration: float
    frame_rate: float


class VideoReader(ABC):
    """An open video; a context manager that closes it.

    Args:
        path: the file or folder, for sentences.

    Attributes:
        info: sizes and lengths.
    """

    info: VideoInfo

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def frames(self, times: Sequence[float]) -> Tensor:
        """Return the frames shown at some moments: uint8 RGB ``(len(times), 3, H, W)``.

        Args:
            times: seconds after the first frame, in any order, each in ``[0, duration)``.

        Raises:
            DataError: a frame cannot be decoded, or the file ends before it says.
        """

    def close(self) -> None:  # noqa: B027  # most readers hold nothing open
        """Let go of the file."""

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_video(
    path: str | Path,
    *,
    backend: Backend = "auto",
    exact: bool = True,
    assumed_rate: float = 25.0,
) -> VideoReader:
    """Open a video file, an animated picture, an array, or a folder of frames.

    Args:
        path: of the file or folder.
        backend: what decodes video files, see :func:`decoder`; the other kinds need nothing extra.
        exact: read a video file through once for the times of its frames; false trusts the header,
            which is quicker for long files and may be off by a frame, or more, in odd ones.
        assumed_rate: frames a second of kinds that state none: arrays and folders of frames.

    Raises:
        DataError: it is missing, empty, damaged, or holds no pictures; one sentence with its name.
        ImportError: nothing that decodes video files is installed; the sentence says what to do.
    """
    from genscale.data.video_frames import open_frames  # reads this module's classes

    path = Path(path)
    if path.suffix.lower() not in VIDEO_SUFFIXES or path.is_dir():
        return open_frames(path, assumed_rate)
    try:
        size = path.stat().st_size
    except OSError as error:
        raise Unreadable(path, "it is gone or may not be read") from error
    if not size:
        raise Unreadable(path, "it has no bytes")
    if decoder(backend) == "torchcodec":
        return TorchCodecReader(path, exact=exact)
    return PyAVReader(path, exact=exact)


def decoder(backend: Backend) -> Literal["torchcodec", "pyav"]:
    """Return what decodes video files under a ``backend``.

    ``"auto"`` takes torchcodec where it can be loaded (it needs FFmpeg's libraries), else PyAV,
    whose wheel brings them along; ``"pillow"`` decodes no video files at all.

    Raises:
        ImportError: it is not installed, or cannot be loaded.
    """
    if backend == "pillow":
        raise ImportError(
            "data.backend=pillow reads animated pictures, arrays and folders of frames, but there "
            "are video files, which need a decoder. Give data.backend=auto."
        )
    problem = None if backend == "pyav" else _torchcodec_problem()
    if backend == "torchcodec" or (backend == "auto" and problem is None):
        if problem is not None:
            raise ImportError(
                f"data.backend=torchcodec cannot be loaded ({problem}). It needs FFmpeg's "
                "libraries and the release made for this torch; or give data.backend=pyav."
            )
        return "torchcodec"
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "Reading video files needs torchcodec or PyAV, and neither can be loaded. "
            f"{_INSTALL}, or give gif, webp or npy files or folders of frames."
        ) from error
    return "pyav"


@functools.cache
def _torchcodec_problem() -> str | None:
    """Return why torchcodec cannot be loaded; None where it can."""
    try:
        import torchcodec.decoders  # noqa: F401
    except ImportError:
        return "it is not installed"
    except (OSError, RuntimeError) as error:  # what it raises where libraries are missing
        return str(error).strip().splitlines()[0].rstrip(".:")
    return None


class TorchCodecReader(VideoReader):
    """Decodes with torchcodec, one thread a reader: loaders have many processes.

    Args:
        path: of the file.
        exact: scan the file when it is opened, so that moments are exact whatever its header
            claims; else trust the header.

    Raises:
        DataError: see :func:`open_video`.
    """

    def __init__(self, path: Path, *, exact: bool = True) -> None:
        super().__init__(path)
        from torchcodec.decoders import VideoDecoder

        try:
            self._decoder = VideoDecoder(
                str(path),
                dimension_order="NCHW",
                num_ffmpeg_threads=1,
                seek_mode="exact" if exact else "approximate",
            )
            told = self._decoder.metadata
            self._begin = float(told.begin_stream_seconds)
            duration = float(told.end_stream_seconds) - self._begin
            rate = float(told.num_frames) / duration
            self.info = VideoInfo(int(told.height), int(told.width), duration, rate)
        except (RuntimeError, ValueError, TypeError, IndexError, ZeroDivisionError) as error:
            raise Unreadable(path, _told(error)) from error

    def frames(self, times: Sequence[float]) -> Tensor:
        """Return the frames shown at some moments; see :meth:`VideoReader.frames`."""
        try:
            batch = self._decoder.get_frames_played_at([self._begin + time for time in times])
        except (RuntimeError, ValueError, IndexError) as error:
            raise Unreadable(self.path, _told(error)) from error
        frames: Tensor = batch.data
        return frames


class PyAVReader(VideoReader):
    """Decodes with PyAV, one thread a reader.

    Args:
        path: of the file.
        exact: count the packets, which reads the file and decodes nothing; else lengths are those
            of the header where the container has them for the pictures alone.

    Raises:
        DataError: see :func:`open_video`.
        ImportError: PyAV is not installed.
    """

    def __init__(self, path: Path, *, exact: bool = True) -> None:
        super().__init__(path)
        self._av = _pyav()
        try:
            self._container = self._av.open(str(path))
        except (self._av.error.FFmpegError, OSError, ValueError) as error:
            raise Unreadable(path, _told(error)) from error
        try:
            self._select()
            self.info = self._look(exact)
        except (self._av.error.FFmpegError, OSError, ValueError) as error:
            self.close()
            raise Unreadable(path, _told(error)) from error
        except DataError:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    def frames(self, times: Sequence[float]) -> Tensor:
        """Return the frames shown at some moments; see :meth:`VideoReader.frames`."""
        order = sorted(range(len(times)), key=times.__getitem__)
        found: dict[int, Tensor] = {}
        shown: tuple[Any, Tensor] | None = None  # a frame may be shown at many moments
        try:
            for place, frame in zip(order, self._played([times[i] for i in order]), strict=True):
                if shown is None or shown[0] is not frame:
                    shown = (frame, _pixels(frame))
                found[place] = shown[1]
        except (self._av.error.FFmpegError, OSError, ValueError) as error:
            raise Unreadable(self.path, _told(error)) from error
        if not found:
            return torch.empty(0, 3, self.info.height, self.info.width, dtype=torch.uint8)
        return torch.stack([found[place] for place in range(len(times))])

    def _select(self) -> None:
        """Choose the video stream; the cover of a song is none."""
        streams = [s for s in self._container.streams.video if not _is_cover(s)]
        if not streams:
            kinds = sorted({stream.type for stream in self._container.streams})
            held = " and ".join(kinds) or "nothing"
            raise Unreadable(self.path, f"it holds no pictures, only {held}")
        self._stream = streams[0]
        if self._stream.codec_context is None:
            raise Unreadable(self.path, "its index is damaged, or its coding is unknown here")
        self._stream.thread_type = "NONE"
        self._stream.codec_context.thread_count = 1
        self._unit = float(self._stream.time_base)

    def _look(self, exact: bool) -> VideoInfo:
        """Read sizes and lengths, and remember where the first frame is."""
        stream = self._stream
        self._first = stream.start_time or 0
        rate = stream.average_rate
        if stream.duration and rate and not exact:
            duration, mean = stream.duration * self._unit, float(rate)
        else:
            duration, mean = self._count()
        first = next(self._from(0.0), None)
        if first is None:
            raise Unreadable(self.path, "no frame can be decoded")
        height, width = _upright(first)
        return VideoInfo(height, width, duration, mean)

    def _count(self) -> tuple[float, float]:
        """Return duration and mean frame rate from the times of all packets."""
        moments, last = [], 0
        for packet in self._container.demux(self._stream):
            if packet.pts is not None:
                moments.append(packet.pts)
                last = max(last, packet.pts + (packet.duration or 0))
        if not moments:
            raise Unreadable(self.path, "its frames carry no times")
        moments.sort()
        self._first = moments[0]
        if last <= moments[-1]:  # no duration stated: as long as the others on average
            last = moments[-1] + (moments[-1] - moments[0]) // max(len(moments) - 1, 1)
        duration = (last - moments[0]) * self._unit
        if duration <= 0:
            raise Unreadable(self.path, "it holds a single frame without a duration")
        return duration, len(moments) / duration

    def _played(self, times: Sequence[float]) -> Iterator[Any]:
        """Yield the frame that is shown at each of some ascending moments."""
        waiting = list(reversed(times))
        shown, since = None, 0.0
        for frame in self._from(times[0]) if times else ():
            begins = self._seconds(frame)
            # the first frame stands in for what an edit list cuts off before it
            while waiting and shown is not None and waiting[-1] < begins:
                waiting.pop()
                yield shown
            if not waiting:
                return
            if frame.is_corrupt:
                raise Unreadable(self.path, f"the frame at {begins:.2f} s is damaged")
            shown, since = frame, begins
        if not times:
            return
        if shown is None:
            raise Unreadable(self.path, f"no frame can be decoded at {times[0]:.2f} s")
        period = 1 / self.info.frame_rate
        for time in reversed(waiting):
            if time >= since + max(shown.duration * self._unit, period) + period:
                raise Unreadable(
                    self.path,
                    f"it ends after {since + period:.2f} s, and its header says "
                    f"{self.info.duration:.2f} s",
                )
            yield shown

    def _from(self, time: float) -> Iterator[Any]:
        """Yield frames in order from one that begins at ``time`` or earlier."""
        for back in _STEPS_BACK:
            target = self._first + int(max(time - back, 0.0) / self._unit)
            self._container.seek(target, stream=self._stream)
            frames = self._container.decode(self._stream)
            first = next(frames, None)
            if first is not None and self._seconds(first) <= time:
                yield first
                yield from frames
                return
        # containers without an index may lead too far even so: start over
        self._container.close()
        self._container = self._av.open(str(self.path))
        self._select()
        yield from self._container.decode(self._stream)

    def _seconds(self, frame: Any) -> float:
        if frame.pts is None:
            raise Unreadable(self.path, "its frames carry no times")
        return float((frame.pts - self._first) * self._unit)


def _pyav() -> Any:
    return require("av", what="data.backend=pyav", extra="video")


def _is_cover(stream: Any) -> bool:
    return "attached_pic" in str(getattr(stream, "disposition", "")).lower()


def _upright(frame: Any) -> tuple[int, int]:
    """Return height and width of a frame as it is shown."""
    turned = frame.rotation % 180 == 90
    return (frame.width, frame.height) if turned else (frame.height, frame.width)


def _pixels(frame: Any) -> Tensor:
    """Return a frame's pixels, turned as a player would: uint8 ``(3, H, W)``."""
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
    return torch.rot90(pixels, round(frame.rotation / 90) % 4, (1, 2)).contiguous()


def _told(error: Exception) -> str:
    """Return the first line of an error without the path, which the caller names."""
    text = getattr(error, "strerror", None) or str(error)
    lines = text.strip().splitlines()
    return lines[0] if lines else type(error).__name__
