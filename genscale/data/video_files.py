"""Finding the videos below a folder."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from genscale.data.video_frames import ANIMATION_SUFFIXES, ARRAY_SUFFIXES, FRAME_SUFFIXES
from genscale.data.video_reader import VIDEO_SUFFIXES
from genscale.errors import DataError

_SINGLE = (*VIDEO_SUFFIXES, *ANIMATION_SUFFIXES, *ARRAY_SUFFIXES)
_BESIDE = (".txt", ".json", ".jsonl", ".csv")  # captions


def find_videos(root: Path) -> tuple[list[str], Counter[str]]:
    """Return what is a video below a folder, and what else lies there.

    Video files, animated pictures and arrays are one video each. A folder that holds pictures and
    none of these is a video too, one picture a frame. Names beginning with a dot are passed over;
    links to folders are followed.

    Args:
        root: the folder.

    Returns:
        paths relative to ``root``, sorted, with forward slashes (``.`` where ``root`` itself is a
        folder of frames); and the number of other files by ending.

    Raises:
        DataError: there is no such folder, it may not be read, holds no videos, or holds a link
            to a folder that is read already.
    """
    if not root.is_dir():
        raise DataError(
            f"There is no folder {root}. Give data.root=<folder of videos>, or of class folders "
            "that hold videos."
        )
    paths: list[str] = []
    others: Counter[str] = Counter()
    visited: set[str] = set()
    for folder, folders, files in os.walk(root, onerror=_refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:
            raise DataError(
                f"{folder} is a link to a folder that is read already ({real}); its videos would "
                "count twice. Remove the link."
            )
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = os.path.relpath(folder, root).replace(os.sep, "/")
        endings = [
            (name, os.path.splitext(name)[1].lower()) for name in files if not name.startswith(".")
        ]
        singles = [name for name, ending in endings if ending in _SINGLE]
        paths += [name if inside == "." else f"{inside}/{name}" for name in singles]
        frames = not singles and any(ending in FRAME_SUFFIXES for _, ending in endings)
        if frames:
            paths.append(inside)
        for _, ending in endings:
            counted = ending in _SINGLE or ending in _BESIDE
            if not counted and not (frames and ending in FRAME_SUFFIXES):
                others[ending or "without ending"] += 1
    if not paths:
        there = ", ".join(f"{count} {ending}" for ending, count in sorted(others.items()))
        raise DataError(
            f"{root} holds no videos ({', '.join(_SINGLE)}, or folders of frames); found: "
            f"{there or 'nothing'}. Check data.root."
        )
    return sorted(paths), others


def needs_decoder(paths: Sequence[str]) -> bool:
    """Say whether some of the paths are files that only a video decoder reads."""
    return any(path.lower().endswith(VIDEO_SUFFIXES) for path in paths)


def size_of(path: Path) -> tuple[int, int]:
    """Return files and bytes of a video: of a folder, of all its files.

    Raises:
        DataError: it is gone.
    """
    try:
        if path.is_dir():
            sizes = [entry.stat().st_size for entry in os.scandir(path) if entry.is_file()]
            return len(sizes), sum(sizes)
        return 1, path.stat().st_size
    except FileNotFoundError as error:
        raise DataError(
            f"{path} was there at the start and is gone. Put it back, or start again."
        ) from error


def _refuse(error: OSError) -> None:
    """Raise where ``os.walk`` would pass over a folder it may not read."""
    raise DataError(
        f"The folder {error.filename} cannot be read ({error.strerror}), and its videos would be "
        "missing. Give yourself the right to read it, or remove it."
    ) from error
