"""Captions that lie beside the files of a folder: one text file each, or one table for all."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from genscale.errors import DataError

TABLES = ("metadata.jsonl", "metadata.json", "metadata.csv")
WAYS = ("auto", "sidecar", "metadata", "none")
Captions = Literal["auto", "sidecar", "metadata", "none"]
_FILE = ("file_name", "file", "path")
_TEXT = ("caption", "text", "prompt")
_SHOWN = 3


def read_captions(root: Path, paths: Sequence[str], how: Captions) -> list[str] | None:
    """Return one caption a file, or None where there are none.

    Args:
        root: the folder.
        paths: of its files, relative to ``root``, with forward slashes.
        how: ``"sidecar"``: a file's caption lies beside it and is called as it is, ending in
            ``.txt``; ``"metadata"``: in ``metadata.jsonl``, ``.json`` or ``.csv`` directly below
            ``root``, whose rows have ``file_name`` and ``caption`` (or ``text``); ``"auto"``: the
            table if there is one, else the files if there are any; ``"none"``: nowhere.

    Raises:
        DataError: a caption is missing or empty, or a table is damaged.
    """
    if how == "none":
        return None
    table = next((root / name for name in TABLES if (root / name).is_file()), None)
    if how == "metadata" and table is None:
        raise DataError(
            f"{root} holds no {' or '.join(TABLES)}, which data.captions=metadata reads. Put one "
            "there, or set data.captions=none."
        )
    if how != "sidecar" and table is not None:
        return _of_table(table, paths)
    sidecars = [root / _sidecar(path) for path in paths]
    missing = [path for path, file in zip(paths, sidecars, strict=True) if not file.is_file()]
    if how == "auto" and len(missing) == len(paths):
        return None
    if missing:
        raise DataError(
            f"{len(missing)} of {len(paths)} files in {root} have no caption beside them "
            f"({_some(missing)}): each needs a .txt file of its name, e.g. {_sidecar(missing[0])}. "
            "Write them, or set data.captions=none."
        )
    texts = []
    for file in sidecars:
        try:
            texts.append(_clean(file.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"The caption {file} cannot be read ({error}). Write it again."
            ) from error
    _refuse_empty(root, paths, texts)
    return texts


def _of_table(table: Path, paths: Sequence[str]) -> list[str]:
    by_file: dict[str, str] = {}
    for number, row in enumerate(_rows(table), start=1):
        file = next((row[name] for name in _FILE if name in row), None)
        text = next((row[name] for name in _TEXT if name in row), None)
        if file is None or text is None:
            raise DataError(
                f"Row {number} of {table} has no '{_FILE[0]}' or no '{_TEXT[0]}' (found: "
                f"{', '.join(map(str, row)) or 'nothing'}). Every row needs both."
            )
        by_file[str(file).replace("\\", "/").removeprefix("./")] = _clean(str(text))
    missing = [path for path in paths if path not in by_file]
    if missing:
        raise DataError(
            f"{table} has no row for {len(missing)} of {len(paths)} files ({_some(missing)}). Add "
            "them, with paths relative to its folder, or set data.captions=none."
        )
    texts = [by_file[path] for path in paths]
    _refuse_empty(table, paths, texts)
    return texts


def _rows(table: Path) -> list[dict[str, Any]]:
    try:
        text = table.read_text(encoding="utf-8-sig")
        if table.suffix == ".csv":
            rows: Any = list(csv.DictReader(text.splitlines()))
        elif table.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = json.loads(text)
            if isinstance(rows, dict):  # {"a.mp4": "a cat"}
                rows = [{_FILE[0]: file, _TEXT[0]: caption} for file, caption in rows.items()]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{table} cannot be read ({error}). Write it again.") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(
            f"{table} holds no rows: a list of {{'{_FILE[0]}': ..., '{_TEXT[0]}': ...}} was "
            "expected. Write it so."
        )
    return rows


def _refuse_empty(where: Path, paths: Sequence[str], texts: Sequence[str]) -> None:
    empty = [path for path, text in zip(paths, texts, strict=True) if not text]
    if empty:
        raise DataError(
            f"{where} has empty captions for {len(empty)} of {len(paths)} files "
            f"({_some(empty)}). Write them, or set data.captions=none."
        )


def _clean(text: str) -> str:
    """Bring a text to one line."""
    return " ".join(text.split())


def _sidecar(path: str) -> str:
    folder, slash, name = path.rpartition("/")
    stem = name.rsplit(".", 1)[0] if "." in name else name
    return f"{folder}{slash}{stem}.txt"


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown
