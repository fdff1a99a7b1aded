"""Blurs and filters against what they must do to simple pictures."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from genscale.resolution.frequency import (
    butterworth,
    by_frames,
    gaussian_blur,
    gaussian_kernel,
    haar_low_pass,
    low_pass,
    match_statistics,
)


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_blur_spreads_a_point_by_the_kernel() -> None:
    kernel = gaussian_kernel(5, 0.8)
    assert kernel.sum().item() == pytest.approx(1.0)
    assert (kernel[1] / kernel[2]).item() == pytest.approx(math.exp(-1 / (2 * 0.64)))
    x = torch.zeros(1, 3, 9, 9)
    x[0, 1, 4, 4] = 1
    y = gaussian_blur(x, 5, 0.8)
    torch.testing.assert_close(y[0, 1, 2:7, 2:7], kernel[:, None] * kernel)
    assert y[0, 0].abs().max() == 0
    across = gaussian_blur(x, 5, 0.8, blur_channels=True)
    torch.testing.assert_close(across[0, 0], y[0, 1] * kernel[1])


def test_statistics_are_taken_over_sample_by_sample() -> None:
    x, like = sample(2, 3, 4, 4), 2 * sample(2, 3, 8, 8, seed=1) + 5
    y = match_statistics(x, like)
    for got, expected in zip(y, like, strict=True):
        torch.testing.assert_close(got.mean(), expected.mean())
        torch.testing.assert_close(got.std(), expected.std())
    torch.testing.assert_close(match_statistics(x[:1], like[:1]), y[:1])
    whole = match_statistics(x, like, per_sample=False)
    torch.testing.assert_close(whole.std(), like.std())
    assert not torch.allclose(whole, y)
    assert torch.isfinite(match_statistics(torch.ones(1, 1, 2, 2), like)).all()


def test_a_filter_keeps_the_mean_and_removes_the_chequerboard() -> None:
    mask = butterworth(8, 12, 0.2)
    assert mask[4, 6] == 1
    # half the amplitude where d is the ratio
    assert butterworth(20, 20, 0.2)[10, 12].item() == pytest.approx(0.5)
    board = (torch.arange(8)[:, None] + torch.arange(12)) % 2 * 2.0 - 1
    torch.testing.assert_close(low_pass(board + 3, mask), torch.full((8, 12), 3.0))
    assert low_pass(sample(2, 8, 12).half(), mask).dtype == torch.float16
    assert butterworth(8, 8, 0).abs().max() == 0


def test_odd_sides_are_off_by_half_a_frequency_unless_centred() -> None:
    assert butterworth(9, 9, 0.2)[4, 4] < 1
    assert butterworth(9, 9, 0.2, centred=True)[4, 4] == 1
    torch.testing.assert_close(butterworth(8, 6), butterworth(8, 6, centred=True))


def test_the_low_band_of_haar_is_the_mean_of_blocks() -> None:
    x = torch.tensor([[1.0, 3.0, 0.0], [5.0, 7.0, 4.0]]).view(1, 1, 2, 3)
    y = haar_low_pass(x)
    assert y.flatten().tolist() == [4, 4, 2, 4, 4, 2]
    torch.testing.assert_close(haar_low_pass(y), y)  # a projection


def test_clips_are_changed_frame_by_frame() -> None:
    clips = torch.randn(2, 3, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    for change in (haar_low_pass, lambda x: gaussian_blur(x, 3, 1.0)):
        got = by_frames(change, clips)
        assert torch.equal(got, change(clips))
        torch.testing.assert_close(got[:, :, 1], change(clips[:, :, 1]))
