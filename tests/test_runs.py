"""Run folders: opening, checkpoints, names, links, and what a run was made with."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from genscale import runs
from genscale.errors import CheckpointError, ConfigError
from genscale.runs import (
    RunFolder,
    environment,
    new_folder,
    newest_run,
    point_latest,
    read_jsonl,
    remove_empty,
)


def make_run(folder: Path, *steps: int) -> RunFolder:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 3\nmodel:\n  depth: 2\n")
    for step in steps:
        (folder / "checkpoints" / f"step-{step:08d}.ckpt").write_bytes(b"x")
    return RunFolder(folder)


class TestRunFolder:
    def test_open_follows_links(self, tmp_path: Path) -> None:
        run = make_run(tmp_path / "outputs" / "dimr" / "a")
        point_latest(tmp_path / "outputs", run.path)
        opened = RunFolder.open(tmp_path / "outputs" / "latest")
        assert opened.path == run.path.resolve()
        assert opened.config() == {"seed": 3, "model": {"depth": 2}}
        assert opened.evaluations_dir == run.path.resolve() / "evaluations"

    def test_what_is_no_run_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"is no run folder.*python train\.py model=dimr"):
            RunFolder.open(tmp_path)

    @pytest.mark.parametrize("text", ["", "- a list", "a: [1"])
    def test_a_damaged_config_is_refused(self, tmp_path: Path, text: str) -> None:
        run = make_run(tmp_path / "a")
        run.config_file.write_text(text)
        with pytest.raises(ConfigError, match=r"config\.yaml is (empty|no valid YAML)"):
            run.config()

    def test_a_config_runs_no_code(self, tmp_path: Path) -> None:
        run = make_run(tmp_path / "a")
        run.config_file.write_text(f"x: !!python/object/apply:os.mkdir ['{tmp_path}/sprung']")
        with pytest.raises(ConfigError, match="no valid YAML"):
            run.config()
        assert not (tmp_path / "sprung").exists()


class TestCheckpoints:
    def test_by_step_oldest_first_whole_files_only(self, tmp_path: Path) -> None:
        run = make_run(tmp_path / "a", 1000, 20, 300)
        (run.checkpoints_dir / ".step-00002000.ckpt.tmp").write_bytes(b"half")
        (run.checkpoints_dir / "notes.txt").write_text("")
        assert list(run.checkpoints()) == [20, 300, 1000]
        assert run.checkpoint("latest").name == "step-00001000.ckpt"
        assert run.checkpoint(20) == run.checkpoint("20") == run.checkpoints()[20]
        assert run.checkpoint(run.checkpoints()[300]) == run.checkpoints()[300]

    def test_what_is_not_there_is_refused(self, tmp_path: Path) -> None:
        run = make_run(tmp_path / "a", 20, 300)
        with pytest.raises(CheckpointError, match=r"step 7 in .*; there are steps 20, 300\. Give"):
            run.checkpoint(7)
        with pytest.raises(CheckpointError, match=r"No checkpoint file at x\.ckpt"):
            run.checkpoint("x.ckpt")
        with pytest.raises(CheckpointError, match="the run stopped before its first one"):
            make_run(tmp_path / "b").checkpoint()


class TestNames:
    def test_folders_of_one_second_do_not_collide(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(runs, "stamp", lambda: "2026-01-02_03-04-05")
        made = [new_folder(tmp_path / "dimr") for _ in range(11)]
        assert [folder.name for folder in made[:2]] == [
            "2026-01-02_03-04-05",
            "2026-01-02_03-04-05_02",
        ]
        assert all(folder.is_dir() for folder in made)
        assert sorted(made) == made  # the newest is still the last by name

    def test_the_newest_run_is_the_last_by_name_that_has_begun(self, tmp_path: Path) -> None:
        assert newest_run(tmp_path / "dimr") is None
        for name in ("2026-01-02_03-04-05", "2026-01-02_03-04-05_02", "2025-12-31_23-59-59"):
            make_run(tmp_path / "dimr" / name)
        (tmp_path / "dimr" / "2027-01-01_00-00-00").mkdir()  # claimed, but never begun
        found = newest_run(tmp_path / "dimr")
        assert found is not None
        assert found.path.name == "2026-01-02_03-04-05_02"

    def test_a_claimed_folder_is_given_up_as_far_as_it_is_empty(self, tmp_path: Path) -> None:
        (tmp_path / "outputs" / "kept").mkdir(parents=True)
        folder = new_folder(tmp_path / "outputs" / "dimr_digits")
        remove_empty(folder, tmp_path / "outputs")
        assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["kept"]
        (tmp_path / "outputs" / "kept").rmdir()
        remove_empty(new_folder(tmp_path / "outputs" / "dimr"), tmp_path / "outputs")
        assert list(tmp_path.iterdir()) == []  # the top goes too, and nothing above it
        assert tmp_path.is_dir()


class TestLatest:
    def test_the_link_moves_and_survives_a_move_of_outputs(self, tmp_path: Path) -> None:
        outputs = tmp_path / "outputs"
        for name in ("a", "b"):
            run = make_run(outputs / name)
            point_latest(outputs, run.path)
            assert (outputs / "latest").resolve() == run.path.resolve()
        os.rename(outputs, tmp_path / "moved")
        assert (tmp_path / "moved" / "latest" / "config.yaml").is_file()
        assert sorted(p.name for p in (tmp_path / "moved").iterdir()) == ["a", "b", "latest"]

    def test_a_folder_of_that_name_is_the_users(self, tmp_path: Path) -> None:
        (tmp_path / "latest").mkdir()
        point_latest(tmp_path, make_run(tmp_path / "a").path)
        assert not (tmp_path / "latest").is_symlink()


def test_rows_are_read_without_a_torn_last_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_jsonl(path) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]


def test_environment_names_versions_and_command() -> None:
    found = environment()
    assert {"genscale", "torch", "lightning", "numpy"} <= set(found["versions"])
    assert found["versions"]["torch"][0].isdigit()
    assert found["threads"] >= 1
    assert found["command"]
