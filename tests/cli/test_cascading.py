"""A model that enlarges on the command line: base=, its errors, and the published recipes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from genscale.cascade import BaseSamples, ReducedData
from genscale.cli.building import instantiate
from genscale.cli.cascading import place_references, reference_problems
from genscale.conditioning.low_resolution import LowResolution
from genscale.errors import ConfigError
from genscale.pipeline import GenerationPipeline
from tests.test_cascade import LOW, node, pictures, pipeline
from tests.test_configs import composed


def asked(**given: Any) -> DictConfig:
    words = {"run": "outputs/large", "base": None, "base_weights": None, "reference_level": None}
    return OmegaConf.create({**words, **given})


def enlarging() -> GenerationPipeline:
    large = pipeline(8, reference_channels=1)
    large.config = {"low_resolution": node(LOW)}
    return large


def no_data() -> Any:
    raise AssertionError("the data are not asked for")


class TestBase:
    def test_a_run_of_a_smaller_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        small, loaded = pipeline(4), []

        def load(run: str, **settings: Any) -> GenerationPipeline:
            loaded.append((run, settings["weights"]))
            return small

        monkeypatch.setattr(GenerationPipeline, "load", load)
        large = enlarging()
        large.set_precision("bfloat16")
        place_references(asked(base="outputs/small", reference_level=0.3), large, no_data)
        assert isinstance(large.references, BaseSamples)
        assert large.references.base is small
        assert large.references.level == 0.3
        assert small.precision == "bfloat16"
        place_references(asked(base="outputs/small", base_weights="raw"), large, no_data)
        assert loaded == [("outputs/small", "ema"), ("outputs/small", "raw")]
        monkeypatch.setattr(GenerationPipeline, "load", lambda run, **settings: enlarging())
        with pytest.raises(ConfigError, match=r"would need a base of its own"):
            place_references(asked(base="outputs/large"), large, no_data)

    def test_reduced_held_out_data(self) -> None:
        large, held_out = enlarging(), pictures()
        data = SimpleNamespace(train=None, heldout=held_out)
        place_references(asked(base="data"), large, lambda: data)
        assert isinstance(large.references, ReducedData)
        assert large.references.data is held_out
        place_references(
            asked(base="data"), large, lambda: SimpleNamespace(train=held_out, heldout=None)
        )
        assert large.references.data is held_out

    def test_what_cannot_be_is_said(self) -> None:
        with pytest.raises(ConfigError, match=r"run=outputs/large enlarges.*Give base=<run of a"):
            place_references(asked(), enlarging(), no_data)
        for word, value in (("base", "outputs/small"), ("reference_level", 0.1)):
            with pytest.raises(ConfigError, match=rf"^{word}={value} is for models that enlarge"):
                place_references(asked(**{word: value}), pipeline(4), no_data)
        plain = pipeline(4)
        place_references(asked(), plain, no_data)
        assert plain.references is None


def test_data_that_do_not_fit_are_refused_before_training() -> None:
    model = OmegaConf.create(
        {"_target_": "genscale.backbones.fit.FIT", "reference_channels": 3, "input_size": 10}
    )
    data = SimpleNamespace(channels=1, resolution=10)
    problems = reference_problems(model, LowResolution(factor=4), data)
    assert len(problems) == 2
    assert reference_problems(model, None, data) == []
    del model["reference_channels"]  # the constructor's default is 0
    assert reference_problems(model, LowResolution(factor=4), data) == []


@pytest.mark.parametrize(
    ("name", "side", "groups", "latents"),
    [
        # groups and latents a group as published, on square clips
        ("snap_video_500m", 64, 8, 64),
        ("snap_video_3_9b", 64, 8, 96),
        ("snap_video_3_9b_upsampler", 512, 32, 24),
    ],
)
def test_published_recipes_fit_together(name: str, side: int, groups: int, latents: int) -> None:
    words = [f"experiment={name}", "data.root=/nowhere", "data.image_root=/nowhere"]
    cfg = composed("train", words)
    with torch.device("meta"):
        model = instantiate(cfg.model, "model")
    assert model.sample_shape == (3, 16, side, side)
    assert cfg.data.resolution == side
    assert groups * latents == model.config["num_latents"]
    patches = (side // 4) ** 2 // (model.config["group_size"][1] * model.config["group_size"][2])
    assert patches == groups
    objective = instantiate(cfg.objective, "objective")
    # the root of the frames times how much larger than 64 pixels they are
    assert objective.sigma_in == 4.0 * side / 64
    assert objective.self_conditioning == 0.9
    assert instantiate(cfg.optim, "optim").decay_all
    rate = instantiate(cfg.lr_schedule, "lr_schedule").factor
    assert rate(cfg.trainer.max_steps, cfg.trainer.max_steps) == pytest.approx(0.3)
    if model.config["reference_channels"]:
        assert instantiate(cfg.low_resolution, "low_resolution").factor == side // 64


@pytest.mark.slow
def test_from_training_to_samples(tmp_path: Path, command: Any) -> None:
    words = (
        *("debug=smoke", "model=snap_video", "data.num_frames=2", "data.count=32", "batch_size=4"),
        *("data.heldout_count=8", "model.patch_width=16", "model.latent_width=32"),
        *("model.context_width=32", "model.depth=1", "model.global_depth=1", "model.num_latents=8"),
        *("sampler.steps=3", "callbacks.sample_count=2", "trainer.max_steps=3", "optim=lamb"),
    )
    small, large = tmp_path / "small", tmp_path / "large"
    assert command("train", *words, "data.resolution=16", f"run_dir={small}").status == 0
    enlarge = ("data.resolution=32", "model.reference_channels=3", "low_resolution.factor=2")
    answer = command("train", *words, *enlarge, f"run_dir={large}")
    assert answer.status == 0, answer.err
    assert list((large / "samples").glob("step-*.png"))  # of reduced held-out clips
    assert math.isfinite(json.loads((large / "summary.json").read_text())["loss"])

    sampling = ("num_samples=2", "sampler.steps=2", f"run={large}")
    answer = command("sample", *sampling, f"base={small}", f"out_dir={tmp_path / 'one'}")
    assert answer.status == 0, answer.err
    answer = command("sample", *sampling, f"base={small}", f"out_dir={tmp_path / 'two'}")
    assert (tmp_path / "one" / "grid.png").read_bytes() == (
        tmp_path / "two" / "grid.png"
    ).read_bytes()
    answer = command("sample", *sampling, "base=data", f"out_dir={tmp_path / 'three'}")
    assert answer.status == 0, answer.err
    answer = command("sample", *sampling)
    assert answer.status != 0
    assert "Give base=<run of a smaller model>" in answer.err
