"""Shared fixtures: one thread, tiny models, no network, no weights, no GPU."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_draws_every_time() -> None:
    """Whatever a test draws from torch's own generator does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture
def subprocess_environment() -> dict[str, str]:
    """Environment of a child process: one thread, no GPU, this checkout importable."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(REPOSITORY),
    }


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, then large ones; GPU tests run where a GPU is.

    A file is one worker's: a slow one that starts last is waited for by all.
    """
    tests = Counter(item.path for item in items)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, -tests[item.path]))  # stable
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


# the smallest model that still has two branches, trained for 20 steps of 8 digits
TINY = (
    "debug=smoke",
    "model.hidden_sizes=[16,8]",
    "model.depths=[1,1]",
    "model.num_heads=2",
    "data.resolution=8",
    "batch_size=8",
    "sampler.steps=3",
    "callbacks.sample_count=10",
)


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small diffusers AutoencoderKL of random weights: 4 channels, 2 pixels."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            sample_size=16,
        )
    folder = tmp_path_factory.mktemp("vae") / "tiny"
    vae.save_pretrained(folder)
    return folder


class Answer(NamedTuple):
    """What a command answered."""

    status: int
    out: str
    err: str


Command = Callable[..., Answer]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run ``train``, ``sample`` or ``evaluate`` in this process, as their scripts would."""
    monkeypatch.delenv("GENSCALE_DEBUG", raising=False)
    monkeypatch.setenv("GENSCALE_RUN_DIR", "")  # training sets it: undone after the test

    def run(name: str, *words: str) -> Answer:
        from genscale.cli.app import main

        capsys.readouterr()
        status = main(name, f"genscale.cli.{name}:run", argv=list(words))
        return Answer(status, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def tiny() -> tuple[str, ...]:
    """Settings of the tiny training run."""
    return TINY


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has trained its 20 steps; tests copy it before they change it."""
    from genscale.cli.app import main

    outputs = tmp_path_factory.mktemp("trained") / "outputs"
    status = main("train", "genscale.cli.train:run", argv=[*TINY, f"paths.outputs={outputs}"])
    os.environ.pop("GENSCALE_RUN_DIR", None)
    assert status == 0
    return (outputs / "latest").resolve()
