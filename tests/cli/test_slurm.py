"""Jobs of SLURM, without SLURM: its variables, its signal, and commands that take its place."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.fabric.plugins.environments import SLURMEnvironment
from omegaconf import OmegaConf

from genscale import dist
from genscale.cli.placing import locate
from genscale.cli.startup import check_processes, cluster_plugins
from genscale.errors import ParallelError
from genscale.runs import read_jsonl
from genscale.training.callbacks.ema import UpdateEMA
from scripts.check_exactness import differences

JOB = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "genscale",
    "SLURM_NNODES": "1",
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "TORCHELASTIC_RUN_ID", *JOB)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, and an environment in which no launcher has left anything."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GENSCALE_RUN_DIR", "")
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


def put(folder: Path, name: str, script: str) -> None:
    """Place a command in ``folder``."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder at the front of PATH whose ``scontrol`` writes down what it was asked."""
    put(tmp_path / "bin", "scontrol", f'echo "$@" >> {tmp_path}/requeued')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "bin"


class TestRequeue:
    def test_a_stopped_job_comes_again_and_ends_with_the_same_bits(
        self,
        command: Any,
        tiny: tuple[str, ...],
        tmp_path: Path,
        commands: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        words = (*tiny, "callbacks.log_every=1", "callbacks.sample_every=0")
        assert command("train", *words, f"run_dir={tmp_path}/whole").status == 0
        for name, value in JOB.items():
            monkeypatch.setenv(name, value)
        update = UpdateEMA.on_step

        def on_step(self: Any, trainer: Any, module: Any) -> None:
            update(self, trainer, module)
            if module.step == 7:
                for _ in range(2):  # it may come twice
                    os.kill(os.getpid(), signal.SIGUSR1)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(UpdateEMA, "on_step", on_step)
            answer = command("train", *words)
        assert answer.status == 138  # 128 + SIGUSR1: what the batch script looks for
        assert "stopped at step 7 with a checkpoint" in answer.out
        run = tmp_path / "outputs" / "dimr_digits" / "slurm-4711"
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000007.ckpt"]
        # Lightning has neither requeued the job nor written a checkpoint of its own
        assert not (tmp_path / "requeued").exists()
        assert not list(tmp_path.rglob("hpc_ckpt*"))
        # the same job, a second time, with the same words
        answer = command("train", *words)
        assert answer.status == 0, answer.err
        assert differences(tmp_path / "whole", run) == []
        assert [row["step"] for row in read_jsonl(run / "metrics.jsonl")] == list(range(1, 21))

    @pytest.mark.parametrize(
        ("status", "comes_again"), [(0, False), (1, False), (143, False), (138, True)]
    )
    def test_the_batch_script_asks_for_another_turn(
        self, repository: Path, tmp_path: Path, commands: Path, status: int, comes_again: bool
    ) -> None:
        put(commands, "srun", f'printf "%s\\n" "$@" > {tmp_path}/started; exit {status}')
        script = repository / "scripts" / "slurm" / "train.sbatch"
        job = {**JOB, "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_NNODES": "4", "PYTHON": "python3"}
        job |= {"SLURM_NTASKS_PER_NODE": "8", "SLURM_CPUS_PER_TASK": "3"}
        result = subprocess.run(
            ["bash", str(script), "model=dit", "trainer=fsdp", "name=two words"],
            env={**os.environ, **job},
            check=False,
            capture_output=True,
            text=True,
        )
        assert (tmp_path / "started").read_text().splitlines() == [
            *("--kill-on-bad-exit=0", "python3", "train.py"),
            *("trainer.num_nodes=4", "trainer.devices=8"),
            *("model=dit", "trainer=fsdp", "name=two words"),
        ]
        assert (tmp_path / "requeued").exists() == comes_again
        if comes_again:
            assert (tmp_path / "requeued").read_text() == "requeue 4711\n"
        else:
            assert result.returncode == status

    def test_the_batch_script_is_warned_before_its_time_is_over(self, repository: Path) -> None:
        script = (repository / "scripts" / "slurm" / "train.sbatch").read_text()
        options = [x.split()[1] for x in script.splitlines() if x.startswith("#SBATCH")]
        assert {"--signal=USR1@300", "--requeue", "--open-mode=append"} <= set(options)
        # names by which Lightning takes a job for a person's terminal
        assert not {"--job-name=bash", "--job-name=interactive"} & set(options)


class TestSurroundings:
    def test_lightning_does_not_requeue(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert cluster_plugins() == []
        for name, value in JOB.items():
            monkeypatch.setenv(name, value)
        (plugin,) = cluster_plugins()
        assert isinstance(plugin, SLURMEnvironment)
        assert not plugin.auto_requeue
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")  # torchrun inside of a job
        assert cluster_plugins() == []

    def test_runs_started_by_hand_get_folders_of_their_own(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        node = {"name": "tiny", "paths": {"outputs": str(tmp_path)}, "run_dir": None}
        cfg = OmegaConf.create({**node, "resume": None})
        monkeypatch.setenv("SLURM_JOB_ID", "4711")
        assert locate(cfg)[0].path.name == "slurm-4711"
        monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
        one, other = (locate(cfg)[0].path for _ in range(2))
        assert one != other
        assert "slurm" not in one.name + other.name

    def test_tasks_and_trainer_must_agree(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
        assert dist.launched() == 4
        assert dist.agree("name", lambda: "here") == "here"  # there is no store to ask
        check_processes(SimpleNamespace(world_size=4))  # type: ignore[arg-type]
        with pytest.raises(ParallelError, match=r"4 processes were started, but .* is set to 1"):
            check_processes(SimpleNamespace(world_size=1))  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("variables", "expected"),
        [
            ({}, True),
            ({"RANK": "0", "LOCAL_RANK": "0"}, True),
            ({"RANK": "4", "LOCAL_RANK": "0"}, False),  # torchrun, the first of another machine
            ({"LOCAL_RANK": "1"}, False),  # started by Lightning
            ({"NODE_RANK": "1", "LOCAL_RANK": "0"}, False),
            ({"SLURM_PROCID": "3"}, False),
            ({"SLURM_PROCID": "3", "RANK": "0"}, True),  # a torchrun of its own in every task
        ],
    )
    def test_who_may_be_first(
        self, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: bool
    ) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert dist.may_be_first() is expected
