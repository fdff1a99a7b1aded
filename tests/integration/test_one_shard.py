"""Sharded training on one process: the whole path of ``trainer=fsdp`` without a second process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

from genscale.runs import RunFolder, read_jsonl
from scripts.check_exactness import differences, final_state, largest_difference
from tests.integration.two_processes import Job, do

WORDS = (
    *("debug=smoke", "model=dit", "model.hidden_size=16", "model.depth=2", "model.num_heads=2"),
    *("data.resolution=8", "batch_size=8", "trainer.max_steps=12", "sampler.steps=3"),
    *("callbacks.log_every=1", "callbacks.checkpoint_every=5", "callbacks.sample_every=4"),
    *("callbacks.sample_count=3", "ema=posthoc", "ema.snapshot_every=6", "ema.sigma_rels=[0.1]"),
)


@pytest.fixture(autouse=True)
def left_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave the group that a run has joined, and forget where it met."""
    before = dict(os.environ)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
        if name not in before:
            os.environ.pop(name, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("accelerator", "exact"), [("cpu", True), pytest.param("gpu", False, marks=pytest.mark.gpu)]
)
def test_half_precision_from_start_to_export(tmp_path: Path, accelerator: str, exact: bool) -> None:
    def train(run: str, *words: str, stop: int | None = None) -> Path:
        where = (f"trainer.accelerator={accelerator}", "trainer.devices=1")
        command = [*WORDS, *words, *where, "trainer.precision=bf16-mixed"]
        assert do(Job([*command, f"run_dir={tmp_path / run}"], stop=stop), 0, 0) == 0
        return tmp_path / run

    plain = train("plain", "trainer=cpu")
    sharded = train("sharded", "trainer=fsdp")
    train("broken", "trainer=fsdp", stop=8)
    assert max(RunFolder(tmp_path / "broken").checkpoints()) == 5
    broken = train("broken", "trainer=fsdp", "resume=latest")
    if exact:
        assert differences(sharded, broken) == []
        assert differences(plain, sharded) == []
    else:  # kernels of the device may add in another order every time
        for one, other in ((sharded, broken), (plain, sharded)):
            states = [final_state(run)["state_dict"] for run in (one, other)]
            assert largest_difference(*states) < 1e-2
    state = final_state(sharded)
    assert list(state["state_dict"]) == list(final_state(plain)["state_dict"])
    values: list[Any] = list(state["state_dict"].values())
    for moments in state["optimizer_states"][0]["state"].values():
        values += moments.values()
    assert {value.dtype for value in values} == {torch.float32}
    assert {value.device.type for value in values} == {"cpu"}
    assert [row["step"] for row in read_jsonl(sharded / "metrics.jsonl")] == list(range(1, 13))
    for name in ("samples/step-00000004.png", "summary.json", "export/genscale.json"):
        assert (sharded / name).is_file()
    assert len(list((sharded / "ema_snapshots").iterdir())) == 2
