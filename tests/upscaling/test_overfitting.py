"""Overfitting to a video: patches come back to their places, networks learn apart but at once."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.errors import ConfigError, DataError
from genscale.upscaling.overfitting import (
    Overfit,
    chunks_by_difficulty,
    cut_patches,
    fit_chunks,
    join_patches,
    pooled_psnr,
    squared_errors,
    upscale_chunks,
)
from genscale.upscaling.wdsr import WDSR


def build() -> WDSR:
    return WDSR(scale=2, hidden_size=4, num_blocks=1, expansion=2, start="bicubic")


def video() -> tuple[Tensor, Tensor]:
    """Return patches, small and large: smooth ones and ones with edges."""
    place = torch.linspace(0, 6, 16)
    smooth = 0.5 + 0.4 * torch.sin(place[:, None] + place)
    edges = ((place[:, None] * 1.3).int() % 2 == (place * 1.7).int() % 2).float()
    frames = torch.stack([torch.cat((smooth, edges.roll(t, 0)), dim=1) for t in range(2)])
    large = cut_patches(frames[:, None].expand(-1, 3, -1, -1), (2, 4))
    return F.interpolate(large, scale_factor=0.5, mode="bicubic", antialias=True), large


def test_patches_are_cut_and_joined() -> None:
    frames = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    patches = cut_patches(frames, (2, 3))
    assert patches.shape == (12, 3, 2, 2)
    assert torch.equal(patches[1], frames[0, :, :2, 2:4])  # to the right first
    assert torch.equal(patches[6 + 3], frames[1, :, 2:, :2])
    assert torch.equal(join_patches(patches, (2, 3)), frames)
    with pytest.raises(DataError, match="4x6 cannot be cut into 3 rows and 3 columns"):
        cut_patches(frames, (3, 3))


def test_chunks_are_of_like_difficulty_and_size() -> None:
    errors = torch.tensor([0.1, 0.5, 0.2, 0.4, 0.3])
    assert chunks_by_difficulty(errors, 2).tolist() == [1, 0, 1, 0, 0]
    assert chunks_by_difficulty(errors, 5).tolist() == [4, 0, 3, 1, 2]
    with pytest.raises(DataError, match="5 patches cannot be cut into 6 chunks"):
        chunks_by_difficulty(errors, 6)


def test_psnr_is_that_of_the_mean_error() -> None:
    errors = squared_errors(torch.tensor([0.1, 0.3]).view(2, 1, 1, 1), torch.zeros(2, 1, 1, 1))
    assert errors.tolist() == pytest.approx([0.01, 0.09])
    assert pooled_psnr(errors).item() == pytest.approx(-10 * math.log10(0.05))


def test_networks_that_learn_together_learn_as_alone() -> None:
    small, large = video()
    how = Overfit(epochs=2, batch_size=2, lr=1e-3)
    chunk = chunks_by_difficulty(squared_errors(small.mean((2, 3)), large.mean((2, 3))), 2)
    torch.manual_seed(0)
    both = fit_chunks(build, small, large, chunk, how)
    # the second network sees nothing of the first one's patches
    torch.manual_seed(0)
    other = large.clone()
    other[chunk == 0] = 0.0
    again = fit_chunks(build, small, other, chunk, how)
    for name, weight in both.items():
        torch.testing.assert_close(again[name][1], weight[1])
    assert any(not torch.equal(again[name][0], weight[0]) for name, weight in both.items())
    made = upscale_chunks(build(), both, small, chunk)
    model = build()
    for number in (0, 1):
        model.load_state_dict({name: weight[number] for name, weight in both.items()})
        expected = model(small[chunk == number], 2).clamp(0, 1)
        torch.testing.assert_close(made[chunk == number], expected)


@pytest.mark.parametrize("joint", [False, True])
def test_a_video_is_learned(joint: bool) -> None:
    small, large = video()
    chunk = chunks_by_difficulty(torch.arange(len(small)).float(), 2)
    torch.manual_seed(0)
    start = build().requires_grad_(False)
    before = pooled_psnr(squared_errors(start(small, 2).clamp(0, 1), large))
    how = Overfit(epochs=10, batch_size=8, lr=1e-2, joint=joint)
    weights = fit_chunks(build, small, large, chunk, how)
    assert {len(weight) for weight in weights.values()} == {1 if joint else 2}
    made = upscale_chunks(start, weights, small, chunk)
    assert pooled_psnr(squared_errors(made, large)) > before + 0.2


def test_hard_patches_are_seen_more_often() -> None:
    """Of two patches with opposite targets, one network for both leans to the harder one's."""
    small = torch.full((2, 3, 4, 4), 0.5)
    large = torch.stack((torch.ones(3, 8, 8), torch.zeros(3, 8, 8)))
    how = Overfit(epochs=6, batch_size=32, lr=1e-2, joint=True)
    means = []
    for chunk in (torch.tensor([0, 1]), torch.tensor([1, 0])):
        torch.manual_seed(0)
        weights = fit_chunks(build, small, large, chunk, how)
        means.append(upscale_chunks(build(), weights, small, chunk).mean())
    assert means[0] > 0.505
    assert means[1] < 0.495


def test_settings_that_make_no_sense_are_told() -> None:
    with pytest.raises(ConfigError, match="epochs and batch_size must be at least 1"):
        Overfit(epochs=0)
