"""A run of clips on the command line: trained, sampled in every format, measured, searched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from genscale.cli.sample import shown_rate
from genscale.cli.sample_files import (
    CLIP_FORMATS,
    PICTURE_FORMATS,
    check_format,
    known_format,
    write_samples,
)
from genscale.errors import ConfigError
from genscale.io.images import channels_first, load_npz
from genscale.io.video import contact_sheet
from genscale.pipeline import GenerationPipeline
from genscale.runs import RunFolder

PROMPTS = 'prompts=["a red circle moving right","a still blue square"]'


@pytest.fixture
def run(clip_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clip_run, tmp_path / "run"))


def test_training_leaves_sheets_that_play_and_a_report(clip_run: Path) -> None:
    info = RunFolder(clip_run).config()["data_info"]
    assert (info["num_frames"], info["frame_rate"]) == (4, 8.0)
    sheet = clip_run / "samples" / "step-00000004.png"
    with Image.open(sheet.with_suffix(".webp")) as film:
        assert film.n_frames == 4
    pipeline = GenerationPipeline.from_run(clip_run, device="cpu")
    assert pipeline.frame_rate == 8.0
    clips = pipeline.generate(num_samples=2, seed=0)
    drawn = contact_sheet(clips, captions=list(pipeline.example_captions[:2]))
    assert np.array_equal(np.asarray(Image.open(sheet)), np.asarray(drawn))
    page = (clip_run / "report.html").read_text()
    assert page.count("data:image/webp") == page.count("data:image/png") == 2


class TestFormats:
    def test_all_hold_the_same_clips(self, command: Any, clip_run: Path, tmp_path: Path) -> None:
        pytest.importorskip("av")
        for name in CLIP_FORMATS[1:]:
            out = tmp_path / name
            words = (f"run={clip_run}", "num_samples=2", PROMPTS, f"format={name}")
            answer = command("sample", *words, f"out_dir={out}")
            assert answer.status == 0, answer.err
            assert (out / "grid.png").is_file()
            assert (out / "grid.webp").is_file()
        arrays, labels = load_npz(tmp_path / "npz" / "samples.npz")
        assert arrays.shape == (2, 4, 16, 16, 3)
        assert labels is None
        stem = "00001_a-still-blue-square"
        for number in range(4):
            frame = Image.open(tmp_path / "png" / stem / f"{number:03d}.png")
            assert np.array_equal(np.asarray(frame), arrays[1, number])
        with Image.open(tmp_path / "webp" / f"{stem}.webp") as film:
            film.seek(3)
            assert np.array_equal(np.asarray(film.convert("RGB")), arrays[1, 3])
            assert film.info["duration"] == 125
        assert (tmp_path / "gif" / f"{stem}.gif").stat().st_size > 0
        assert (tmp_path / "mp4" / f"{stem}.mp4").stat().st_size > 0

    def test_a_frame_rate_is_asked_for_and_shown(
        self, command: Any, clip_run: Path, tmp_path: Path
    ) -> None:
        found = {}
        for rate in ("8", "4", "inf"):
            out = tmp_path / rate
            words = (f"run={clip_run}", "num_samples=1", "format=npz", f"frame_rate={rate}")
            assert command("sample", *words, f"out_dir={out}").status == 0
            record = json.loads((out / "samples.json").read_text())
            with Image.open(out / "grid.webp") as film:
                film.load()
                lasting = film.info["duration"]
            found[rate] = (record["num_frames"], record["frame_rate"], lasting)
        # still pictures have no pace of their own
        assert found == {"8": (4, 8.0, 125), "4": (4, 4.0, 250), "inf": (4, "inf", 125)}
        arrays = [load_npz(tmp_path / rate / "samples.npz")[0] for rate in found]
        assert not torch.equal(arrays[0], arrays[1])
        assert not torch.equal(arrays[0], arrays[2])

    @pytest.mark.parametrize(
        ("words", "sentence"),
        [
            (["format=mp3"], "format must be one of grid, png, npz, webp, gif, mp4, but 'mp3'"),
            (["frame_rate=0"], "frame_rate must be a number above 0"),
            (["frame_rate=fast"], "frame_rate must be a number above 0"),
            (
                ["search=best_of_n", "reward=scenes_soft", "same_reward=true"],
                "judges pictures, but",
            ),
            (["reward=scenes_soft", "reward_frames=max"], "reward_frames=max is unknown"),
        ],
    )
    def test_mistakes(
        self, command: Any, clip_run: Path, tmp_path: Path, words: list[str], sentence: str
    ) -> None:
        answer = command("sample", f"run={clip_run}", f"out_dir={tmp_path / 'o'}", *words)
        assert answer.status == 1
        assert sentence in answer.err
        assert "Traceback" not in answer.err
        assert not (tmp_path / "o").exists()

    @pytest.mark.parametrize("words", [["format=mp4"], ["frame_rate=8"], ["reward_frames=mean"]])
    def test_pictures_are_no_clips(
        self, command: Any, trained_run: Path, tmp_path: Path, words: list[str]
    ) -> None:
        reward = ["reward=label_agreement"] if words == ["reward_frames=mean"] else []
        answer = command("sample", f"run={trained_run}", f"out_dir={tmp_path}", *words, *reward)
        assert answer.status == 1
        assert "pictures" in answer.err
        assert "Traceback" not in answer.err


def test_records_hold_rates_that_json_has_words_for() -> None:
    rates = [None, 8.0, float("inf")]
    assert [shown_rate(SimpleNamespace(frame_rate=rate)) for rate in rates] == [None, 8.0, "inf"]


def test_formats_are_known_by_name() -> None:
    for name in CLIP_FORMATS:
        known_format(name)
    with pytest.raises(ConfigError, match=r"'giff' was given. Did you mean 'gif'"):
        known_format("giff")


def test_pictures_are_written_as_before(tmp_path: Path) -> None:
    assert CLIP_FORMATS[:3] == PICTURE_FORMATS
    check_format("png", clips=False)
    pictures = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    labels = torch.tensor([7, -1])
    assert write_samples("png", tmp_path, pictures, labels, None) == tmp_path
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000_class7.png", "00001.png"]
    assert write_samples("npz", tmp_path, pictures, labels, None) == tmp_path / "samples.npz"
    assert load_npz(tmp_path / "samples.npz")[1] is None  # not all are known


class TestEvaluation:
    WORDS = ("num_samples=4", "metrics=video", "batch_size=4")

    def test_a_run_of_clips(self, command: Any, run: Path, tmp_path: Path) -> None:
        answer = command("evaluate", f"run={run}", *self.WORDS, "save_samples=true")
        assert answer.status == 0, answer.err
        (folder,) = (run / "evaluations").iterdir()
        record = json.loads((folder / "metrics.json").read_text())
        assert (record["num_frames"], record["frame_rate"]) == (4, 8.0)
        clips = [each["clips"] for each in record["protocols"].values()]
        assert clips
        assert {(each["frame_rate"], each["size"]) for each in clips} == {(8.0, "16x16")}
        assert (folder / "grid.webp").is_file()
        # the files say the same as the samples they hold
        file = folder / "samples.npz"
        out = tmp_path / "files"
        words = (f"samples={file}", f"reference={file}", "metrics=video", f"out_dir={out}")
        answer = command("evaluate", *words, "frame_rate=8")
        assert answer.status == 0, answer.err
        again = json.loads((out / "metrics.json").read_text())
        before = {each["name"]: each["value"] for each in record["metrics"]}
        after = {each["name"]: each["value"] for each in again["metrics"]}
        assert after["temporal_flickering"] == before["temporal_flickering"]
        assert after["fd_frames"] == pytest.approx(0.0, abs=1e-6)
        pixels = channels_first(load_npz(file)[0])
        expected = GenerationPipeline.from_run(run, device="cpu").generate(
            num_samples=4, prompts=held_out(run, 4), batch_size=4
        )
        assert torch.equal(pixels, expected)

    def test_metrics_of_pictures_are_refused(self, command: Any, run: Path) -> None:
        answer = command("evaluate", f"run={run}", "num_samples=4", "metrics=quick")
        assert answer.status == 1
        assert "metrics=video" in answer.err
        assert "Traceback" not in answer.err


def held_out(run: Path, count: int) -> list[str]:
    from genscale.cli.loading import datasets_of
    from genscale.evaluation import heldout_captions

    captions = heldout_captions(datasets_of(str(run)), count)
    assert captions is not None
    return captions


class TestSearch:
    JUDGES = """
def motion(clips, requests):
    return (clips[:, :, 1:] - clips[:, :, :-1]).abs().mean((1, 2, 3, 4))

def red(pictures, requests):
    return pictures[:, 0].mean((1, 2)) - pictures[:, 1].mean((1, 2))
"""

    @pytest.fixture
    def words(self, tmp_path: Path) -> tuple[str, ...]:
        judges = tmp_path / "judges.py"
        judges.write_text(self.JUDGES)
        return (
            "reward=function",
            f"reward.function={judges}:motion",
            "reward.clips=true",
            "held_out=function",
            f"held_out.function={judges}:red",
            "reward_frames=mean",
        )

    def test_clips_are_found_by_what_they_do(
        self, command: Any, clip_run: Path, words: tuple[str, ...], tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        of_run = (f"run={clip_run}", "num_samples=2", PROMPTS, "format=npz", f"out_dir={out}")
        answer = command("sample", *of_run, "search=best_of_n", "search.samples=3", *words)
        assert answer.status == 0, answer.err
        record = json.loads((out / "search.json").read_text())
        clips = channels_first(load_npz(out / "samples.npz")[0]).float() / 255
        motion = (clips[:, :, 1:] - clips[:, :, :-1]).abs().mean((1, 2, 3, 4))
        red = (clips[:, 0] - clips[:, 1]).mean((1, 2, 3))
        for row, sample in enumerate(record["samples"]):
            # of 8-bit clips rather than of floats
            assert sample["rewards"]["reward"] == pytest.approx(float(motion[row]), abs=0.004)
            (held,) = sample["held_out"].values()
            assert held == pytest.approx(float(red[row]), abs=0.004)
        for before, after in zip(record["samples_before"], record["samples"], strict=True):
            assert after["rewards"]["reward"] >= before["rewards"]["reward"]
        page = (out / "search.html").read_text()
        assert page.count("data:image/webp") == page.count("data:image/png") == 2

    def test_a_scaling_study_shows_what_plays(
        self, command: Any, clip_run: Path, words: tuple[str, ...], tmp_path: Path
    ) -> None:
        out = tmp_path / "study"
        study = ("methods=[best_of_n]", "budgets=[2]", "seeds=[0]", "num_prompts=2")
        answer = command("scaling", f"run={clip_run}", *study, *words, f"out_dir={out}")
        assert answer.status == 0, answer.err
        assert len(list((out / "cells").glob("*.webp"))) == 2
        assert (out / "scaling.html").read_text().count("data:image/webp") == 2


class TestMisfits:
    @pytest.mark.parametrize(
        ("words", "sentence"),
        [
            (["model=snap_video", "data=scenes"], "makes clips, but data=scenes holds pictures"),
            (["model=dit_text", "data=moving_sprites"], "holds clips of 8 frames, but DiT makes"),
            (
                ["model=snap_video", "model.input_size=[4,32,32]"],
                "begins with 4 frames, but the clips of data 'moving_sprites' have 8",
            ),
        ],
    )
    def test_models_and_data_that_do_not_fit(
        self, command: Any, tmp_path: Path, words: list[str], sentence: str
    ) -> None:
        tiny = ["text_encoder=words", "data.count=24", "data.heldout_count=8"]
        answer = command("train", *words, *tiny, f"paths.outputs={tmp_path}")
        assert answer.status == 1
        assert sentence in answer.err
        assert "Traceback" not in answer.err
