"""Captions beside files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from genscale.data.caption_files import read_captions
from genscale.errors import DataError

PATHS = ["a.mp4", "b/c.gif", "b/frames"]
TEXTS = ["a cat", "two  dogs\nplay", "a ring"]
CLEAN = ["a cat", "two dogs play", "a ring"]


def sidecars(root: Path) -> None:
    (root / "b").mkdir()
    for path, text in zip(("a.txt", "b/c.txt", "b/frames.txt"), TEXTS, strict=True):
        (root / path).write_text(text)


def test_one_file_each(tmp_path: Path) -> None:
    assert read_captions(tmp_path, PATHS, "auto") is None
    sidecars(tmp_path)
    assert read_captions(tmp_path, PATHS, "auto") == CLEAN
    assert read_captions(tmp_path, PATHS, "sidecar") == CLEAN
    assert read_captions(tmp_path, PATHS, "none") is None
    (tmp_path / "b/c.txt").unlink()
    with pytest.raises(
        DataError, match=r"1 of 3 files in .* no caption .*b/c\.gif.*e\.g\. b/c\.txt"
    ):
        read_captions(tmp_path, PATHS, "auto")
    (tmp_path / "b/c.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"empty captions for 1 of 3 files \(b/c\.gif\)"):
        read_captions(tmp_path, PATHS, "auto")
    (tmp_path / "b/c.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DataError, match=r"b/c\.txt cannot be read"):
        read_captions(tmp_path, PATHS, "auto")


@pytest.mark.parametrize("kind", ["jsonl", "json", "mapping", "csv"])
def test_one_table_for_all(tmp_path: Path, kind: str) -> None:
    rows = [{"file_name": p, "text": t} for p, t in zip(PATHS, TEXTS, strict=True)]
    if kind == "jsonl":
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    elif kind == "json":
        (tmp_path / "metadata.json").write_text(json.dumps(rows))
    elif kind == "mapping":
        (tmp_path / "metadata.json").write_text(json.dumps(dict(zip(PATHS, TEXTS, strict=True))))
    else:
        lines = ["file,caption", *(f'"{p}","{t}"' for p, t in zip(PATHS, CLEAN, strict=True))]
        (tmp_path / "metadata.csv").write_text("\n".join(lines))
    assert read_captions(tmp_path, PATHS, "auto") == CLEAN
    assert read_captions(tmp_path, PATHS[1:], "metadata") == CLEAN[1:]  # further rows do no harm
    with pytest.raises(DataError, match=r"no row for 1 of 4 files \(z\.mp4\)"):
        read_captions(tmp_path, [*PATHS, "z.mp4"], "metadata")


def test_tables_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no metadata"):
        read_captions(tmp_path, PATHS, "metadata")
    table = tmp_path / "metadata.jsonl"
    table.write_text('{"file_name": "a.mp4", "words": "x"}')
    with pytest.raises(DataError, match=r"Row 1 of .* has no .*found: file_name, words"):
        read_captions(tmp_path, PATHS, "auto")
    table.write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        read_captions(tmp_path, PATHS, "auto")
    table.write_text("3")
    with pytest.raises(DataError, match="holds no rows"):
        read_captions(tmp_path, PATHS, "auto")
