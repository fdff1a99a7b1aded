"""Looking at all videos of a folder before training: which can be read, and how long they are."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from genscale.data.clip_cutting import ClipTimes
from genscale.data.video_reader import Unreadable, VideoInfo, VideoReader
from genscale.errors import DataError

_SHOWN = 20  # names of videos in one sentence
_BLOCK = 64  # frames decoded at once

logger = logging.getLogger(__name__)


def check_videos(
    root: Path,
    paths: Sequence[str],
    opened: Callable[[str], VideoReader],
    *,
    times: ClipTimes,
    whole: bool,
    skips: bool,
) -> dict[str, VideoInfo]:
    """Open all videos; return what those say of themselves that will serve, in their order.

    Args:
        root: their folder, for sentences.
        paths: relative to it.
        opened: opens one.
        times: how long a clip is, and what to do with short videos.
        whole: decode every frame.
        skips: leave damaged videos out instead of raising; each is told.

    Raises:
        DataError: videos are damaged or too short and may not be, or none is left.
    """
    infos: dict[str, VideoInfo] = {}
    damaged: dict[str, str] = {}
    for path in paths:
        try:
            with opened(path) as reader:
                if whole:
                    decode_all(reader)
                infos[path] = reader.info
        except Unreadable as error:
            damaged[path] = error.why
    lengths = {p: f"{i.duration:.2f} s" for p, i in infos.items() if not times.fits(i)}
    if damaged:
        _tell_damaged(root, damaged, len(paths), skips=skips)
    if lengths:
        _tell_short(root, lengths, len(paths), times)
    if times.short == "drop":
        infos = {path: info for path, info in infos.items() if path not in lengths}
    if not infos:
        raise DataError(
            f"None of the {len(paths)} videos in {root} can be used: "
            f"{_names({**damaged, **lengths})}. Check data.root, data.num_frames and "
            "data.frame_rate."
        )
    return infos


def decode_all(reader: VideoReader) -> None:
    """Decode every frame of a video.

    Raises:
        DataError: one cannot be decoded.
    """
    info = reader.info
    moments = [(i + 0.25) / info.frame_rate for i in range(int(info.duration * info.frame_rate))]
    for start in range(0, len(moments), _BLOCK):
        reader.frames(moments[start : start + _BLOCK])


def _tell_damaged(root: Path, damaged: dict[str, str], count: int, *, skips: bool) -> None:
    if not skips:
        raise DataError(
            f"{len(damaged)} of {count} videos in {root} cannot be read: {_names(damaged)}. "
            "Remove or replace them, or leave them out with data.damaged=skip."
        )
    logger.warning("%s: left out %d damaged videos: %s", root, len(damaged), _names(damaged))


def _tell_short(root: Path, lengths: dict[str, str], count: int, times: ClipTimes) -> None:
    if times.short == "error":
        rate = f"{max(times.frame_rates):g} a second" if times.frame_rates else "their own rate"
        raise DataError(
            f"{len(lengths)} of {count} videos in {root} are shorter than {times.num_frames} "
            f"frames at {rate}: {_names(lengths)}. Set data.short=drop, loop or hold, or give "
            "fewer frames or a higher data.frame_rate."
        )
    does = {"drop": "left out", "loop": "repeating", "hold": "holding the last frame of"}
    logger.warning(
        "%s: %s %d short videos: %s", root, does[times.short], len(lengths), _names(lengths)
    )


def _names(reasons: dict[str, str]) -> str:
    shown = "; ".join(f"{name} ({why})" for name, why in list(reasons.items())[:_SHOWN])
    more = len(reasons) - _SHOWN
    return f"{shown}; and {more} more" if more > 0 else shown
