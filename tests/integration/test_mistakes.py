"""Mistakes a person makes, through the real commands.

Each ends with status 1, one sentence on standard error that says what is wrong and what to do, no
traceback, and nothing written.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

Words = tuple[str, ...]

# command line -> words of its sentence; RUN stands for a trained run
TYPING: list[tuple[str, Words, Words]] = [
    ("train", ("modle=dimr",), ("'modle'", "Did you mean 'model'?")),
    ("train", ("model=dmir",), ("'dmir' is not an option of model", "Did you mean 'dimr'?")),
    (
        "train",
        ("model.depht=3",),
        ("'model.depht' is not a parameter of genscale.backbones.dimr.DiMR", "'model.depths'"),
    ),
    ("sample", ("run=RUN", "formt=png"), ("'formt'", "Did you mean 'format'?")),
    ("evaluate", ("metrics=quik",), ("'quik' is not an option of metrics", "'quick'")),
]
VALUES: list[tuple[str, Words, Words]] = [
    (
        "train",
        ("batch_size=10", "trainer.accumulate_grad_batches=4"),
        ("batch_size=10 does not divide", "Give a positive multiple of 4."),
    ),
    (
        "train",
        ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "batch_size=7"),
        ("batch_size=7", "Give a positive multiple of 2."),
    ),
    ("train", ("trainer=gpu",), ("no CUDA device is present", "trainer=cpu")),
    ("train", ("condition_dropout=1.5",), ("in [0, 1]", "1.5")),
    ("train", ("seed=one",), ("seed must be a whole number, but 'one' was given",)),
    ("train", ("callbacks.log_every=0",), ("callbacks.log_every", "at least 1, but 0")),
    ("train", ("trainer.max_steps=0",), ("trainer.max_steps", "at least 1, but 0")),
    ("train", ("trainer.precision=half",), ("trainer", "'half'")),
    ("train", ("trainer.profiler=sample",), ("'sample'", "Did you mean 'simple'?")),
    ("train", ("data.limit=5000",), ("data.limit=5000", "1 to 1437")),
    ("train", ("model.depths=[1,2]",), ("model.depths must be odd", "2")),
    ("sample", ("run=RUN", "labels=[10]"), ("class 10", "0 to 9")),
    ("sample", ("run=RUN", "labels=evenly"), ("balanced, random or a list", "'evenly'")),
    ("train", ("sampler=edm",), ("sigma / alpha = inf", "LinearFlow", "sampler.schedule=linear")),
    ("train", ("sampler=ancestral", "sampler.variance=lower"), ("discrete", "LinearFlow has none")),
    ("train", ("objective=ddpm", "sampler=ancestral"), ("learned variance", "learn_sigma=true")),
    (
        "train",
        ("sampler=diffusers", "sampler.scheduler=UniPCMultistep"),
        ("'UniPCMultistep'", "Did you mean 'UniPCMultistepScheduler'?"),
    ),
    ("sample", ("run=RUN", "sampler=edm"), ("sigma / alpha = inf", "sampler.schedule=linear")),
    (
        "sample",
        ("run=RUN", "sampler=diffusers", "sampler.config={solver_ordr: 3}"),
        ("'sampler.config.solver_ordr'", "Did you mean 'solver_order'?"),
    ),
    ("sample", ("run=RUN", "sampler.steps=0"), ("sampler.steps", "at least 1", "is 0")),
    ("sample", ("run=RUN", "guidance.scale=-1"), ("guidance.scale", "not negative", "-1")),
    ("sample", ("run=RUN", "format=gif"), ("is for clips", "format=grid, png or npz")),
    ("sample", ("run=RUN", "weights=best"), ("ema, raw", "'best'")),
    ("sample", ("run=RUN", "num_samples=many"), ("num_samples", "whole number", "'many'")),
    ("sample", ("run=RUN", "batch_size=0"), ("batch_size", "at least 1, but 0")),
    ("sample", ("run=RUN", "precision=float8"), ("float32 or bfloat16", "'float8'")),
    ("sample", ("run=RUN", "device=tpu9"), ("device=tpu9 is no device",)),
    ("evaluate", ("run=RUN", "labels=[10]", "metrics.metrics=[fd_pixels]"), ("class 10",)),
    ("evaluate", ("run=RUN", "num_samples=0"), ("num_samples", "at least 1, but 0")),
]
PLACES: list[tuple[str, Words, Words]] = [
    ("train", ("data=image_folder",), ("data.root is not set",)),
    ("train", ("data=image_folder", "data.root=/nowhere"), ("no folder /nowhere", "data.root=")),
    ("train", ("resume=latest",), ("no run named 'dimr_digits'", "without resume")),
    ("train", ("resume=gone.ckpt",), ("resume=gone.ckpt is no checkpoint file",)),
    ("train", ("run_dir=RUN",), ("already holds a run", "resume=latest")),
    ("sample", ("run=/nowhere",), ("run=/nowhere is no run folder", "python train.py")),
    ("evaluate", ("run=/nowhere",), ("run=/nowhere is no run folder", "python train.py")),
    ("sample", ("run=RUN", "checkpoint=7"), ("No checkpoint of step 7", "steps 10, 20")),
    ("sample", ("run=RUN", "checkpoint=x.ckpt"), ("No checkpoint file at x.ckpt",)),
    ("evaluate", ("samples=gone.npz", "reference=RUN/env.json"), ("samples=gone.npz",)),
    ("evaluate", ("samples=RUN/env.json",), ("without reference=",)),
    (
        "evaluate",
        ("run=RUN/export", "metrics.metrics=[fd_pixels]"),
        ("is an exported folder", "reference="),
    ),
    ("evaluate", ("run=RUN", "metrics=fid"), ("No weights for 'inception'", "genscale.cli.fetch")),
]


# parts that do not go together: told before data is read
COMBINATIONS: list[tuple[str, Words, Words]] = [
    (
        "train",
        ("model=dit", "model.learn_sigma=true"),
        ("model.learn_sigma=true", "does not train it", "objective=ddpm_dit"),
    ),
    (
        "train",
        ("model=dit_s_2", "objective=ddpm_uvit", "data=image_folder"),
        ("model.learn_sigma=true", "does not train it"),
    ),
    (
        "train",
        ("objective=ddpm", "objective.learn_sigma=true", "data=image_folder"),
        ("objective.learn_sigma=true", "predicts its variance", "objective.learn_sigma=false"),
    ),
    (
        "train",
        ("objective=ddpm_continuous", "objective.learn_sigma=true"),
        ("objective.learn_sigma=true is about noise steps", "objective.betas=linear"),
    ),
    (
        "train",
        ("objective=ddpm", "guidance=cfg_zero_star", "data=image_folder"),
        ("guides the velocity of a flow", "Use guidance=cfg"),
    ),
    (
        "train",
        ("guidance=cfg", "guidance.interval=[0.2,1.4]"),
        ("guidance.interval must be [lo, hi]", "[0.2, 1.4]", "process times"),
    ),
    (
        "sample",
        ("run=RUN", "guidance.scale=2", "guidance.interval=[0.7,0.3]"),
        ("guidance.interval must be [lo, hi]", "[0.7, 0.3]"),
    ),
    ("train", ("evaluation.labels=evenly",), ("balanced, random or a list", "'evenly'")),
    ("train", ("evaluation.labels=[11]",), ("class 11", "0 to 9")),
    (
        "train",
        ("metrics.num_samples=50000", "callbacks.metrics_every=10"),
        ("50000", "500"),
    ),
]


@pytest.fixture
def refused(
    command: Any, tmp_path: Path, trained_run: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    """Run a command that must be refused, and return its sentences."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GENSCALE_WEIGHTS", str(tmp_path / "no-weights"))

    def run(name: str, *words: str) -> list[str]:
        before = _files(tmp_path), _files(trained_run)
        answer = command(name, *[word.replace("RUN", str(trained_run)) for word in words])
        assert answer.status == 1, answer.err
        assert answer.out == ""
        lines = answer.err.splitlines()
        assert lines, "nothing was said"
        for line in lines:  # nothing but sentences: no traceback, no warning
            assert line.startswith("genscale: "), answer.err
            # a sentence, or one that ends with the command to type
            assert line.endswith((".", "?")) or ": python " in line, line
        assert (_files(tmp_path), _files(trained_run)) == before, "something was written"
        return lines

    return run


def _files(folder: Path) -> dict[str, int]:
    return {
        str(path): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if "__pycache__" not in path.parts
    }


@pytest.mark.parametrize(("name", "words", "fragments"), TYPING + VALUES + PLACES + COMBINATIONS)
def test_one_sentence(
    refused: Callable[..., list[str]], name: str, words: Words, fragments: Words
) -> None:
    (sentence,) = refused(name, *words)
    for fragment in fragments:
        assert fragment in sentence


def test_all_problems_at_once(refused: Callable[..., list[str]]) -> None:
    lines = refused(
        "train",
        "data=image_folder",
        "data.root=/nowhere",
        "batch_size=10",
        "trainer.accumulate_grad_batches=4",
        "condition_dropout=-0.5",
        "optim.lr=0",
        "sampler.steps=0",
        "ema.decay=1",
    )
    told = ["batch_size=10", "condition_dropout", "/nowhere", "sampler.steps", "optim.lr", "ema."]
    assert len(lines) == len(told)
    for line, word in zip(lines, told, strict=True):
        assert word in line


class TestCheckpoints:
    def test_truncated(
        self, refused: Callable[..., list[str]], trained_run: Path, tmp_path: Path
    ) -> None:
        whole = (trained_run / "checkpoints" / "step-00000020.ckpt").read_bytes()
        (tmp_path / "half.ckpt").write_bytes(whole[: len(whole) // 2])
        (sentence,) = refused("sample", "run=RUN", "checkpoint=half.ckpt")
        assert "half.ckpt is damaged" in sentence
        assert f"{len(whole) // 2} bytes" in sentence

    @pytest.mark.parametrize("wrapped", [True, False], ids=["torch file", "bare pickle"])
    def test_code_in_a_file_is_not_run(
        self, refused: Callable[..., list[str]], tmp_path: Path, wrapped: bool
    ) -> None:
        trap = tmp_path / "sprung"
        if wrapped:
            torch.save({"state_dict": _Trap(trap)}, tmp_path / "trap.ckpt")
        else:
            (tmp_path / "trap.ckpt").write_bytes(pickle.dumps({"state_dict": _Trap(trap)}))
        (sentence,) = refused("sample", "run=RUN", "checkpoint=trap.ckpt")
        assert "would run code when loaded" in sentence
        assert not trap.exists()

    def test_of_another_depth(
        self, refused: Callable[..., list[str]], command: Any, tiny: Words, tmp_path: Path
    ) -> None:
        options = ("model.depths=[3,1]", "trainer.max_steps=1", "run_dir=deeper")
        assert command("train", *tiny, *options).status == 0
        file = tmp_path / "deeper" / "checkpoints" / "step-00000001.ckpt"
        (sentence,) = refused("sample", "run=RUN", f"checkpoint={file}")
        assert "DiMR" in sentence
        assert "unexpected" in sentence
        assert "stages.0.blocks." in sentence or "depth" in sentence

    def test_of_another_width(
        self, refused: Callable[..., list[str]], trained_run: Path, tmp_path: Path
    ) -> None:
        content = torch.load(trained_run / "checkpoints" / "step-00000020.ckpt")
        weights = content["state_dict"]
        name = next(key for key in weights if key.startswith("ema.") and weights[key].dim() == 2)
        weights[name] = weights[name][:-1].clone()
        torch.save(content, tmp_path / "narrower.ckpt")
        (sentence,) = refused("sample", "run=RUN", "checkpoint=narrower.ckpt")
        assert "1 tensors" in sentence
        assert name.removeprefix("ema.") in sentence

    def test_resumed_with_another_rate(
        self, refused: Callable[..., list[str]], tiny: Words
    ) -> None:
        (sentence,) = refused("train", *tiny, "run_dir=RUN", "resume=latest", "optim.lr=0.1")
        # 0.002 is the rate of conf/optim/adamw.yaml
        assert "started with optim.lr=0.002, but optim.lr=0.1 was given" in sentence

    def test_resumed_from_outside_a_run(
        self, refused: Callable[..., list[str]], tmp_path: Path
    ) -> None:
        (tmp_path / "stray.ckpt").write_bytes(b"")
        (sentence,) = refused("train", "resume=stray.ckpt")
        assert "resume=stray.ckpt lies in no run folder" in sentence


class _Trap:
    """An object whose unpickling would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


class TestData:
    def test_a_damaged_picture_is_named(
        self, refused: Callable[..., list[str]], tmp_path: Path
    ) -> None:
        for folder in ("cats", "dogs"):
            (tmp_path / "pictures" / folder).mkdir(parents=True)
            for i in range(3):
                image = Image.fromarray(np.full((20, 20, 3), 40 * i, dtype=np.uint8))
                image.save(tmp_path / "pictures" / folder / f"{i}.png")
        damaged = tmp_path / "pictures" / "dogs" / "1.png"
        damaged.write_bytes(damaged.read_bytes()[:20])
        (sentence,) = refused(
            "train", "data=image_folder", "data.root=pictures", "data.num_workers=0"
        )
        assert "dogs/1.png" in sentence
        assert "data.on_damage=skip" in sentence

    @pytest.mark.parametrize(
        ("name", "fragments"),
        [
            ("channels_first", ("(20, 3, 8, 8)", "transpose(0, 2, 3, 1)")),
            ("unit_floats", ("float64", "Quantise")),
            ("other_name", ("has no arr_0", "found: images")),
        ],
    )
    @pytest.mark.parametrize("side", ["samples", "reference"])
    def test_npz_of_another_layout(
        self,
        refused: Callable[..., list[str]],
        tmp_path: Path,
        name: str,
        fragments: Words,
        side: str,
    ) -> None:
        pixels = np.arange(20 * 8 * 8 * 3, dtype=np.uint8).reshape(20, 8, 8, 3)
        np.savez(tmp_path / "good.npz", arr_0=pixels)
        np.savez(tmp_path / "channels_first.npz", arr_0=pixels.transpose(0, 3, 1, 2))
        np.savez(tmp_path / "unit_floats.npz", arr_0=pixels / 255)
        np.savez(tmp_path / "other_name.npz", images=pixels)
        files = {"samples": "good.npz", "reference": "good.npz", side: f"{name}.npz"}
        (sentence,) = refused(
            "evaluate",
            f"samples={files['samples']}",
            f"reference={files['reference']}",
            "metrics.metrics=[fd_pixels]",
        )
        assert f"{name}.npz" in sentence
        if side == "samples":
            assert all(fragment in sentence for fragment in fragments)


class TestAsProcesses:
    """The same as child processes: what a shell sees."""

    def run(self, root: Path, environment: dict[str, str], cwd: Path, *words: str) -> Any:
        return subprocess.run(
            [sys.executable, str(root / words[0]), *words[1:]],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def test_typing(
        self, repository: Path, subprocess_environment: dict[str, str], tmp_path: Path
    ) -> None:
        result = self.run(repository, subprocess_environment, tmp_path, "train.py", "modle=dimr")
        assert result.returncode == 1
        assert result.stderr == (
            "genscale: ConfigError: 'modle' is not a known option of train. Did you mean 'model'?\n"
        )
        assert list(tmp_path.iterdir()) == []

    def test_trap(
        self,
        repository: Path,
        subprocess_environment: dict[str, str],
        tmp_path: Path,
        trained_run: Path,
    ) -> None:
        (tmp_path / "trap.ckpt").write_bytes(
            pickle.dumps({"state_dict": _Trap(tmp_path / "sprung")})
        )
        result = self.run(
            repository,
            subprocess_environment,
            tmp_path,
            "sample.py",
            f"run={trained_run}",
            "checkpoint=trap.ckpt",
        )
        assert result.returncode == 1
        assert result.stderr.startswith("genscale: CheckpointError: trap.ckpt holds Python objects")
        assert len(result.stderr.splitlines()) == 1
        assert [path.name for path in tmp_path.iterdir()] == ["trap.ckpt"]
