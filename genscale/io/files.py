"""Files that are either whole or absent: written under another name, then renamed."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def cache_home() -> Path:
    """Return the folder of what can be computed again: ``$GENSCALE_CACHE``, else a user's own."""
    named = os.environ.get("GENSCALE_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "genscale"


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; on leaving, make it ``path`` in one step.

    The file is flushed to disk before it is renamed, so that a reader, or a run that is killed at
    any moment, finds the old file or the new one, never a part. If the body raises, the
    temporary file is removed and ``path`` stays as it was. Missing parent folders are made. The
    temporary name ends as ``path`` does, for writers that go by the ending.

    Args:
        path: the file to write.

    Yields:
        Path to write to; the body must create it and must have closed it.

    Raises:
        FileNotFoundError: if the body wrote nothing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Give a temporary folder beside ``path``; on leaving, make it ``path`` in one step.

    If the body raises, the temporary folder is removed with all that is in it.

    Args:
        path: the folder to write; it may be there as long as it is empty.

    Yields:
        Folder to write into.

    Raises:
        FileExistsError: ``path`` is a file, or a folder that is not empty; the body is not run.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(
            f"{path} is there already, and a new or empty folder is needed. Give another one, or "
            "remove it."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        yield temporary
        _sync_folder(temporary)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Flush a rename to disk; on systems where folders cannot be opened there is nothing to do."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically; keys keep their order.

    Raises:
        ValueError: if it holds NaN or an infinity, which JSON has no words for.
        TypeError: if it holds something that is no JSON value.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_write(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
