"""Runs that several tests of the command line read."""

from __future__ import annotations

from pathlib import Path

import pytest

TINY_TEXT = (
    "model=dit_text",
    "debug=smoke",
    "data=scenes",
    "data.count=24",
    "data.heldout_count=8",
    "data.resolution=16",
    "text_encoder=words",
    "text_encoder.token_size=8",
    "model.hidden_size=16",
    "model.depth=1",
    "model.num_heads=2",
    "model.patch_size=8",
    "batch_size=8",
    "trainer.max_steps=4",
    "callbacks.checkpoint_every=2",
    "callbacks.sample_every=4",
    "callbacks.sample_count=4",
    "sampler.steps=2",
)


@pytest.fixture(scope="session")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import os

    from genscale.cli.app import main

    outputs = tmp_path_factory.mktemp("text") / "outputs"
    argv = [*TINY_TEXT, f"paths.outputs={outputs}"]
    before = os.environ.pop("GENSCALE_RUN_DIR", None)
    status = main("train", "genscale.cli.train:run", argv=argv)
    os.environ.pop("GENSCALE_RUN_DIR", None)
    if before is not None:
        os.environ["GENSCALE_RUN_DIR"] = before
    assert status == 0
    return (outputs / "latest").resolve()
