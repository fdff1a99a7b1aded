"""A block-causal run on the command line: videos of any length, by any schedule, searched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from genscale.cli.resolvers import frames_of
from genscale.io.images import load_npz
from tests.cli.conftest import trained

TINY = (
    *("model=causal_video", "debug=smoke", "data.count=24", "data.heldout_count=8"),
    *("data.resolution=16", "data.num_frames=4", "text_encoder.token_size=8"),
    *("model.hidden_size=24", "model.depth=1", "model.num_heads=2", "model.mlp_size=32"),
    *("batch_size=4", "trainer.max_steps=2", "callbacks.checkpoint_every=2"),
    *("callbacks.sample_every=2", "callbacks.sample_count=2", "sampler.steps=2"),
)


@pytest.fixture(scope="module")
def video_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(TINY, tmp_path_factory.mktemp("blocks") / "outputs")


def test_frames_are_those_of_a_clip() -> None:
    assert frames_of([8, 32, 32]) == 8
    assert frames_of([32, 32]) is None
    assert frames_of(32) is None
    assert frames_of(None) is None


def test_videos_are_longer_than_clips_of_training(
    command: Any, video_run: Path, tmp_path: Path
) -> None:
    words = (f"run={video_run}", "num_samples=1", "format=npz", f"out_dir={tmp_path}")
    answer = command("sample", *words, "sampler.frames=40")
    assert answer.status == 0, answer.err
    clips, _ = load_npz(tmp_path / "samples.npz")
    assert clips.shape == (1, 40, 16, 16, 3)
    record = json.loads((tmp_path / "samples.json").read_text())
    assert record["solver_evaluations"] == 20 * 2 + 19  # 20 blocks of 2 steps, 19 read again


def test_another_schedule_finds_the_blocks_of_the_run(
    command: Any, video_run: Path, tmp_path: Path
) -> None:
    words = (f"run={video_run}", "num_samples=1", "format=npz", f"out_dir={tmp_path}")
    schedule = ("sampler=blocks", "sampler.schedule=pyramid", "sampler.steps=3", "guidance.scale=2")
    answer = command("sample", *words, *schedule)
    assert answer.status == 0, answer.err
    record = json.loads((tmp_path / "samples.json").read_text())
    assert (record["sampler"]["block_size"], record["sampler"]["trained_frames"]) == (2, 4)
    assert record["nfe_per_sample"] == 2 * (4 + 1)  # both branches of 4 steps and a refresh


def test_frames_that_are_no_blocks_are_refused(command: Any, video_run: Path) -> None:
    answer = command("sample", f"run={video_run}", "sampler.frames=7")
    assert answer.status != 0
    assert "sampler.frames=7 cannot be made: Frames must be a multiple of 2" in answer.err
