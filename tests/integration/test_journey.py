"""Per family: train, resume, sample, evaluate, export, reload. A new family adds one line.

What is the same for all families (formats, places, files without a run) is tested on the first.
"""

from __future__ import annotations

import json
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from genscale.assembly import build
from genscale.cli import import_checkpoint
from genscale.conditioning.base import Conditioning
from genscale.io.images import load_npz
from genscale.io.weights import read_checkpoint
from genscale.pipeline import GenerationPipeline
from genscale.runs import RunFolder, read_jsonl

# family -> the settings that make it small enough for twenty steps in a second
FAMILIES = {
    "dimr": ("model.hidden_sizes=[16,8]", "model.depths=[1,1]", "model.num_heads=2"),
    "dit": ("model.hidden_size=16", "model.depth=1", "model.num_heads=2"),
    "lamamba": (
        *("model.hidden_sizes=[8,16,32,32]", "model.depths=[1,0,0,0]", "model.num_heads=2"),
        "model.window_size=2",
    ),
    "sit": ("model.hidden_size=16", "model.depth=1", "model.num_heads=2"),
    "uvit": (
        *("model.hidden_size=16", "model.depth=3", "model.num_heads=2"),
        "model.skip_scale=geometric",  # which leaves no trace in a state dict
    ),
}
SMALL = ("debug=smoke", "data.resolution=8", "batch_size=8", "sampler.steps=3")


one_family = pytest.mark.parametrize("journey", ["dimr"], indirect=True)


class Journey(NamedTuple):
    """A run that was trained for 20 steps and then resumed to 30."""

    run: Path
    outputs: Path
    family: str


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def journey(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Journey:
    from genscale.cli.app import main

    family = request.param
    outputs = tmp_path_factory.mktemp(family) / "outputs"
    words = [f"model={family}", *FAMILIES[family], *SMALL, f"paths.outputs={outputs}"]
    assert main("train", "genscale.cli.train:run", argv=words) == 0
    more = [*words, "resume=latest", "trainer.max_steps=30"]
    assert main("train", "genscale.cli.train:run", argv=more) == 0
    return Journey((outputs / "latest").resolve(), outputs, family)


def test_one_folder_holds_the_run(journey: Journey) -> None:
    runs = [path for path in (journey.outputs / f"{journey.family}_digits").iterdir()]
    assert runs == [journey.run]  # the resumed run went on in its folder
    assert (journey.outputs / "latest").is_symlink()
    names = {path.name for path in journey.run.iterdir()}
    assert names >= {
        *("config.yaml", "env.json", "metrics.jsonl", "metrics.csv", "checkpoints", "samples"),
        *("export", "summary.json", "report.html"),
    }
    assert list(RunFolder(journey.run).checkpoints()) == [20, 30]  # the newest two are kept
    hidden = [path for path in journey.run.rglob("*") if path.name.startswith(".")]
    assert hidden == []  # no temporary file is left


@one_family
def test_what_was_written_can_be_read(journey: Journey) -> None:
    summary = json.loads((journey.run / "summary.json").read_text())
    assert summary["steps"] == 30
    assert summary["samples_seen"] == 30 * 8
    assert summary["loss"] > 0
    rows = read_jsonl(journey.run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [5, 10, 15, 20, 25, 30]
    assert all(row["seconds"] <= later["seconds"] for row, later in pairwise(rows))
    page = (journey.run / "report.html").read_text()
    assert "<html" in page
    assert "http://" not in page.replace("http://www.w3.org", "")  # nothing is fetched
    environment = json.loads((journey.run / "env.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__


@one_family
def test_sampling_in_every_format(journey: Journey, command: Any, tmp_path: Path) -> None:
    common = (f"run={journey.run}", "num_samples=12", "labels=[3,7]", "seed=5")
    for form in ("grid", "png", "npz"):
        out = tmp_path / form
        answer = command("sample", *common, f"format={form}", f"out_dir={out}")
        assert answer.status == 0, answer.err
        assert "12 samples, 3 network evaluations each" in answer.out
        assert (out / "grid.png").is_file()
        record = json.loads((out / "samples.json").read_text())
        assert record["sampler"]["steps"] == 3
        assert record["weights"] == "ema"
    pictures = sorted(path.name for path in (tmp_path / "png").glob("0*.png"))
    assert pictures[:2] == ["00000_class3.png", "00001_class7.png"]
    assert len(pictures) == 12
    # ADM's layout: uint8 NHWC, grey repeated three times, and the labels
    pixels, labels = load_npz(tmp_path / "npz" / "samples.npz")
    assert pixels.shape == (12, 8, 8, 3)
    assert pixels.dtype == torch.uint8
    assert labels is not None
    assert labels.tolist() == [3, 7] * 6
    pipeline = GenerationPipeline.from_run(journey.run, device="cpu")
    same = pipeline.generate(num_samples=12, labels=[3, 7], seed=5)
    assert torch.equal(same.expand(-1, 3, -1, -1), pixels.permute(0, 3, 1, 2))


@one_family
def test_results_without_out_dir_go_into_the_run(journey: Journey, command: Any) -> None:
    folders = set()
    for _ in range(2):  # within the same second: nothing is overwritten
        assert command("sample", f"run={journey.run}", "num_samples=2").status == 0
    folders = {path for path in (journey.run / "samples").iterdir() if path.is_dir()}
    assert len(folders) == 2
    assert all((folder / "samples.json").is_file() for folder in folders)


def test_settings_of_the_run_can_be_changed_one_by_one(
    journey: Journey, command: Any, tmp_path: Path
) -> None:
    common = (f"run={journey.run}", "num_samples=4", f"out_dir={tmp_path}")
    answer = command("sample", *common, "sampler=heun", "sampler.steps=2", "guidance.scale=3")
    assert answer.status == 0, answer.err
    record = json.loads((tmp_path / "samples.json").read_text())
    assert record["sampler"]["_target_"].endswith(".Heun")
    # Heun takes 2 n - 1 evaluations, guidance two branches each
    assert record["nfe_per_sample"] == 2 * (2 * 2 - 1)


def test_evaluation(journey: Journey, command: Any, tmp_path: Path) -> None:
    words = (f"run={journey.run}", "num_samples=40", "save_samples=true", f"out_dir={tmp_path}")
    answer = command("evaluate", *words, "metrics.metrics=[fd_pixels,label_agreement]")
    assert answer.status == 0, answer.err
    record = json.loads((tmp_path / "metrics.json").read_text())
    metrics = {item["name"]: item for item in record["metrics"]}
    assert set(metrics) == {"fd_pixels", "label_agreement"}
    assert metrics["fd_pixels"]["value"] > 0
    assert 0 <= metrics["label_agreement"]["value"] <= 1
    assert {item["protocol"] for item in metrics.values()} <= set(record["protocols"])
    protocol = record["protocols"][metrics["fd_pixels"]["protocol"]]
    assert protocol["num_samples"] == 40
    assert protocol["nfe"] == 3
    assert "fd_pixels" in answer.out
    pixels, labels = load_npz(tmp_path / "samples.npz")
    assert len(pixels) == 40
    assert labels is not None
    assert labels.tolist() == list(range(10)) * 4


@one_family
def test_files_are_evaluated_without_a_run(journey: Journey, command: Any, tmp_path: Path) -> None:
    for seed in (0, 1):
        words = ("num_samples=20", f"seed={seed}", "format=npz", f"out_dir={tmp_path / str(seed)}")
        assert command("sample", f"run={journey.run}", *words).status == 0
    files = [
        f"{name}={tmp_path / seed}/samples.npz"
        for name, seed in (("samples", "0"), ("reference", "1"))
    ]
    answer = command("evaluate", *files, "metrics.metrics=[fd_pixels]", f"out_dir={tmp_path}")
    assert answer.status == 0, answer.err
    different = json.loads((tmp_path / "metrics.json").read_text())["metrics"][0]["value"]
    files[1] = files[0].replace("samples=", "reference=")
    assert (
        command("evaluate", *files, "metrics.metrics=[fd_pixels]", f"out_dir={tmp_path}").status
        == 0
    )
    same = json.loads((tmp_path / "metrics.json").read_text())["metrics"][0]["value"]
    # a set is no distance from itself, up to the rounding of a float64 matrix root
    assert abs(same) < 1e-6 < different


def test_export_equals_the_run_bit_for_bit(journey: Journey) -> None:
    ours = GenerationPipeline.from_run(journey.run, device="cpu")
    exported = GenerationPipeline.from_pretrained(journey.run / "export", device="cpu")
    for name, value in ours.model.state_dict().items():
        assert torch.equal(value, exported.model.state_dict()[name]), name
    settings = {"num_samples": 6, "labels": [1, 2, 3], "seed": 9}
    assert torch.equal(ours.generate(**settings), exported.generate(**settings))
    assert exported.class_names == ours.class_names == tuple("0123456789")


@one_family
def test_an_exported_folder_is_sampled_like_a_run(
    journey: Journey, command: Any, tmp_path: Path
) -> None:
    for source in ("", "/export"):
        words = ("num_samples=4", "format=npz", f"out_dir={tmp_path}/out{source}")
        answer = command("sample", f"run={journey.run}{source}", *words)
        assert answer.status == 0, answer.err
    one, _ = load_npz(tmp_path / "out" / "samples.npz")
    other, _ = load_npz(tmp_path / "out" / "export" / "samples.npz")
    assert torch.equal(one, other)


def test_raw_and_averaged_weights_are_two_models(journey: Journey) -> None:
    raw = GenerationPipeline.from_run(journey.run, weights="raw", device="cpu")
    average = GenerationPipeline.from_run(journey.run, weights="ema", device="cpu")
    state = read_checkpoint(RunFolder(journey.run).checkpoint())["state_dict"]
    moved = 0
    for name, value in raw.model.state_dict().items():
        assert torch.equal(value, state[f"model.{name}"])
        assert torch.equal(average.model.state_dict()[name], state[f"ema.{name}"])
        moved += not torch.equal(value, average.model.state_dict()[name])
    assert moved > 0
    settings = {"num_samples": 4, "seed": 0}
    assert not torch.equal(raw.generate(**settings), average.generate(**settings))


def test_an_earlier_checkpoint_can_be_sampled(journey: Journey) -> None:
    early = GenerationPipeline.from_run(journey.run, checkpoint=20, device="cpu")
    late = GenerationPipeline.from_run(journey.run, device="cpu")
    settings = {"num_samples": 4, "seed": 0}
    assert not torch.equal(early.generate(**settings), late.generate(**settings))


def predict(pipeline: GenerationPipeline) -> torch.Tensor:
    """Return what the network says of three noisy pictures."""
    x = torch.randn(3, *pipeline.model.sample_shape, generator=torch.Generator().manual_seed(1))
    cond = Conditioning(labels=torch.tensor([0, 7, -1]))
    with torch.no_grad():
        return pipeline.model(x, torch.tensor([0.1, 0.5, 0.9]), cond).sample


def test_a_model_filled_on_the_meta_device_computes_what_a_built_one_does(
    journey: Journey,
) -> None:
    pipeline = GenerationPipeline.from_run(journey.run, device="cpu")
    built = build(RunFolder(journey.run).config()["model"], path="model").eval()
    built.load_state_dict(pipeline.model.state_dict())
    assert [name for name, _ in built.named_buffers()] == [
        name for name, _ in pipeline.model.named_buffers()
    ]
    found = predict(pipeline)
    pipeline.model = built
    assert torch.equal(predict(pipeline), found)


def test_the_export_command_writes_any_weights_of_the_run(
    journey: Journey, command: Any, tmp_path: Path
) -> None:
    which = ("weights=raw", "checkpoint=20")
    answer = command("export", f"run={journey.run}", *which, f"out={tmp_path / 'raw'}")
    assert answer.status == 0, answer.err
    exported = GenerationPipeline.from_pretrained(tmp_path / "raw", device="cpu")
    own = GenerationPipeline.from_run(journey.run, checkpoint=20, weights="raw", device="cpu")
    settings = {"num_samples": 4, "seed": 3}
    assert torch.equal(exported.generate(**settings), own.generate(**settings))


def test_official_files_come_back_by_the_command_on_their_card(
    journey: Journey, command: Any, tmp_path: Path
) -> None:
    official, back = tmp_path / "official", tmp_path / "back"
    answer = command("export", f"run={journey.run}", "layout=official", f"out={official}")
    assert answer.status == 0, answer.err
    same = read_checkpoint(official / "model.pth")
    assert all(
        torch.equal(tensor, same.pop(name))
        for name, tensor in read_checkpoint(official / "model.safetensors").items()
    )
    assert same == {}
    card = (official / "README.md").read_text()
    line = next(x for x in card.splitlines() if x.startswith("python -m genscale.cli.import_check"))
    words = shlex.split(line.replace("<new folder>", str(back)))[3:]
    words = [word.replace("model.safetensors", f"{official}/model.safetensors") for word in words]
    assert import_checkpoint.main(words) == 0
    ours = GenerationPipeline.from_run(journey.run, device="cpu")
    theirs = GenerationPipeline.from_pretrained(back, device="cpu")
    private = {name: value for name, value in ours.model.config.items() if name[0] != "_"}
    assert private.items() <= theirs.model.config.items()
    assert torch.equal(predict(theirs), predict(ours))
