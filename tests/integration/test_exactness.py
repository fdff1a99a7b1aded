"""Interruption, batch size and number of processes do not change a run.

``scripts/check_exactness.py`` shows the same on the demo's model; here the model is tiny.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from genscale import rng
from genscale.conditioning.base import Conditioning
from genscale.io.images import load_npz
from genscale.io.weights import read_checkpoint
from genscale.pipeline import GenerationPipeline
from genscale.runs import RunFolder, read_jsonl
from scripts.check_exactness import differences, largest_difference

STEPWISE = ("callbacks.log_every=1", "callbacks.sample_every=0", "lr_schedule.warmup_steps=5")


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["train/loss"]) for row in read_jsonl(run / "metrics.jsonl")]


class TestResume:
    """A run stopped in the middle and resumed ends with the bits of one left alone."""

    @pytest.mark.parametrize(
        "words",
        [
            (),
            ("trainer.accumulate_grad_batches=2",),
            # torch's own generator is at work inside the network
            ("model.dropout=0.2", "trainer.accumulate_grad_batches=2"),
            ("optim.betas=[0,0.9]", "ema=power", "lr_schedule=cosine", "data.flip=true"),
            ("trainer.precision=bf16-mixed", "objective=ddpm"),
        ],
        ids=["plain", "accumulation", "drop-out", "other recipe", "bfloat16"],
    )
    def test_in_the_middle(
        self, command: Any, tiny: tuple[str, ...], tmp_path: Path, words: tuple[str, ...]
    ) -> None:
        options = (*tiny, *STEPWISE, *words, "callbacks.checkpoint_every=6")
        assert command("train", *options, f"run_dir={tmp_path}/whole").status == 0
        _stop_after(11, command, *options, f"run_dir={tmp_path}/broken")
        assert max(RunFolder(tmp_path / "broken").checkpoints()) == 6  # five steps are lost
        answer = command("train", *options, f"run_dir={tmp_path}/broken", "resume=latest")
        assert answer.status == 0, answer.err
        assert differences(tmp_path / "whole", tmp_path / "broken") == []
        # the log says the same, too: rows past the checkpoint are not told twice
        assert losses(tmp_path / "broken") == losses(tmp_path / "whole")

    def test_another_seed_is_seen(
        self, command: Any, tiny: tuple[str, ...], tmp_path: Path
    ) -> None:
        for seed in (0, 1):
            run = f"run_dir={tmp_path}/{seed}"
            assert command("train", *tiny, *STEPWISE, f"seed={seed}", run).status == 0
        assert differences(tmp_path / "0", tmp_path / "1") != []


def _stop_after(step: int, command: Any, *words: str) -> None:
    """Train, and break off without any farewell after ``step`` optimizer steps."""
    from genscale.training.callbacks.ema import UpdateEMA

    class PowerCut(BaseException):
        pass

    before = UpdateEMA.on_step

    def on_step(self: Any, trainer: Any, module: Any) -> None:
        if module.step > step:
            raise PowerCut
        before(self, trainer, module)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UpdateEMA, "on_step", on_step)
        with pytest.raises(PowerCut):
            command("train", *words)


@pytest.fixture
def start(subprocess_environment: dict[str, str], repository: Path, tmp_path: Path) -> Any:
    """Start a command as a child process in ``tmp_path``; what it says goes to log.txt."""
    children: list[subprocess.Popen[bytes]] = []
    log = (tmp_path / "log.txt").open("wb")

    def start(script: str, *words: str, launcher: tuple[str, ...] = (), **more: str) -> Any:
        environment = {**subprocess_environment, **more}
        for name in ("GENSCALE_RUN_DIR", "LOCAL_RANK"):
            if name not in more:
                environment.pop(name, None)
        child = subprocess.Popen(
            [sys.executable, *launcher, str(repository / script), *words],
            cwd=tmp_path,
            env=environment,
            stdout=log,
            stderr=log,
        )
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.wait()
    log.close()


def said(folder: Path) -> str:
    return (folder / "log.txt").read_text()


def wait_for_step(run: Path, step: int, child: subprocess.Popen[bytes]) -> int:
    """Wait until a run has logged ``step``; return the last step it has logged."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and child.poll() is None:
        rows = read_jsonl(run / "metrics.jsonl")
        if rows and rows[-1]["step"] >= step:
            return int(rows[-1]["step"])
        time.sleep(0.005)
    raise AssertionError(f"step {step} was not reached; see log.txt")


@pytest.mark.slow
def test_killed_twice_and_asked_to_stop_once(
    command: Any, start: Any, tiny: tuple[str, ...], tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = (*tiny, *STEPWISE, "trainer.max_steps=250", "callbacks.checkpoint_every=7")
    assert command("train", *options, f"run_dir={whole}").status == 0
    for step, resume in ((20, ()), (60, ("resume=latest",))):
        child = start("train.py", *options, f"run_dir={broken}", *resume)
        assert wait_for_step(broken, step, child) < 250
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        assert step - 7 < max(RunFolder(broken).checkpoints()) < 250
    child = start("train.py", *options, f"run_dir={broken}", "resume=latest")
    wait_for_step(broken, 100, child)
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=60) == 128 + signal.SIGTERM  # 143, as a shell reports it
    stopped = max(RunFolder(broken).checkpoints())
    assert 100 <= stopped < 250
    assert f"stopped at step {stopped} with a checkpoint" in said(tmp_path)
    assert not (broken / "summary.json").exists()  # the run has not ended
    answer = command("train", *options, f"run_dir={broken}", "resume=latest")
    assert answer.status == 0, answer.err
    assert differences(whole, broken) == []
    assert losses(broken) == losses(whole)


@pytest.mark.slow
@pytest.mark.dist
class TestProcesses:
    """Two gloo processes compute what one computes, up to the order of summation."""

    options = (*STEPWISE, "lr_schedule=constant", "trainer.gradient_clip_val=1e9")
    two = (
        "trainer=ddp",
        "trainer.accelerator=cpu",
        "trainer.devices=2",
        "trainer.precision=32-true",
    )

    def compare(self, command: Any, tiny: tuple[str, ...], run: Path, tmp_path: Path) -> None:
        """Hold a run of two processes, with checkpoints at steps 1 and 20, against one process."""
        words = (*tiny, *self.options, "callbacks.checkpoint_every=1", "callbacks.keep_every=1")
        assert command("train", *words, f"run_dir={tmp_path}/one").status == 0
        one, two = RunFolder(tmp_path / "one"), RunFolder(run)
        # after one AdamW step the first moment is (1 - beta_1) times the gradient; beta_1 is 0.9
        first = [
            read_checkpoint(r.checkpoint(1))["optimizer_states"][0]["state"] for r in (one, two)
        ]
        gradients = [{str(k): v["exp_avg"] / 0.1 for k, v in state.items()} for state in first]
        assert max(float(g.abs().max()) for g in gradients[0].values()) > 1e-3
        assert largest_difference(*gradients) <= 1e-6
        last = [read_checkpoint(r.checkpoint(20)) for r in (one, two)]
        assert largest_difference(last[0]["state_dict"], last[1]["state_dict"]) <= 1e-4
        assert last[0]["genscale"] == last[1]["genscale"]
        # every row of the log was written once, and with the loss of the whole batch
        ours, theirs = losses(one.path), losses(two.path)
        assert [step for step, _ in theirs] == list(range(1, 21))
        assert theirs[0][1] == pytest.approx(ours[0][1], abs=1e-5)

    def words(self, tiny: tuple[str, ...]) -> tuple[str, ...]:
        every = ("callbacks.checkpoint_every=1", "callbacks.keep_every=1")
        return (*tiny, *self.options, *self.two, *every, "trainer.max_steps=20")

    def test_started_by_train_itself(
        self, command: Any, start: Any, tiny: tuple[str, ...], tmp_path: Path
    ) -> None:
        child = start("train.py", *self.words(tiny))
        assert child.wait(timeout=120) == 0, said(tmp_path)
        (run,) = (tmp_path / "outputs" / "dimr_digits").iterdir()
        assert said(tmp_path).count("results go to") == 1
        self.compare(command, tiny, run, tmp_path)

    def test_started_by_torchrun(
        self, command: Any, start: Any, tiny: tuple[str, ...], tmp_path: Path
    ) -> None:
        torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d")
        launcher = (*torchrun, "--rdzv-endpoint=localhost:0")
        child = start("train.py", *self.words(tiny), launcher=launcher)
        assert child.wait(timeout=120) == 0, said(tmp_path)
        # both processes took the same folder, though each has a clock of its own
        (run,) = (tmp_path / "outputs" / "dimr_digits").iterdir()
        self.compare(command, tiny, run, tmp_path)
        out = tmp_path / "sampled"
        words = (f"run={run}", "num_samples=33", "format=npz", "guidance.scale=2")
        child = start("sample.py", *words, f"out_dir={out}", launcher=launcher)
        assert child.wait(timeout=120) == 0, said(tmp_path)
        one = command("sample", *words, f"out_dir={tmp_path}/alone")
        assert one.status == 0, one.err
        _same_pictures(out / "samples.npz", tmp_path / "alone" / "samples.npz")

    def test_agreement_before_there_is_a_group(
        self, repository: Path, subprocess_environment: dict[str, str], tmp_path: Path
    ) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        program = (
            "import os, torch; from genscale import dist;"
            "name = dist.agree('run', lambda: 'folder of process ' + os.environ['RANK']);"
            "rank, size = dist.initialise();"  # at the same address
            "rows = dist.gather_rows(torch.tensor([1 - rank]), torch.tensor([float(rank)]));"
            "print(name, size, [row.tolist() for row in rows], flush=True); dist.finish()"
        )
        children = [
            subprocess.Popen(
                [sys.executable, "-c", program],
                env={**subprocess_environment, **group, "RANK": rank, "LOCAL_RANK": rank},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in ("0", "1")
        ]
        answers = [child.communicate(timeout=60)[0].strip() for child in children]
        # both have the first one's folder, and all rows in the order of their ids
        assert answers == ["folder of process 0 2 [[0, 1], [1.0, 0.0]]"] * 2


def _same_pictures(one: Path, other: Path) -> None:
    """Assert that two npz hold the same samples: one level apart in at most 0.1 % of the values."""
    (ours, our_labels), (theirs, their_labels) = load_npz(one), load_npz(other)
    assert our_labels is not None
    assert their_labels is not None
    assert torch.equal(our_labels, their_labels)
    apart = (ours.int() - theirs.int()).abs()
    assert int(apart.max()) <= 1
    assert float((apart > 0).double().mean()) <= 1e-3


class TestSampling:
    """A sample is a function of its seed and label, whatever is computed beside it."""

    @pytest.mark.parametrize("guided", [False, True], ids=["unguided", "guided"])
    def test_batch_size_changes_nothing(self, trained_run: Path, guided: bool) -> None:
        from genscale.guidance.cfg import ClassifierFree

        pipeline = GenerationPipeline.from_run(trained_run, device="cpu")
        if guided:
            pipeline.guidance = ClassifierFree(scale=2.0)
        count = 64
        cond = Conditioning(labels=torch.arange(count) % 10)
        seeds = rng.sample_seeds(0, 0, count)
        whole, _ = pipeline.sample(cond, seeds)
        for size in (1, 3):
            parts = [
                pipeline.sample(cond.select(rows), seeds[rows])[0]
                for rows in torch.arange(count).split(size)
            ]
            assert float((torch.cat(parts) - whole).abs().max()) <= 1e-5

    def test_a_share_is_a_part_of_the_whole(self, trained_run: Path) -> None:
        pipeline = GenerationPipeline.from_run(trained_run, device="cpu")
        whole = pipeline.generate(num_samples=23, labels="random", seed=4)
        shares = [
            batch
            for rank in range(3)
            for batch in pipeline.stream(
                num_samples=23, labels="random", seed=4, batch_size=5, rank=rank, world_size=3
            )
        ]
        assert torch.cat([batch.ids for batch in shares]).tolist() == list(range(23))
        apart = (torch.cat([batch.images for batch in shares]).int() - whole.int()).abs()
        assert int(apart.max()) <= 1
        assert float((apart > 0).double().mean()) <= 1e-3
