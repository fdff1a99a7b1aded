"""A run from captions to pictures: trained, sampled by prompts, evaluated, exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from genscale.cli.placing import locate
from genscale.cli.texting import (
    caption_problems,
    example_captions,
    pairing_problems,
    text_cache,
    text_sizes,
)
from genscale.conditioning.text import NoText
from genscale.conditioning.words import Words
from genscale.data.base import TensorImages
from genscale.data.module import ImageDataModule
from genscale.errors import ConfigError
from genscale.evaluation import heldout_captions
from genscale.pipeline import GenerationPipeline
from genscale.runs import RunFolder
from tests.cli.conftest import TINY_TEXT


def test_the_run_keeps_example_captions_and_a_grid(text_run: Path) -> None:
    config = RunFolder(text_run).config()
    examples = config["data_info"]["example_captions"]
    assert 1 <= len(examples) <= 8
    assert all(isinstance(text, str) for text in examples)
    assert config["text_encoder"]["_target_"].endswith(".Words")
    assert (text_run / "samples" / "step-00000004.png").is_file()


def test_samples_follow_prompts_and_seed(text_run: Path) -> None:
    pipeline = GenerationPipeline.from_run(text_run, device="cpu")
    assert pipeline.num_classes == 0
    prompts = ["a red circle", "two blue stars"]
    whole = pipeline.generate(num_samples=4, prompts=prompts, batch_size=4)
    parts = list(pipeline.stream(num_samples=4, prompts=prompts, batch_size=1))
    assert torch.equal(whole, torch.cat([part.images for part in parts]))
    assert [part.captions for part in parts] == [(prompts[i % 2],) for i in range(4)]
    assert parts[0].labels is None
    assert len(pipeline.generate(prompts=prompts)) == 2
    # without prompts, the run's own examples
    (first,) = pipeline.stream(num_samples=1)
    assert first.captions == pipeline.example_captions[:1]


def test_other_prompts_make_other_pictures(text_run: Path) -> None:
    pipeline = GenerationPipeline.from_run(text_run, device="cpu")
    model = pipeline.model
    with torch.no_grad():  # four steps leave what text adds near its silent start
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    one = pipeline.generate(prompts=["a red circle"])
    assert not torch.equal(one, pipeline.generate(prompts=["two blue stars"]))
    led = pipeline.generate(prompts=["a red circle"], negative_prompt="two blue stars")
    assert not torch.equal(one, led)


def test_an_exported_folder_reads_prompts_too(text_run: Path) -> None:
    run = GenerationPipeline.from_run(text_run, device="cpu")
    exported = GenerationPipeline.from_pretrained(text_run / "export", device="cpu")
    prompts = ["a red circle"]
    assert torch.equal(run.generate(prompts=prompts), exported.generate(prompts=prompts))


def test_sampling_writes_prompts_into_names_and_record(
    text_run: Path, tmp_path: Path, command: Any
) -> None:
    prompts = tmp_path / "wishes.txt"
    prompts.write_text("a red circle\ntwo blue stars left of a ring\n")
    answer = command(
        "sample", f"run={text_run}", f"prompts={prompts}", "num_samples=3", "format=png",
        "negative_prompt=a cross", f"out_dir={tmp_path / 'out'}",
    )  # fmt: skip
    assert answer.status == 0, answer.err
    names = sorted(path.name for path in (tmp_path / "out").glob("0*.png"))
    assert names == [
        "00000_a-red-circle.png",
        "00001_two-blue-stars-left-of-a-ring.png",
        "00002_a-red-circle.png",
    ]
    record = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert record["prompts"] == ["a red circle", "two blue stars left of a ring"]
    assert record["negative_prompt"] == "a cross"
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.height > 96 + 2 * 4  # text below the pictures


def test_a_single_prompt_with_blanks(text_run: Path, tmp_path: Path, command: Any) -> None:
    answer = command(
        "sample", f"run={text_run}", "prompts=three red circles", "num_samples=1",
        f"out_dir={tmp_path}",
    )  # fmt: skip
    assert answer.status == 0, answer.err
    assert json.loads((tmp_path / "samples.json").read_text())["prompts"] == ["three red circles"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["prompts=''"], r"Prompt 1 of 1 ('') is empty"),
        (["labels=[3]"], "labels=[3] was given, but the model reads prompts, not classes"),
        (["negative_prompt=x", "guidance.scale=1"], "without guidance nothing leads away"),
        (["text_encoder=minilm"], "model.text_size=8, but text_encoder=minilm gives 384"),
        (["text_encoder=none"], "model.text_size=8, but text_encoder=none gives 0"),
    ],
)
def test_what_cannot_be_sampled_is_told(
    text_run: Path, command: Any, words: list[str], sentence: str
) -> None:
    answer = command("sample", f"run={text_run}", "num_samples=1", *words)
    assert answer.status == 1
    assert sentence in " ".join(answer.err.split())
    assert "Traceback" not in answer.err


def test_prompts_for_a_model_of_classes_are_refused(trained_run: Path, command: Any) -> None:
    answer = command("sample", f"run={trained_run}", "prompts=a circle", "num_samples=1")
    assert answer.status == 1
    assert "prompts was given, but the model reads no text" in " ".join(answer.err.split())
    answer = command("sample", f"run={trained_run}", "text_encoder=words", "num_samples=1")
    assert answer.status == 1
    assert "the model reads no text" in " ".join(answer.err.split())


def test_evaluation_takes_held_out_captions(text_run: Path, tmp_path: Path, command: Any) -> None:
    answer = command(
        "evaluate", f"run={text_run}", "num_samples=10", "metrics=quick",
        "metrics.metrics=[copy_rate]", f"out_dir={tmp_path}",
    )  # fmt: skip
    assert answer.status == 0, answer.err
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert record["prompts"] == "held-out captions"
    (protocol,) = record["protocols"].values()
    assert protocol["class_law"] == "heldout_captions"


def test_captions_to_measure_by_are_held_out() -> None:
    pixels = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    train = TensorImages(pixels, captions=["a", "b"], name="set")
    heldout = TensorImages(pixels, captions=["c", "d"], name="set")
    assert heldout_captions(ImageDataModule(train, heldout, batch_size=1), 9) == ["c", "d"]
    assert heldout_captions(ImageDataModule(train, batch_size=1), 1) == ["a"]
    plain = TensorImages(pixels, name="set")
    assert heldout_captions(ImageDataModule(plain, batch_size=1), 9) is None


def test_interrupted_equals_uninterrupted(text_run: Path, tmp_path: Path, command: Any) -> None:
    copy = tmp_path / "outputs" / "again"
    shutil.copytree(text_run, copy)
    whole = torch.load(copy / "checkpoints" / "step-00000004.ckpt", weights_only=True)
    (copy / "checkpoints" / "step-00000004.ckpt").unlink()
    answer = command("train", *TINY_TEXT, f"run_dir={copy}", "resume=latest")
    assert answer.status == 0, answer.err
    resumed = torch.load(copy / "checkpoints" / "step-00000004.ckpt", weights_only=True)
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name


def test_a_run_older_than_text_encoders_goes_on(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GENSCALE_RUN_DIR", "")
    copy = RunFolder(tmp_path / "run")
    shutil.copytree(trained_run, copy.path)
    config = copy.config()
    now = OmegaConf.create({**config, "resume": "latest", "run_dir": str(copy.path)})
    assert config.pop("text_encoder")["token_size"] == 0
    copy.config_file.write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    _, checkpoint = locate(now)
    assert checkpoint == copy.checkpoint("latest")
    now.text_encoder = {"_target_": "genscale.conditioning.words.Words"}
    with pytest.raises(ConfigError, match=r"text_encoder\._target_=genscale\.conditioning\.text"):
        locate(now)


class TestStartUp:
    def test_data_without_captions_is_refused(self, command: Any, tmp_path: Path) -> None:
        words = [word for word in TINY_TEXT if not word.startswith("data")]
        answer = command("train", *words, "data=digits", f"paths.outputs={tmp_path}")
        assert answer.status == 1
        assert "The model reads captions, but data 'digits' has none" in " ".join(
            answer.err.split()
        )

    def test_model_and_encoder_must_go_together(self) -> None:
        model = OmegaConf.create({"_target_": "genscale.backbones.dit.DiT", "text_size": 64})
        assert text_sizes(model) == {"text_size": 64, "num_text_tokens": 32, "pooled_text_size": 0}
        assert pairing_problems(model, Words()) == []
        (problem,) = pairing_problems(model, NoText())
        assert "but text_encoder=none encodes none" in problem
        (problem,) = pairing_problems(model, Words(num_tokens=9))
        assert "model.num_text_tokens=32, but text_encoder=words gives 9" in problem
        plain = OmegaConf.create({"_target_": "genscale.backbones.dit.DiT"})
        assert pairing_problems(plain, NoText()) == []
        (problem,) = pairing_problems(plain, Words())
        assert "text_encoder=words was given, but the model reads no text" in problem

    def test_an_encoder_is_built_where_text_is_read(self) -> None:
        node = {"_target_": "genscale.conditioning.words.Words"}
        model = {"_target_": "genscale.backbones.dit.DiT"}
        cfg = OmegaConf.create({"model": model, "text_encoder": node})
        assert text_cache(cfg) is None
        cfg.model = {**model, "pooled_text_size": 64}
        cache = text_cache(cfg)
        assert cache is not None
        assert isinstance(cache.encoder, Words)

    def module(self, captions: list[str] | None) -> ImageDataModule:
        pixels = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
        return ImageDataModule(TensorImages(pixels, captions=captions, name="set"), batch_size=1)

    def test_captions_are_read_before_training(self) -> None:
        encoder = Words(num_tokens=4)
        assert caption_problems(encoder, self.module(["a", "b", "c"])) == []
        (problem,) = caption_problems(encoder, self.module(["a", "", "c"]))
        assert problem.startswith("In 'set', caption 2 of 3 ('') is empty")
        (problem,) = caption_problems(encoder, self.module(["a", "b", "a b c d"]))
        assert problem.startswith("In 'set', caption 3 of 3 ('a b c d') has 5 tokens")
        assert "has none" in caption_problems(encoder, self.module(None))[0]

    def test_examples_are_distinct(self) -> None:
        assert example_captions(self.module(["a", "b", "a"])) == ["a", "b"]
        assert example_captions(self.module(None)) is None

    def test_an_unknown_encoder_is_named(self, command: Any, tmp_path: Path) -> None:
        answer = command("train", "text_encoder=minilmm", f"paths.outputs={tmp_path}")
        assert answer.status == 1
        assert "Did you mean 'minilm'?" in answer.err
