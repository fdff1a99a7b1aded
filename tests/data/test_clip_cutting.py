"""Which moments a clip shows, and how frames come to one size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from genscale.data.clip_cutting import ClipTimes, fit_frames, with_luma
from genscale.data.video_reader import VideoInfo
from genscale.errors import ConfigError, DataError

TWO_SECONDS = VideoInfo(32, 48, 2.0, 10.0)  # 20 frames


def shown(moments: list[float], info: VideoInfo = TWO_SECONDS) -> list[int]:
    """Which frames of an even rate a player shows at some moments."""
    return [int(moment * info.frame_rate) for moment in moments]


class TestMoments:
    def test_at_its_own_rate_a_clip_is_every_frame(self) -> None:
        moments, rate = ClipTimes(20).fixed(TWO_SECONDS)
        assert (shown(moments), rate) == (list(range(20)), 10.0)
        assert shown(ClipTimes(6).fixed(TWO_SECONDS)[0]) == list(range(7, 13))  # the middle
        assert shown(ClipTimes(6, begin="first").fixed(TWO_SECONDS)[0]) == list(range(6))

    def test_slower_and_quicker_clips(self) -> None:
        assert shown(ClipTimes(4, (5.0,), begin="first").fixed(TWO_SECONDS)[0]) == [0, 2, 4, 6]
        assert shown(ClipTimes(4, (20.0,), begin="first").fixed(TWO_SECONDS)[0]) == [0, 0, 1, 1]
        # 8 of 10 a second: every fifth is left out, now and then one
        assert shown(ClipTimes(9, (8.0,), begin="first").fixed(TWO_SECONDS)[0]) == [
            *(0, 1, 2, 4, 5, 6, 7, 9, 10)
        ]

    def test_moments_lie_a_quarter_of_the_shorter_period_after_borders(self) -> None:
        for rate in (10.0, 5.0, 20.0, 12.0):
            first = ClipTimes(2, (rate,), begin="first").fixed(TWO_SECONDS)[0][0]
            assert first == pytest.approx(0.25 / max(rate, 10.0))

    def test_draws_choose_among_all_beginnings_and_only_those(self) -> None:
        times = ClipTimes(5)
        begins = {
            shown(times.drawn(TWO_SECONDS, (0.0, draw))[0])[0]
            for draw in torch.linspace(0, 0.9999, 200).tolist()
        }
        assert begins == set(range(16))  # 0..15: the last clip ends with frame 19

    def test_draws_choose_among_the_rates_that_fit(self) -> None:
        times = ClipTimes(11, (2.0, 5.0, 10.0))  # 5.0, 2.0 and 1.0 seconds
        draws = torch.linspace(0, 0.999, 30).tolist()
        assert {times.drawn(TWO_SECONDS, (draw, 0.5))[1] for draw in draws} == {10.0}
        longer = VideoInfo(32, 48, 3.0, 10.0)
        assert {times.drawn(longer, (draw, 0.5))[1] for draw in draws} == {5.0, 10.0}
        assert times.fixed(longer)[1] == 5.0

    def test_short_videos(self) -> None:
        assert not ClipTimes(30).fits(TWO_SECONDS)
        assert ClipTimes(20).fits(TWO_SECONDS)
        for short in ("error", "drop"):
            with pytest.raises(DataError, match=r"it lasts 2\.00 s, and 30 frames at 10 a second"):
                ClipTimes(30, short=short).fixed(TWO_SECONDS)
        looped, _ = ClipTimes(45, short="loop").drawn(TWO_SECONDS, (0.9, 0.9))
        assert shown(looped) == [i % 20 for i in range(45)]
        held, rate = ClipTimes(25, (5.0, 10.0), short="hold").fixed(TWO_SECONDS)
        assert (shown(held), rate) == ([*range(20), *[19] * 5], 10.0)

    def test_wrong_numbers(self) -> None:
        with pytest.raises(ConfigError, match=r"data\.num_frames=0 is below 1"):
            ClipTimes(0)
        with pytest.raises(ConfigError, match=r"data\.frame_rate=-3\.0 must be above 0"):
            ClipTimes(4, (8.0, -3.0))


class TestSizes:
    def test_the_largest_part_of_the_wanted_shape_is_cut(self) -> None:
        frames = torch.arange(6).repeat(4, 1).to(torch.uint8)[None, None]  # columns 0..5
        cut = [
            fit_frames(frames, 4, 4, crop=crop, place=place)[0, 0, 0].tolist()
            for crop, place in (("center", 0.0), ("random", 0.0), ("random", 1.0))  # type: ignore[misc]
        ]
        assert cut == [[1, 2, 3, 4], [0, 1, 2, 3], [2, 3, 4, 5]]
        assert fit_frames(frames, 4, 6).shape == (1, 1, 4, 6)
        assert fit_frames(frames, 2, 4).shape == (1, 1, 2, 4)

    def test_squash_keeps_all_and_loses_proportions(self) -> None:
        frames = torch.tensor([0, 0, 100, 100, 200, 200]).repeat(4, 1).to(torch.uint8)[None, None]
        assert (
            fit_frames(frames, 2, 3, crop="squash", resize="area")[0, 0].tolist()
            == [[0, 100, 200]] * 2
        )

    def test_area_is_the_mean_of_the_pixels_covered(self) -> None:
        frames = torch.randint(0, 256, (3, 3, 8, 12)).to(torch.uint8)
        means = frames[:, :, :, 2:10].double().unfold(2, 4, 4).unfold(3, 4, 4).mean((-1, -2))
        fitted = fit_frames(frames, 2, 2, resize="area")
        assert torch.equal(fitted, (means + 0.5).floor().to(torch.uint8))

    def test_antialias_is_pillows_bilinear_filter(self) -> None:
        frame = torch.randint(0, 256, (24, 24, 3)).to(torch.uint8)
        pillow = Image.fromarray(frame.numpy()).resize((7, 7), Image.Resampling.BILINEAR)
        expected = torch.from_numpy(np.array(pillow)).permute(2, 0, 1)
        fitted = fit_frames(frame.permute(2, 0, 1)[None], 7, 7)[0]
        assert int((fitted.int() - expected.int()).abs().max()) <= 1

    def test_small_videos_grow(self) -> None:
        frames = torch.full((2, 3, 5, 7), 90, dtype=torch.uint8)
        for resize in ("antialias", "area"):
            assert torch.equal(
                fit_frames(frames, 16, 16, resize=resize),  # type: ignore[arg-type]
                torch.full((2, 3, 16, 16), 90, dtype=torch.uint8),
            )

    def test_grey_is_pillows(self) -> None:
        frame = torch.randint(0, 256, (9, 9, 3)).to(torch.uint8)
        expected = torch.from_numpy(np.array(Image.fromarray(frame.numpy()).convert("L")))
        assert torch.equal(with_luma(frame.permute(2, 0, 1)[None], 1)[0, 0], expected)
        assert with_luma(frame.permute(2, 0, 1)[None], 3).shape == (1, 3, 9, 9)
