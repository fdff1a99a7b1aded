"""Clips as files: what plays shows every frame for as long as it should; sheets are in order."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from genscale.io.images import grid_image, save_grid, to_pil
from genscale.io.video import (
    DEFAULT_RATE,
    PLAYERS,
    contact_sheet,
    fit_width,
    is_clips,
    playback_rate,
    require_mp4,
    save_animated_grid,
    save_frames,
    save_gif,
    save_mp4,
    save_overview,
    save_webp,
)


@pytest.fixture
def clip() -> Tensor:
    """A red bar that moves right on grey, ``(3, 6, 9, 11)``: odd sides, no two frames alike."""
    pixels = torch.full((3, 6, 9, 11), 90, dtype=torch.uint8)
    for number in range(6):
        pixels[0, number, :, number : number + 3] = 250
    return pixels


def played(path: Path) -> tuple[np.ndarray, list[int]]:
    """Return the frames ``(T, H, W, 3)`` of a file and the milliseconds that each lasts."""
    frames, lasting = [], []
    with Image.open(path) as film:
        for number in range(film.n_frames):
            film.seek(number)
            film.load()
            frames.append(np.asarray(film.convert("RGB")))
            lasting.append(int(film.info["duration"]))
        assert film.info["loop"] == 0  # for ever
    return np.stack(frames), lasting


def test_clips_are_told_by_their_axes(clip: Tensor) -> None:
    assert is_clips(clip[None])
    assert not is_clips(clip)


@pytest.mark.parametrize("rate", [None, float("inf"), float("nan"), 0.0, -1.0])
def test_what_has_no_known_pace_plays_at_eight_frames_a_second(rate: float | None) -> None:
    assert playback_rate(rate) == DEFAULT_RATE == 8.0
    assert playback_rate(29.97) == 29.97


class TestFilms:
    def test_webp_keeps_every_pixel_and_the_pace(self, clip: Tensor, tmp_path: Path) -> None:
        save_webp(tmp_path / "clip.webp", clip, 30.0)
        frames, lasting = played(tmp_path / "clip.webp")
        assert np.array_equal(frames, clip.permute(1, 2, 3, 0).numpy())
        assert lasting == [33, 34, 33, 33, 34, 33]  # 200 ms in whole milliseconds

    def test_a_quality_makes_it_smaller_and_inexact(self, tmp_path: Path) -> None:
        noise = torch.randint(256, (3, 4, 32, 32), dtype=torch.uint8)
        sizes = []
        for quality in (None, 40):
            path = tmp_path / f"{quality}.webp"
            save_webp(path, noise, quality=quality)
            sizes.append(path.stat().st_size)
            exact = np.array_equal(played(path)[0], noise.permute(1, 2, 3, 0).numpy())
            assert exact == (quality is None)
        assert sizes[1] < sizes[0] / 2

    def test_gif_counts_hundredths_without_drift(self, clip: Tensor, tmp_path: Path) -> None:
        save_gif(tmp_path / "clip.gif", clip, 30.0)
        frames, lasting = played(tmp_path / "clip.gif")
        assert lasting == [30, 40, 30, 30, 40, 30]
        # two colours are few enough for a palette
        assert np.array_equal(frames, clip.permute(1, 2, 3, 0).numpy())

    def test_mp4_is_h264_of_even_sides(self, clip: Tensor, tmp_path: Path) -> None:
        av = pytest.importorskip("av")
        save_mp4(tmp_path / "clip.mp4", clip, 12.5)
        with av.open(str(tmp_path / "clip.mp4")) as film:
            stream = film.streams.video[0]
            assert (stream.codec.name, stream.width, stream.height) == ("h264", 12, 10)
            assert float(stream.average_rate) == 12.5
            frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(stream)]
        assert len(frames) == 6
        expected = clip.permute(1, 2, 3, 0).numpy().astype(int)
        # grey levels survive; colour has half the resolution
        assert abs(np.stack(frames)[:, :9, :11].astype(int) - expected).mean() < 16

    def test_grey_floats_are_taken_too(self, tmp_path: Path) -> None:
        grey = torch.linspace(-1, 1, 4).view(1, 4, 1, 1).expand(1, 4, 8, 8)
        for ending in ("webp", "gif"):
            PLAYERS[ending](tmp_path / f"grey.{ending}", grey, None)
            frames, lasting = played(tmp_path / f"grey.{ending}")
            assert frames[:, 0, 0, 0].tolist() == [0, 85, 170, 255]
            assert sum(lasting) == 500

    def test_a_missing_package_is_told_with_the_way_to_it(
        self, clip: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "av", None)
        with pytest.raises(ImportError, match=r"format=mp4 needs the package 'av'.*\[video\]"):
            require_mp4()
        with pytest.raises(ImportError):
            PLAYERS["mp4"](tmp_path / "clip.mp4", clip, None)
        assert not list(tmp_path.iterdir())

    def test_frames_are_files_in_order(self, clip: Tensor, tmp_path: Path) -> None:
        save_frames(tmp_path / "00003_class1", clip)
        files = sorted((tmp_path / "00003_class1").iterdir())
        assert [file.name for file in files] == [f"{number:03d}.png" for number in range(6)]
        assert np.array_equal(np.asarray(Image.open(files[4])), clip[:, 4].permute(1, 2, 0))


class TestSheets:
    def test_rows_are_clips_and_columns_frames(self, clip: Tensor) -> None:
        clips = torch.stack([clip, clip.flip(1)])
        sheet = np.asarray(contact_sheet(clips))
        scale = 9  # 11 pixels are brought to about 96
        assert sheet.shape == (4 + 2 * (9 * scale + 4), 4 + (6 * 12 - 1) * scale + 4, 3)
        for row in range(2):
            for frame in range(6):
                top, left = 4 + row * (9 * scale + 4), 4 + frame * 12 * scale
                cell = sheet[top : top + 9 * scale : scale, left : left + 11 * scale : scale]
                assert np.array_equal(cell, clips[row, :, frame].permute(1, 2, 0).numpy())

    def test_of_many_frames_some_are_shown_and_the_sheet_says_which(self) -> None:
        long = torch.randint(256, (2, 3, 40, 16, 16), dtype=torch.uint8)
        sheet = contact_sheet(long)
        assert sheet.width <= 2048 + 8
        shown = torch.linspace(0, 39, 16).round().long()
        assert int(shown[0]) == 0
        assert int(shown[-1]) == 39
        chosen = np.asarray(contact_sheet(long[:, :, shown]))
        whole = np.asarray(sheet)
        assert whole.shape[0] == chosen.shape[0] + 29  # the line that names them
        assert np.array_equal(whole[-chosen.shape[0] + 4 :], chosen[4:])

    def test_captions_take_the_width_of_a_row(self, clip: Tensor) -> None:
        words = "a red bar moving right at a leisurely pace"
        plain, told = (contact_sheet(clip[None], captions=c) for c in (None, [words]))
        assert told.width == plain.width
        assert told.height == plain.height + 18
        with pytest.raises(ValueError, match="2 texts were given for 1"):
            contact_sheet(clip[None], captions=["one", "two"])

    def test_many_clips_stand_side_by_side(self) -> None:
        clips = torch.zeros(20, 1, 2, 8, 8, dtype=torch.uint8)
        assert contact_sheet(clips).width > contact_sheet(clips[:16]).width

    @pytest.mark.parametrize("shape", [(3, 4, 8, 8), (1, 2, 4, 8, 8), (0, 3, 4, 8, 8)])
    def test_other_shapes_are_refused(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"Clips have shape \(n, C, T, H, W\)"):
            contact_sheet(torch.zeros(shape, dtype=torch.uint8))


class TestGridsThatPlay:
    def test_every_frame_is_the_grid_of_its_moment(self, clip: Tensor, tmp_path: Path) -> None:
        clips = torch.stack([clip, clip.flip(1)])
        save_animated_grid(clips, tmp_path / "grid.webp", frame_rate=4.0, columns=1)
        frames, lasting = played(tmp_path / "grid.webp")
        assert lasting == [250] * 6
        for number, frame in enumerate(frames):
            drawn = np.asarray(grid_image(clips[:, :, number], columns=1)).astype(int)
            assert abs(frame.astype(int) - drawn).mean() < 6  # it is compressed

    def test_long_clips_play_at_their_own_pace_with_fewer_frames(self, tmp_path: Path) -> None:
        long = torch.randint(256, (1, 1, 300, 2, 2), dtype=torch.uint8)
        save_animated_grid(long, tmp_path / "grid.webp", frame_rate=60.0)
        frames, lasting = played(tmp_path / "grid.webp")
        assert len(frames) == 100
        assert sum(lasting) == 5000

    def test_wide_grids_are_shrunk(self, tmp_path: Path) -> None:
        wide = torch.zeros(2, 3, 2, 8, 700, dtype=torch.uint8)
        save_animated_grid(wide, tmp_path / "grid.webp", columns=2)
        with Image.open(tmp_path / "grid.webp") as film:
            assert film.width == 1024
        small = to_pil(torch.zeros(1, 4, 8, dtype=torch.uint8))
        assert fit_width(small, 8) is small
        assert fit_width(small, 4).size == (4, 2)


class TestOverview:
    def test_pictures_are_a_grid(self, clip: Tensor, tmp_path: Path) -> None:
        pictures = clip.transpose(0, 1)
        save_overview(pictures, tmp_path / "one.png", columns=3)
        save_grid(pictures, tmp_path / "two.png", columns=3)
        assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
        assert not (tmp_path / "one.webp").exists()

    def test_clips_are_a_sheet_and_a_grid_that_plays(self, clip: Tensor, tmp_path: Path) -> None:
        save_overview(clip[None], tmp_path / "grid.png", frame_rate=5.0, captions=["a bar"])
        sheet = contact_sheet(clip[None], captions=["a bar"])
        assert np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), np.asarray(sheet))
        assert played(tmp_path / "grid.webp")[1] == [200] * 6
