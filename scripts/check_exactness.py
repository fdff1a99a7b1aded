"""Show that interruption, batch size and process count do not change a run.

python scripts/check_exactness.py [--kills 5] [--steps 120] [--folder FOLDER] [--only kill ...]

  kill       a run killed with SIGKILL at random moments and resumed, against one left alone:
             weights, average and optimizer state must be equal bit for bit
  processes  two gloo processes against one: gradients of step 1 within 1e-6, weights after 20
             AdamW steps within 1e-4
  sharded    20 steps of DDP and FSDP on two gloo processes, each left alone and each stopped and
             resumed: equal bit for bit; FSDP against DDP: equal bit for bit for DiT, within 1e-4
             for DiMR, whose skips let autograd add three gradients in any order; one process that
             continues what two have begun under FSDP, against one left alone: within 1e-4
  sampling   batch sizes 1, 3, 64 and two processes: 8-bit samples differ by at most one level in
             at most 0.1 % of the values

Prints one line a comparison and exits with 1 where one fails.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

FAST = [
    "batch_size=16",
    "callbacks.log_every=1",
    "callbacks.sample_every=25",
    "callbacks.sample_count=10",
    "callbacks.checkpoint_every=7",
    "lr_schedule.warmup_steps=10",
]


def environment() -> dict[str, str]:
    keep = {k: v for k, v in os.environ.items() if k not in ("GENSCALE_RUN_DIR", "LOCAL_RANK")}
    return {**keep, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


def train(run: Path, *overrides: str, wait: bool = True) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "train.py"), f"run_dir={run}", *FAST, *overrides]
    log = run.with_suffix(".log").open("a")
    process = subprocess.Popen(
        command, cwd=run.parent, env=environment(), stdout=log, stderr=log, text=True
    )
    if wait and process.wait() != 0:
        raise SystemExit(f"training failed; see {run.with_suffix('.log')}")
    return process


def last_step(run: Path) -> int:
    """Return the last logged step; 0 before there is one."""
    from genscale.runs import read_jsonl

    rows = read_jsonl(run / "metrics.jsonl")
    return int(rows[-1]["step"]) if rows else 0


def checkpoints(run: Path) -> list[int]:
    """Return the steps of which there are checkpoints."""
    from genscale.runs import RunFolder

    return list(RunFolder.open(run).checkpoints())


def final_state(run: Path) -> dict[str, Any]:
    from genscale.io.weights import read_checkpoint
    from genscale.runs import RunFolder

    return read_checkpoint(RunFolder.open(run).checkpoint("latest"))


def compare_bits(one: Any, other: Any, path: str = "") -> list[str]:
    """Return the paths of everything that differs."""
    import torch

    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) else [path]
    if isinstance(one, dict):
        if list(one) != list(other):
            return [path + " (keys)"]
        return [d for k in one for d in compare_bits(one[k], other[k], f"{path}.{k}")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [path + " (length)"]
        pairs = enumerate(zip(one, other, strict=True))
        return [d for i, (a, b) in pairs for d in compare_bits(a, b, f"{path}[{i}]")]
    return [] if one == other else [path]


def differences(one: Path, other: Path) -> list[str]:
    """Return the paths of everything in which the last checkpoints of two runs differ."""
    first, second = final_state(one), final_state(other)
    parts = ("state_dict", "optimizer_states", "lr_schedulers", "genscale")
    if not all(first[part] for part in parts):
        raise SystemExit(f"{one} holds an empty part: comparing it would prove nothing")
    return [d for part in parts for d in compare_bits(first[part], second[part], part)]


def check_kill(folder: Path, kills: int, steps: int, accumulate: int) -> bool:
    """Kill a run at random moments and compare its end with that of a run left alone."""
    options = [f"trainer.max_steps={steps}", f"trainer.accumulate_grad_batches={accumulate}"]
    whole, broken = folder / "whole", folder / "broken"
    train(whole, *options)
    moments = random.Random(0)
    killed_at: list[int] = []
    for i in range(kills):
        resume = [] if i == 0 else ["resume=latest"]
        process = train(broken, *options, *resume, wait=False)
        # a random step of what is left, and a random moment within it (or within start-up)
        left = steps - (killed_at[-1] if killed_at else 0)
        target = (killed_at[-1] if killed_at else 0) + moments.randint(1, max(left // 3, 1))
        deadline = time.time() + 300
        while last_step(broken) < target and process.poll() is None and time.time() < deadline:
            time.sleep(0.01)
        time.sleep(moments.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed_at.append(last_step(broken))
    train(broken, *options, "resume=latest")
    different = differences(whole, broken)
    tensors = len(final_state(whole)["state_dict"])
    print(
        f"kill: {kills} x SIGKILL after steps {killed_at} of {steps}, accumulation {accumulate}; "
        f"{tensors} weight and average tensors, optimizer, schedule: "
        + ("equal bit for bit" if not different else f"DIFFERENT: {different[:5]}")
    )
    rows = [json.loads(line)["step"] for line in (broken / "metrics.jsonl").open()]
    print(f"      the log holds steps 1 to {steps} once each: {rows == list(range(1, steps + 1))}")
    return not different and rows == list(range(1, steps + 1))


def largest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    return max(float((one[k].double() - other[k].double()).abs().max()) for k in one)


def check_processes(folder: Path) -> bool:
    """Compare two gloo processes with one, after 1 and after 20 optimizer steps."""
    results = {}
    for devices in (1, 2):
        strategy = "ddp" if devices == 2 else "auto"
        for steps in (1, 20):
            run = folder / f"devices{devices}-steps{steps}"
            # max_steps shapes the decay: a constant rate keeps the first steps alike
            train(
                run,
                f"trainer.max_steps={steps}",
                f"trainer.devices={devices}",
                f"trainer.strategy={strategy}",
                "lr_schedule=constant",
                "callbacks.sample_every=0",
                "trainer.gradient_clip_val=1e9",
            )
            results[devices, steps] = final_state(run)
    # after one AdamW step the first moment is (1 - beta_1) times the gradient
    moments = [
        {k: v["exp_avg"] / 0.1 for k, v in results[d, 1]["optimizer_states"][0]["state"].items()}
        for d in (1, 2)
    ]
    gradients = largest_difference(moments[0], moments[1])
    weights = largest_difference(results[1, 20]["state_dict"], results[2, 20]["state_dict"])
    print(
        f"processes: 2 against 1: gradients of step 1 differ by {gradients:.1e} (limit 1e-6), "
        f"weights and average after 20 steps by {weights:.1e} (limit 1e-4)"
    )
    return gradients <= 1e-6 and weights <= 1e-4


def stopped(run: Path, *overrides: str, after: int) -> None:
    """Train until step ``after`` is logged, and ask the run to stop with a checkpoint."""
    process = train(run, *overrides, wait=False)
    while last_step(run) < after and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    if process.wait() != 128 + signal.SIGTERM:
        raise SystemExit(f"the run did not stop as asked; see {run.with_suffix('.log')}")


def check_sharded(folder: Path, steps: int = 20) -> bool:
    """Compare DDP and FSDP on two processes, left alone and stopped, for two kinds of network."""
    alike = ["callbacks.sample_every=0", "lr_schedule=constant", f"trainer.max_steps={steps}"]
    two = ["trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true"]
    passed = True
    for model, limit in (("dit", 0.0), ("dimr", 1e-4)):
        for name in ("ddp", "fsdp"):
            words = [f"model={model}", *alike, f"trainer={name}", *two]
            whole, broken = folder / f"{model}-{name}", folder / f"{model}-{name}-stopped"
            train(whole, *words)
            stopped(broken, *words, after=steps // 3)
            if name == "fsdp":
                shutil.copytree(broken, folder / f"{model}-one-stopped")
            halfway = max(checkpoints(broken))
            train(broken, *words, "resume=latest")
            different = differences(whole, broken)
            print(
                f"sharded: {model}, {name}, 2 processes, stopped at step {halfway} of {steps} and "
                "resumed: " + (f"DIFFERENT: {different[:5]}" if different else "equal bit for bit")
            )
            passed = passed and not different
        different = differences(folder / f"{model}-ddp", folder / f"{model}-fsdp")
        states = [final_state(folder / f"{model}-{n}")["state_dict"] for n in ("ddp", "fsdp")]
        apart = largest_difference(*states)
        told = f"weights and averages differ by {apart:.1e} (limit {limit:.0e})"
        print(f"sharded: {model}, fsdp against ddp: {told if different else 'equal bit for bit'}")
        passed = passed and apart <= limit and (limit > 0 or not different)
        one, taken_over = folder / f"{model}-one", folder / f"{model}-one-stopped"
        train(one, f"model={model}", *alike)
        train(taken_over, f"model={model}", *alike, "resume=latest")
        states = [final_state(run)["state_dict"] for run in (one, taken_over)]
        apart = largest_difference(*states)
        print(
            f"sharded: {model}, begun by 2 processes under fsdp and ended by one, against one left "
            f"alone: weights and averages differ by {apart:.1e} (limit 1e-4)"
        )
        passed = passed and apart <= 1e-4
    return passed


def check_sampling(folder: Path) -> bool:
    """Compare the same 64 samples made in other batches and by two processes."""
    from genscale.io.images import load_npz

    run = folder / "sampled"
    train(run, "trainer.max_steps=50", "callbacks.sample_every=0")
    sample = [
        str(ROOT / "sample.py"),
        f"run={run}",
        "num_samples=64",
        "format=npz",
        "guidance.scale=2",
        "sampler.steps=10",
    ]
    launch = {
        "batch 64": [sys.executable, *sample, "batch_size=64"],
        "batch 1": [sys.executable, *sample, "batch_size=1"],
        "batch 3": [sys.executable, *sample, "batch_size=3"],
        "2 processes": [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node=2",
            "--rdzv-backend=c10d",
            "--rdzv-endpoint=localhost:0",
            *sample,
        ],
    }
    sets = {}
    for name, command in launch.items():
        out = folder / f"samples-{name.replace(' ', '-')}"
        subprocess.run(
            [*command, f"out_dir={out}"],
            cwd=folder,
            env=environment(),
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        sets[name] = load_npz(out / "samples.npz")
    images, labels = sets["batch 64"]
    passed = True
    for name in ("batch 1", "batch 3", "2 processes"):
        other, other_labels = sets[name]
        difference = (images.int() - other.int()).abs()
        share = float((difference > 0).double().mean())
        same = (
            labels is not None and other_labels is not None and bool((labels == other_labels).all())
        )
        good = same and int(difference.max()) <= 1 and share <= 1e-3
        print(
            f"sampling: {name} against batch 64: largest 8-bit difference {int(difference.max())}, "
            f"in {share:.3%} of the values (limits 1 and 0.1 %), labels equal: {same}"
        )
        passed = passed and good
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Interruption, batches and processes change nothing."
    )
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "exactness")
    every = ("kill", "processes", "sharded", "sampling")
    parser.add_argument("--only", choices=every, action="append")
    arguments = parser.parse_args()
    checks = arguments.only or every
    folder = arguments.folder.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    passed = True
    if "kill" in checks:
        passed &= check_kill(folder, arguments.kills, arguments.steps, arguments.accumulate)
    if "processes" in checks:
        passed &= check_processes(folder)
    if "sharded" in checks:
        passed &= check_sharded(folder)
    if "sampling" in checks:
        passed &= check_sampling(folder)
    print("all equal" if passed else "FAILED")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
