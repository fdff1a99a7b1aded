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
    return trained(TINY_TEXT, tmp_path_factory.mktemp("text") / "outputs")


TINY_CLIPS = (
    "model=snap_video",
    "debug=smoke",
    "data.count=24",
    "data.heldout_count=8",
    "data.resolution=16",
    "data.num_frames=4",
    "text_encoder.token_size=8",
    "model.patch_size=[1,8,8]",
    "model.group_size=[4,2,2]",
    "model.patch_width=16",
    "model.latent_width=32",
    "model.context_width=32",
    "model.num_latents=4",
    "model.depth=1",
    "model.global_depth=1",
    "batch_size=4",
    "trainer.max_steps=4",
    "callbacks.checkpoint_every=4",
    "callbacks.sample_every=4",
    "callbacks.sample_count=2",
    "sampler.steps=2",
)


@pytest.fixture(scope="session")
def clip_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a small model of clips from captions: four frames of 16 pixels."""
    outputs = tmp_path_factory.mktemp("clips") / "outputs"
    return trained(TINY_CLIPS, outputs)


def trained(words: tuple[str, ...], outputs: Path) -> Path:
    """Train in this process and return the run's folder."""
    import os

    from genscale.cli.app import main

    before = os.environ.pop("GENSCALE_RUN_DIR", None)
    argv = [*words, f"paths.outputs={outputs}"]
    status = main("train", "genscale.cli.train:run", argv=argv)
    os.environ.pop("GENSCALE_RUN_DIR", None)
    if before is not None:
        os.environ["GENSCALE_RUN_DIR"] = before
    assert status == 0
    return (outputs / "latest").resolve()
