"""A file is whole or absent."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from genscale.io.files import atomic_folder, atomic_write, write_json


def test_a_file_appears_whole_and_nothing_else_stays(tmp_path: Path) -> None:
    path = tmp_path / "new/folder/a.txt"
    with atomic_write(path) as temporary:
        assert temporary.parent == path.parent
        assert temporary.suffix == ".txt"
        temporary.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write_half() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_body_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "a.txt"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="permissions are those of POSIX")
def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder"

    def write_half() -> None:
        with atomic_folder(path) as temporary:
            (temporary / "inner").mkdir()
            (temporary / "inner" / "a").write_text("a")
            assert not path.exists()
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_half()
    assert list((tmp_path / "new").iterdir()) == []
    path.mkdir()  # an empty folder may be there
    with atomic_folder(path) as temporary:
        (temporary / "a").write_text("whole")
    assert [p.name for p in path.iterdir()] == ["a"]
    assert [p.name for p in path.parent.iterdir()] == ["folder"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_nothing_is_written_over(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "there"
    if kind == "folder":
        path.mkdir()
    (path / "a" if kind == "folder" else path).write_text("old")
    with pytest.raises(FileExistsError, match="is there already, and a new or empty folder is"):  # noqa: SIM117
        with atomic_folder(path):
            pytest.fail("the body is not run")
    assert (path / "a" if kind == "folder" else path).read_text() == "old"


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {})
    (tmp_path / "plain").write_text("")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.json", "plain")]
    assert modes[0] == modes[1]


def test_json_keeps_order_and_letters(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": [1, 2.5], "a": "\u00e9"})
    expected = '{\n  "b": [\n    1,\n    2.5\n  ],\n  "a": "\u00e9"\n}\n'
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_has_no_word_for_nan(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match=r"not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": value})
    assert list(tmp_path.iterdir()) == []
