"""Upscaling behind a trained run: pictures, searches, the commands, and what they write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genscale import GenerationPipeline, rng
from genscale.conditioning.base import Conditioning
from genscale.evaluation import describe
from genscale.io.images import load_npz
from genscale.rewards.base import Request, Reward, RewardOutput
from genscale.search.best_of_n import BestOfN
from genscale.search.setup import SearchSetup
from genscale.upscaling.interpolation import Interpolation
from genscale.upscaling.loading import facts_of, save_upscaler
from genscale.upscaling.lua import LUA
from genscale.upscaling.stage import Upscaling


def lua() -> LUA:
    """Of the one channel of the run's latents, which are its pictures."""
    torch.manual_seed(0)
    trunk = {"input_size": 8, "window_size": 4, "depths": [1], "hidden_size": 8, "num_heads": [2]}
    network: LUA = LUA(channels=1, scales=(2, 3), head_size=4, **trunk)
    return network.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("upscaler") / "lua"
    save_upscaler(lua(), folder, facts_of(lua()))
    return folder


@pytest.fixture
def pipeline(trained_run: Path) -> GenerationPipeline:
    return GenerationPipeline.from_run(trained_run, device="cpu")


class Largeness(Reward):
    """Judges the mean of a picture, and keeps what it was shown."""

    label = "largeness"
    differentiable = True

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def prepare(self, requests: Sequence[Request]) -> None:
        return None

    def score(self, images: Tensor, handle: Any, index: Tensor) -> RewardOutput:
        self.seen.append(images)
        return RewardOutput(images.mean((1, 2, 3)), {})


def test_samples_are_those_of_before_enlarged(pipeline: GenerationPipeline) -> None:
    cond, seeds = Conditioning(labels=torch.arange(3)), rng.sample_seeds(0, 0, 3)
    plain, spent = pipeline.sample(cond, seeds)
    pipeline.upscaling = Upscaling(lua(), scale=3)
    larger, spent_again = pipeline.sample(cond, seeds)
    # the latents of this run are pictures, and its autoencoder does nothing
    torch.testing.assert_close(larger, lua()(plain, 3).detach())
    assert torch.equal(spent, spent_again)
    assert pipeline.image_shape == (1, 24, 24)
    assert pipeline.decoded_shape == (1, 8, 8)
    images = pipeline.generate(num_samples=2, batch_size=1)
    assert images.shape == (2, *pipeline.image_shape)


def test_a_search_judges_what_is_enlarged(pipeline: GenerationPipeline) -> None:
    cond, seeds = Conditioning(labels=torch.arange(2)), rng.sample_seeds(0, 0, 2)
    pipeline.upscaling = Upscaling(lua(), scale=2)
    reward = Largeness()
    setup = SearchSetup(search=BestOfN(samples=3), reward=reward)
    found = pipeline.search(cond, seeds, setup)
    assert {tuple(images.shape[1:]) for images in reward.seen} == {(1, 16, 16)}
    assert found.images.shape == (2, 1, 16, 16)
    assert found.latents.shape == (2, 1, 8, 8)
    shown = (found.images * 0.5 + 0.5).clamp(0, 1).mean((1, 2, 3))
    torch.testing.assert_close(found.rewards["reward"].float(), shown)
    # the best of three candidates, of which the first is the plain sample
    plain, _ = pipeline.sample(cond, seeds)
    assert bool((shown >= (plain * 0.5 + 0.5).clamp(0, 1).mean((1, 2, 3))).all())
    assert set(found.cost.decodes.tolist()) == {3.0}


def test_protocols_tell_enlarged_samples_apart(pipeline: GenerationPipeline) -> None:
    def protocol() -> Any:
        return describe(pipeline, labels="balanced", num_samples=8, nfe=3.0, weights="ema")

    plain = protocol()
    pipeline.upscaling = Upscaling(Interpolation(space="pixel", channels=1), scale=2)
    enlarged = protocol()
    assert enlarged.sampler == f"{plain.sampler}, upscaled x2 by Interpolation"
    assert enlarged.digest != plain.digest


def test_sample_searches_with_lua(
    command: Any, trained_run: Path, folder: Path, tmp_path: Path
) -> None:
    words = (f"run={trained_run}", "num_samples=4", "format=npz", f"out_dir={tmp_path / 'out'}")
    judge = tmp_path / "judge.py"
    judge.write_text(
        "def wide(images, requests):\n    return images.new_full((len(images),), images.shape[3])\n"
    )
    reward = ("reward=function", f"reward.function={judge}:wide", "same_reward=true")
    searched = ("search=best_of_n", "search.samples=2", *reward)
    upscaled = ("upscaling=lua", f"upscaling.run={folder}", "upscaling.scale=3", "upscaling.tile=6")
    answer = command("sample", *words, *searched, *upscaled, "compare=false")
    assert answer.status == 0, answer.err
    pixels, _ = load_npz(tmp_path / "out" / "samples.npz")
    assert pixels.shape == (4, 24, 24, 3)  # npz files are RGB
    record = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert record["upscaling"].startswith("upscaled x3 by LUA:")
    assert record["upscaling"].endswith("tiles of 6 overlapping 3")
    assert record["upscaler"] == "lua"
    assert record["size"] == [24, 24]
    found = json.loads((tmp_path / "out" / "search.json").read_text())
    assert {each["rewards"]["reward"] for each in found["samples"]} == {24.0}


def test_evaluate_measures_what_is_enlarged(
    command: Any, trained_run: Path, tmp_path: Path
) -> None:
    words = (f"run={trained_run}", "num_samples=20", f"out_dir={tmp_path / 'out'}")
    answer = command("evaluate", *words, "upscaling=bicubic", "metrics.metrics=[fd_pixels]")
    assert answer.status == 0, answer.err
    record = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert record["upscaling"] == "upscaled x2 by bicubic"
    assert record["size"] == [16, 16]
    (protocol, *_) = record["protocols"].values()
    assert "upscaled x2 by bicubic" in protocol["sampler"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("upscaling=lau",), "Did you mean 'lua'?"),
        (("upscaling=lua",), "Give upscaling.run=<run of model=lua"),
        (("upscaling=bicubic", "upscaling.scale=5"), "scale=5 is not offered"),
        (("upscaling=swinir", "upscaling.run=FOLDER"), "holds LUA. Give upscaling=lua"),
        (("upscaling=lua", "upscaling.run=RUN"), "trained DiMR, which is no upscaler"),
        (("upscaling=lua", "upscaling.tiles=8"), "'upscaling.tile'"),
    ],
)
def test_mistakes_are_told_before_anything_is_sampled(
    words: tuple[str, ...], sentence: str, command: Any, trained_run: Path, folder: Path
) -> None:
    places = {"FOLDER": str(folder), "RUN": str(trained_run)}
    for name, place in places.items():
        words = tuple(word.replace(name, place) for word in words)
    answer = command("sample", f"run={trained_run}", *words)
    assert answer.status == 1
    assert sentence in answer.err
    assert "Traceback" not in answer.err
