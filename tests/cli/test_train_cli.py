"""``python train.py``: switches, run folders, continuing, sweeps."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from genscale.cli.numbers import check_numbers, number_problems
from genscale.errors import ConfigError
from genscale.io.weights import read_checkpoint
from genscale.runs import RunFolder, read_jsonl

Words = tuple[str, ...]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder, as somebody who has installed the package would."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def train(command: Any, tiny: Words, tmp_path: Path) -> Any:
    """Train the tiny model with further settings; return the run folder and what was said."""

    def train(*words: str) -> tuple[RunFolder, str]:
        answer = command("train", *tiny, *words)
        assert answer.status == 0, answer.err
        run = (tmp_path / "outputs" / "latest").resolve()
        return RunFolder(run), answer.out + answer.err

    return train


class TestSwitches:
    def test_what_is_said_before_and_after(self, train: Any) -> None:
        run, said = train()
        shown = run.path.relative_to(Path.cwd())
        assert shown.parts[:2] == ("outputs", "dimr_digits")
        assert "DiMR, input (1, 8, 8)" in said  # parameters and operations of every part
        assert (
            "batch 8 = 1 process(es) x 1 accumulation step(s) x 8 samples; 20 steps = 160" in said
        )
        # what to type next, ready to copy
        assert f"sample:   python sample.py run={shown} num_samples=64 guidance.scale=2" in said
        assert f"evaluate: python evaluate.py run={shown} num_samples=500" in said
        summary = next(line for line in said.splitlines() if line.startswith("{"))
        assert json.loads(summary) == json.loads((run.path / "summary.json").read_text())

    def test_overfitting_learns_one_batch(self, train: Any) -> None:
        run, said = train("debug=overfit", "trainer.max_steps=60", "callbacks.sample_every=0")
        assert "60.0 times the 8 training images" in said
        rows = read_jsonl(run.metrics_file)
        # 16 hidden units do not learn much in 60 steps, but the loss must clearly fall
        assert rows[-1]["train/loss"] < 0.9 * rows[0]["train/loss"]

    def test_profiling_reports_into_the_run(self, train: Any) -> None:
        run, _ = train("debug=profile", "trainer.max_steps=3")
        assert "training_step" in (run.path / "fit-profile.txt").read_text()

    def test_bfloat16(self, train: Any) -> None:
        run, _ = train("trainer.precision=bf16-mixed", "trainer.max_steps=3")
        state = read_checkpoint(run.checkpoint())["state_dict"]
        assert {value.dtype for value in state.values() if value.is_floating_point()} == {
            torch.float32
        }

    def test_tensorboard(self, train: Any) -> None:
        pytest.importorskip("tensorboard")
        run, _ = train("logger=tensorboard")
        assert list((run.path / "tensorboard").glob("events.*"))

    @pytest.mark.parametrize("package", ["tensorboard", "wandb"])
    def test_a_logger_that_is_not_installed_is_refused_at_once(
        self, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
    ) -> None:
        monkeypatch.setitem(__import__("sys").modules, package, None)
        answer = command("train", f"logger={package}")
        assert answer.status == 1
        assert f'pip install "genscale[{package}]"' in answer.err
        assert list(tmp_path.iterdir()) == []

    def test_metrics_during_training(self, train: Any) -> None:
        run, _ = train(
            "callbacks.metrics_every=20",
            "callbacks.metrics_samples=30",
            "metrics.metrics=[fd_pixels]",
        )
        (row,) = [row for row in read_jsonl(run.metrics_file) if "eval/fd_pixels" in row]
        assert row["step"] == 20
        assert row["eval/fd_pixels"] > 0

    def test_no_average(self, train: Any) -> None:
        run, _ = train("ema=none", "trainer.max_steps=3")
        state = read_checkpoint(run.checkpoint())["state_dict"]
        names = [name.removeprefix("model.") for name in state if name.startswith("model.")]
        assert names
        assert all(torch.equal(state[f"model.{name}"], state[f"ema.{name}"]) for name in names)

    def test_unlabelled_data_trains_an_unconditional_model(
        self, train: Any, command: Any, tmp_path: Path
    ) -> None:
        from PIL import Image

        (tmp_path / "pictures").mkdir()
        for i in range(9):
            Image.new("RGB", (12, 12), (20 * i, 100, 50)).save(tmp_path / "pictures" / f"{i}.png")
        run, _ = train(
            *("data=image_folder", "data.root=pictures", "data.labels=none", "data.resolution=8"),
            *("data.num_workers=0", "trainer.max_steps=2"),
        )
        config = run.config()
        # the model's sizes follow from what the data turned out to be
        assert (config["model"]["in_channels"], config["model"]["num_classes"]) == (3, 0)
        out = tmp_path / "out"
        answer = command(
            "sample", f"run={run.path}", "num_samples=2", "format=npz", f"out_dir={out}"
        )
        assert answer.status == 0, answer.err


class TestRunFolder:
    def test_the_config_is_complete_and_resolved(self, train: Any) -> None:
        run, _ = train("name=mine", "trainer.max_steps=1")
        assert run.path.parent.name == "mine"
        text = run.config_file.read_text()
        assert "${" not in text
        assert "???" not in text
        config = yaml.safe_load(text)
        assert config["model"]["num_classes"] == 10
        assert config["data_info"]["size"] == 1437  # digits to train on
        assert len(config["data_info"]["fingerprint"]) == 64

    def test_two_runs_of_one_second_have_two_folders(self, train: Any) -> None:
        first, _ = train("trainer.max_steps=1")
        second, _ = train("trainer.max_steps=1")
        assert first.path != second.path
        assert Path("outputs/latest").resolve() == second.path

    def test_a_trainer_that_cannot_be_built_leaves_nothing(
        self, command: Any, tiny: Words, tmp_path: Path
    ) -> None:
        answer = command("train", *tiny, "trainer.accelerator=abacus")
        assert answer.status == 1
        assert "'abacus'" in answer.err
        assert list(tmp_path.iterdir()) == []

    def test_a_run_folder_in_use_is_refused_and_kept(self, train: Any, command: Any) -> None:
        train("run_dir=mine")
        before = {p: p.read_bytes() for p in Path("mine").rglob("*") if p.is_file()}
        answer = command("train", "run_dir=mine")
        assert answer.status == 1
        assert "already holds a run with checkpoints" in answer.err
        assert {p: p.read_bytes() for p in Path("mine").rglob("*") if p.is_file()} == before


class TestResume:
    def test_the_newest_run_of_the_name(self, train: Any) -> None:
        train("name=other", "trainer.max_steps=2")
        first, _ = train("trainer.max_steps=2")
        train("name=other", "trainer.max_steps=3")
        resumed, said = train("resume=latest", "trainer.max_steps=4")
        assert resumed.path == first.path
        assert "continuing from" in said
        assert list(resumed.checkpoints()) == [2, 4]
        assert RunFolder.open("outputs/latest").path == first.path

    def test_from_an_earlier_checkpoint(self, train: Any) -> None:
        whole, _ = train("callbacks.log_every=1")
        again = Path(shutil.copytree(whole.path, "again"))
        file = again / "checkpoints" / "step-00000010.ckpt"
        train("callbacks.log_every=1", f"resume={file}")
        one, other = (read_checkpoint(RunFolder(r).checkpoint(20)) for r in (whole.path, again))
        assert all(torch.equal(v, other["state_dict"][k]) for k, v in one["state_dict"].items())
        assert [row["step"] for row in read_jsonl(again / "metrics.jsonl")] == list(range(1, 21))

    def test_a_finished_run_stays_as_it_is(self, train: Any) -> None:
        run, _ = train()
        before = read_checkpoint(run.checkpoint())["state_dict"]
        rows = read_jsonl(run.metrics_file)
        resumed, _ = train("resume=latest")
        after = read_checkpoint(resumed.checkpoint())["state_dict"]
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        assert read_jsonl(run.metrics_file) == rows
        summary = json.loads((run.path / "summary.json").read_text())
        assert (summary["steps"], summary["samples_seen"]) == (20, 160)

    def test_a_run_stopped_before_its_first_checkpoint_starts_again(self, train: Any) -> None:
        run, _ = train("trainer.max_steps=2")
        for path in run.checkpoints().values():
            path.unlink()
        resumed, said = train("trainer.max_steps=2", "resume=latest")
        assert resumed.path == run.path
        assert "continuing from" not in said
        assert list(run.checkpoints()) == [2]

    def test_logs_and_callbacks_may_change(self, train: Any) -> None:
        run, _ = train("trainer.max_steps=4")
        train(
            *("resume=latest", "trainer.max_steps=8", "callbacks.log_every=2"),
            *("callbacks.keep_checkpoints=1", "trainer.accumulate_grad_batches=2"),
        )
        assert list(run.checkpoints()) == [8]
        assert run.config()["callbacks"]["log_every"] == 2

    @pytest.mark.parametrize(
        ("word", "told"),
        [
            ("seed=1", "started with seed=0, but seed=1 was given"),
            ("model.num_heads=4", "started with model.num_heads=2, but model.num_heads=4"),
            ("data.flip=true", "started with data.flip=False, but data.flip=True"),
            ("data.limit=100", "started with data.limit=None, but data.limit=100"),
            ("ema=power", "ema."),
            ("batch_size=16", "started with batch_size=8, but batch_size=16 was given"),
        ],
    )
    def test_nothing_else_may_change(
        self, command: Any, tiny: Words, trained_run: Path, word: str, told: str
    ) -> None:
        answer = command("train", *tiny, f"run_dir={trained_run}", "resume=latest", word)
        assert answer.status == 1
        (line,) = answer.err.splitlines()
        assert told in line
        assert line.endswith("only trainer, logger and callbacks may differ.")

    def test_other_data_is_refused(self, train: Any, command: Any, tiny: Words) -> None:
        run, _ = train("trainer.max_steps=2", "run_dir=mine")
        config = yaml.safe_load(run.config_file.read_text())
        config["data_info"]["fingerprint"] = "0" * 64
        run.config_file.write_text(yaml.safe_dump(config))
        answer = command("train", *tiny, "trainer.max_steps=4", "run_dir=mine", "resume=latest")
        assert answer.status == 1
        assert "data_info.fingerprint" in answer.err


class TestSeveralJobs:
    def test_a_sweep_trains_one_run_a_value(self, command: Any, tiny: Words) -> None:
        answer = command("train", "-m", *tiny, "seed=0,1", "trainer.max_steps=2")
        assert answer.status == 0, answer.err
        runs = sorted(Path("outputs/dimr_digits").iterdir())
        assert [RunFolder(run).config()["seed"] for run in runs] == [0, 1]
        states = [read_checkpoint(RunFolder(run).checkpoint())["state_dict"] for run in runs]
        assert any(not torch.equal(value, states[1][name]) for name, value in states[0].items())
        assert list(Path("outputs/sweeps").glob("*/multirun.yaml"))

    def test_one_bad_job_does_not_stop_the_others(self, command: Any, tiny: Words) -> None:
        answer = command("train", "-m", *tiny, "batch_size=0,8", "trainer.max_steps=1")
        assert answer.status == 1
        assert "batch_size must be a whole number of at least 1, but 0" in answer.err
        (run,) = Path("outputs/dimr_digits").iterdir()
        assert RunFolder(run).config()["batch_size"] == 8

    def test_processes_that_would_train_alone_are_refused(
        self, command: Any, tiny: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # as torchrun would start them, had trainer=ddp been forgotten
        for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
            monkeypatch.setenv(name, value)
        answer = command("train", *tiny, "run_dir=mine")
        assert answer.status == 1
        sentence = "2 processes were started, but the trainer is set to 1. Give trainer=ddp"
        assert sentence in answer.err
        assert list(tmp_path.iterdir()) == []

    def test_the_environment_says_where_the_run_is(self, train: Any) -> None:
        # read by the processes that Lightning starts
        run, _ = train("trainer.max_steps=1")
        assert os.environ["GENSCALE_RUN_DIR"] == str(run.path)


class TestNumbers:
    def test_all_problems_are_told(self) -> None:
        cfg = OmegaConf.create({"a": 0, "b": "x", "c": True, "d": 1.5, "e": -3, "f": {"g": 2}})
        problems = number_problems(cfg, {"a": 1, "b": None, "c": 0, "d": 0, "e": None, "f.g": 2})
        assert problems == [
            "a must be a whole number of at least 1, but 0 was given. Give e.g. a=1.",
            "b must be a whole number, but 'x' was given. Give e.g. b=1.",
            "c must be a whole number of at least 0, but True was given. Give e.g. c=1.",
            "d must be a whole number of at least 0, but 1.5 was given. Give e.g. d=1.",
        ]
        with pytest.raises(ConfigError, match="a must be"):
            check_numbers(cfg, {"a": 1})
        check_numbers(cfg, {"e": None})
