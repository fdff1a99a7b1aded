"""Resolution scaling behind a trained run: the pipeline, the commands, and what they write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genscale import GenerationPipeline, rng
from genscale.decoding import Decoding
from genscale.errors import ConfigError
from genscale.evaluation import describe
from genscale.resolution import preset_named
from genscale.resolution.cascades import SDEdit
from genscale.resolution.sampling import bicubic
from genscale.rewards.base import Request, Reward, RewardOutput
from genscale.search.best_of_n import BestOfN
from genscale.search.setup import SearchSetup


class Brightness(Reward):
    """Judges the mean of a picture."""

    label = "brightness"

    def prepare(self, requests: Sequence[Request]) -> None:
        return None

    def score(self, images: Tensor, handle: Any, index: Tensor) -> RewardOutput:
        value = images.flatten(1).mean(1)
        return RewardOutput(value, {}, torch.ones(len(value), dtype=torch.bool))


@pytest.fixture
def pipeline(trained_run: Path) -> GenerationPipeline:
    return GenerationPipeline.from_run(trained_run, device="cpu")


def test_a_preset_counts_where_there_is_a_size(pipeline: GenerationPipeline) -> None:
    cond, seeds = pipeline.conditions(2, labels=torch.tensor([0, 1])), rng.sample_seeds(0, 0, 2)
    plain, steps = pipeline.sample(cond, seeds)
    channels, height, width = pipeline.image_shape
    pipeline.resolution = preset_named("hiflow")
    assert torch.equal(pipeline.sample(cond, seeds)[0], plain)
    large, spent = pipeline.sample(cond, seeds, size=(2 * height, 2 * width))
    assert large.shape == (2, channels, 2 * height, 2 * width)
    assert (spent > steps).all()
    pipeline.set_size(2 * height)
    pipeline.resolution = preset_named("sdedit")
    inside = pipeline.sample(cond, seeds)[0]
    pipeline.resolution = SDEdit(enlarge="pixel")
    assert not torch.equal(pipeline.sample(cond, seeds)[0], inside)
    # the latents of this run are pictures, which are bounded on the way
    sides = (2 * height, 2 * width)
    bounded = bicubic(plain, sides).clamp(-1, 1)
    torch.testing.assert_close(Decoding(pipeline.autoencoder).enlarged(plain, sides), bounded)
    protocol = describe(pipeline, labels="balanced", num_samples=2, nfe=1.0, weights="ema")
    assert ", at 16x16 by sdedit(enlarge='pixel')" in protocol.sampler


def test_a_search_sees_the_larger_pictures(pipeline: GenerationPipeline) -> None:
    side = 2 * pipeline.image_shape[-1]
    pipeline.set_size(side)
    pipeline.resolution = preset_named("entropy")
    cond, reward = pipeline.conditions(1, labels=torch.tensor([0])), Brightness()
    setup = SearchSetup(search=BestOfN(samples=2), reward=reward)
    found = pipeline.search(cond, rng.sample_seeds(0, 0, 1), setup)
    assert found.images.shape[-2:] == (side, side)
    pipeline.resolution = preset_named("demofusion")
    with pytest.raises(ConfigError, match="takes several runs where there is one"):
        pipeline.search(cond, rng.sample_seeds(0, 0, 1), setup)


def test_the_command_scales_and_refuses(trained_run: Path, tmp_path: Path, command: Any) -> None:
    words = (f"run={trained_run}", "num_samples=1", f"out_dir={tmp_path}", "device=cpu")
    words += ("sampler.steps=2",)
    answer = command("sample", *words, "size=16", "resolution=imax")
    assert answer.status == 0, answer.err
    assert "hint" not in answer.err
    record = json.loads((tmp_path / "samples.json").read_text())
    assert (record["size"], record["resolution"]) == ([16, 16], "imax")
    for given, sentence in (
        (("resolution=imax",), "no size was given. Add e.g. size=64"),
        (("size=16", "resolution=scalecrafter"), "needs the convolutional stages of a UNet"),
    ):
        answer = command("sample", *words, *given)
        assert answer.status != 0
        assert sentence in answer.err
