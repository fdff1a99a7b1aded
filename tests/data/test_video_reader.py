"""Readers of videos: the frames that a player would show, and one sentence for what cannot be."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genscale.data import video_reader
from genscale.data.video_files import find_videos, needs_decoder, size_of
from genscale.data.video_frames import (
    AnimationReader,
    ArrayReader,
    FolderReader,
    frame_files,
    open_frames,
)
from genscale.data.video_reader import (
    PyAVReader,
    TorchCodecReader,
    Unreadable,
    VideoInfo,
    VideoReader,
    decoder,
    open_video,
)
from genscale.errors import DataError
from tests.data.videos import damage, grey, lay_on_its_side, numbers, write_sound, write_video

VARIABLE = [0.0, 0.1, 0.15, 0.9, 1.0, 1.01, 1.8, 1.9]


def read(path: Path, times: list[float], **options: object) -> list[int]:
    with open_video(path, backend="pyav", **options) as reader:  # type: ignore[arg-type]
        return numbers(reader.frames(times))


class TestMoments:
    @pytest.mark.parametrize(
        ("ending", "codec"),
        [
            ("mp4", "mpeg4"),
            ("mp4", "libx264"),
            ("mkv", "mpeg4"),
            ("webm", "libvpx"),
            ("avi", "mpeg4"),
        ],
    )
    @pytest.mark.parametrize("exact", [True, False])
    def test_a_frame_is_shown_until_the_next_begins(
        self, tmp_path: Path, ending: str, codec: str, exact: bool
    ) -> None:
        video = write_video(tmp_path / f"a.{ending}", 20, rate=10, codec=codec)
        with PyAVReader(video, exact=exact) as reader:
            assert (reader.info.height, reader.info.width) == (32, 48)
            assert reader.info.duration == pytest.approx(2.0, abs=0.02)
            assert reader.info.frame_rate == pytest.approx(10.0, rel=0.01)
            assert numbers(reader.frames([0.05, 0.12, 0.18, 1.95])) == [0, 1, 1, 19]
            assert reader.frames([]).shape == (0, 3, 32, 48)

    def test_moments_come_in_any_order_and_often(self, tmp_path: Path) -> None:
        video = write_video(tmp_path / "a.mp4")
        assert read(video, [1.55, 0.05, 1.55, 0.95, 0.01]) == [15, 0, 15, 9, 0]

    def test_frames_of_variable_length(self, tmp_path: Path) -> None:
        video = write_video(tmp_path / "a.mp4", times=VARIABLE, codec="libx264")
        moments = [0.05, 0.12, 0.5, 0.95, 1.005, 1.5, 1.85, 1.92]
        assert read(video, moments) == [0, 1, 2, 3, 4, 5, 6, 7]
        with PyAVReader(video) as reader:  # and not 8 frames at an even rate
            assert reader.info.duration > 1.9

    def test_a_camera_on_its_side_is_turned(self, tmp_path: Path) -> None:
        video = lay_on_its_side(write_video(tmp_path / "a.mp4"))
        with PyAVReader(video) as reader:
            frame = reader.frames([0.95])[0].float()
            assert (reader.info.height, reader.info.width) == (48, 32) == tuple(frame.shape[1:])
        # clockwise: what was left is on top now
        assert float(frame[:, :20].mean() - frame[:, 28:].mean()) == pytest.approx(4.0, abs=1.5)

    @pytest.mark.skipif(
        video_reader._torchcodec_problem() is not None, reason="torchcodec cannot be loaded here"
    )
    def test_both_decoders_give_the_same_pixels(self, tmp_path: Path) -> None:
        video = write_video(tmp_path / "a.mp4", times=VARIABLE, codec="libx264")
        moments = [0.05, 0.12, 0.5, 0.95, 1.85, 0.05]
        with PyAVReader(video) as ours, TorchCodecReader(video) as theirs:
            assert torch.equal(ours.frames(moments), theirs.frames(moments))
            assert ours.info.duration == pytest.approx(theirs.info.duration)


class TestWithoutDecoder:
    @pytest.mark.parametrize("ending", ["gif", "webp", "apng"])
    def test_animated_pictures(self, tmp_path: Path, ending: str) -> None:
        frames = [Image.fromarray(grey(i)) for i in range(5)]
        kind = "PNG" if ending == "apng" else ending.upper()
        options = {"lossless": True} if ending == "webp" else {}
        file = tmp_path / f"a.{ending}"
        durations = [100, 200, 100, 100, 50]
        frames[0].save(
            file, kind, save_all=True, append_images=frames[1:], duration=durations, **options
        )
        with open_video(file, backend="pillow") as reader:
            assert isinstance(reader, AnimationReader)
            assert reader.info == VideoInfo(32, 48, pytest.approx(0.55), pytest.approx(5 / 0.55))
            assert numbers(reader.frames([0.52, 0.05, 0.15, 0.28, 0.35])) == [4, 0, 1, 1, 2]

    def test_hasty_frames_are_shown_for_a_tenth_of_a_second_as_in_browsers(
        self, tmp_path: Path
    ) -> None:
        frames = [Image.fromarray(grey(i)) for i in range(4)]
        frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=0)
        with open_video(tmp_path / "a.gif") as reader:
            assert reader.info.duration == pytest.approx(0.4)

    def test_a_still_picture_is_a_video_of_one_frame(self, tmp_path: Path) -> None:
        Image.fromarray(grey(3)).save(tmp_path / "a.webp", lossless=True)
        with open_video(tmp_path / "a.webp") as reader:
            assert numbers(reader.frames([0.0, 0.09])) == [3, 3]

    def test_arrays(self, tmp_path: Path) -> None:
        clip = np.stack([grey(i) for i in range(6)])
        np.save(tmp_path / "a.npy", clip)
        np.save(tmp_path / "b.npy", clip[..., 0])
        np.savez(tmp_path / "c.npz", video=clip, fps=np.float32(3))
        with open_video(tmp_path / "a.npy", assumed_rate=2.0) as reader:
            assert isinstance(reader, ArrayReader)
            assert reader.info == VideoInfo(32, 48, 3.0, 2.0)
            assert torch.equal(
                reader.frames([0.1, 2.9]), torch.from_numpy(clip[[0, 5]]).permute(0, 3, 1, 2)
            )
        with open_video(tmp_path / "b.npy") as reader:
            assert reader.frames([0.1]).shape == (1, 3, 32, 48)
        with open_video(tmp_path / "c.npz", assumed_rate=99.0) as reader:
            assert reader.info == VideoInfo(32, 48, 2.0, 3.0)  # what the file says wins

    def test_folders_of_frames_go_by_the_numbers_in_names(self, tmp_path: Path) -> None:
        for number in range(12):
            Image.fromarray(grey(number)).save(tmp_path / f"f{number}.png")
        with open_video(tmp_path, assumed_rate=4.0) as reader:
            assert isinstance(reader, FolderReader)
            assert isinstance(reader, VideoReader)
            assert [f.name for f in frame_files(tmp_path)][1:3] == ["f1.png", "f2.png"]
            assert reader.info == VideoInfo(32, 48, 3.0, 4.0)
            assert numbers(reader.frames([0.6, 2.6])) == [2, 10]
        Image.fromarray(grey(0, 16, 16)).save(tmp_path / "f3.png")
        with open_video(tmp_path) as reader, pytest.raises(DataError, match=r"f3\.png.*16 x 16"):
            reader.frames([3.1 / 25])


class TestWhatCannotBeRead:
    """One sentence each, with the file's name."""

    def refused(self, path: Path, match: str) -> None:
        with pytest.raises(Unreadable, match=match) as caught:
            open_video(path, backend="pyav")
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_empty_missing_and_foreign_files(self, tmp_path: Path) -> None:
        for name in ("a.mp4", "a.gif", "a.npy"):
            (tmp_path / name).write_bytes(b"")
            self.refused(tmp_path / name, "it has no bytes")
            self.refused(tmp_path / f"no_{name}", "it is gone")
            (tmp_path / name).write_bytes(b"hello" * 50)
            self.refused(tmp_path / name, "cannot be read as a video")
        (tmp_path / "folder").mkdir()
        self.refused(tmp_path / "folder", "holds no frames")
        (tmp_path / "a.txt").write_text("x")
        with pytest.raises(DataError, match="does not end as a video does"):
            open_frames(tmp_path / "a.txt", 25.0)

    def test_sound_alone(self, tmp_path: Path) -> None:
        self.refused(write_sound(tmp_path / "a.mp4"), "it holds no pictures, only audio")

    def test_wrong_arrays(self, tmp_path: Path) -> None:
        np.save(tmp_path / "a.npy", np.zeros((4, 8, 8, 3), np.float32))
        self.refused(tmp_path / "a.npy", r"float32 \(4, 8, 8, 3\), and uint8 \(T, H, W, 3\)")
        np.savez(tmp_path / "b.npz", np.zeros((2, 4, 8, 8, 3), np.uint8))
        self.refused(tmp_path / "b.npz", "was expected")
        np.savez(tmp_path / "c.npz", video=np.zeros((4, 8, 8, 3), np.uint8), fps=0)
        self.refused(tmp_path / "c.npz", "0.0 frames a second")

    def test_a_file_without_its_end(self, tmp_path: Path) -> None:
        video = write_video(tmp_path / "a.mp4")
        video.write_bytes(video.read_bytes()[:-500])  # where mp4 has its index
        self.refused(video, "cannot be read as a video")

    def test_damage_in_the_middle_is_told_where_it_is_met(self, tmp_path: Path) -> None:
        video = damage(write_video(tmp_path / "a.mp4", 40, codec="libx264"), length=300)
        with (
            PyAVReader(video) as reader,
            pytest.raises(Unreadable, match=r"a\.mp4 cannot be read as a video"),
        ):
            reader.frames([0.05, 3.95])

    def test_a_header_that_promises_too_much(self, tmp_path: Path) -> None:
        video = write_video(tmp_path / "a.mp4", 20)
        with PyAVReader(video) as reader:
            reader.info = VideoInfo(32, 48, 9.0, 10.0)
            with pytest.raises(Unreadable, match=r"ends after 2\.00 s, and its header says 9\.00"):
                reader.frames([0.05, 5.0])

    def test_the_error_survives_the_way_from_a_reading_process(self) -> None:
        import pickle

        error = pickle.loads(pickle.dumps(Unreadable(Path("a.mp4"), "it is gone.")))
        assert (error.path, error.why) == (Path("a.mp4"), "it is gone")


class TestDecoders:
    def test_auto_takes_torchcodec_where_it_loads_and_pyav_else(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert decoder("pyav") == "pyav"
        monkeypatch.setattr(video_reader, "_torchcodec_problem", lambda: None)
        assert decoder("auto") == decoder("torchcodec") == "torchcodec"
        monkeypatch.setattr(video_reader, "_torchcodec_problem", lambda: "no FFmpeg")
        assert decoder("auto") == "pyav"
        with pytest.raises(ImportError, match=r"torchcodec cannot be loaded \(no FFmpeg\)"):
            decoder("torchcodec")

    def test_without_any_the_sentence_says_what_to_install(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        video = write_video(tmp_path / "a.mp4", 2)
        monkeypatch.setattr(video_reader, "_torchcodec_problem", lambda: "it is not installed")
        monkeypatch.setitem(sys.modules, "av", None)
        with pytest.raises(ImportError, match=r'pip install "genscale\[video\]"'):
            open_video(video)
        with pytest.raises(ImportError, match=r"data\.backend=pillow reads animated pictures"):
            open_video(video, backend="pillow")


class TestFinding:
    def test_files_arrays_and_folders_of_frames(self, tmp_path: Path) -> None:
        for name in (
            "b/x.MP4",
            "b/x.txt",
            "a.gif",
            "c/d/1.png",
            "c/d/2.png",
            "b/cover.jpg",
            ".h.mp4",
        ):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"12")
        paths, others = find_videos(tmp_path)
        assert paths == ["a.gif", "b/x.MP4", "c/d"]
        assert others == {".jpg": 1}  # a picture beside a video is no frame
        assert size_of(tmp_path / "c/d") == (2, 4)
        assert needs_decoder(paths)
        assert not needs_decoder(["a.gif", "c/d"])
        assert find_videos(tmp_path / "c/d")[0] == ["."]
        with pytest.raises(DataError, match="and is gone"):
            size_of(tmp_path / "z.mp4")

    def test_folders_without_videos(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="There is no folder"):
            find_videos(tmp_path / "no")
        (tmp_path / "a.txt").write_text("x")
        (tmp_path / "a.wav").write_text("x")
        with pytest.raises(DataError, match=r"holds no videos .*found: 1 \.wav"):
            find_videos(tmp_path)
        (tmp_path / "again").symlink_to(tmp_path)
        with pytest.raises(DataError, match="would count twice"):
            find_videos(tmp_path)
