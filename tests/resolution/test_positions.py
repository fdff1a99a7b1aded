"""Position tables on other grids, and schedules for other sizes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.objectives.time_sampler import shifted
from genscale.resolution.positions import (
    extend_levels,
    patch_places,
    resize_bias_table,
    resize_position_table,
    resize_scale_table,
)
from genscale.resolution.schedule_shift import shifted_level, size_shift, token_shift


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_places_of_patches_span_the_base_whatever_their_number() -> None:
    assert patch_places(8, 4).tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]
    assert patch_places(4, 4, 2.0).tolist() == [0, 0.5, 1, 1.5]


def test_a_learned_table_is_stretched_and_its_front_rows_are_kept() -> None:
    table = sample(1, 2 + 12, 8)
    wide = resize_position_table(table, (3, 4), (6, 8), extras=2)
    assert torch.equal(wide[:, :2], table[:, :2])
    picture = table[:, 2:].view(1, 3, 4, 8).permute(0, 3, 1, 2)
    expected = F.interpolate(picture, size=(6, 8), mode="bicubic")
    torch.testing.assert_close(wide[:, 2:].view(1, 6, 8, 8).permute(0, 3, 1, 2), expected)
    assert resize_position_table(table, (3, 4), (3, 4), extras=2) is table
    kept = resize_position_table(table[:, 2:], (3, 4), (6, 8), keep_variance=True)
    torch.testing.assert_close(kept.std(), table[:, 2:].std())
    with pytest.raises(ValueError, match="must have 14 rows"):
        resize_position_table(table[:, 1:], (3, 4), (6, 8), extras=2)


def test_scales_are_stretched_each_on_its_own_and_new_ones_from_the_last() -> None:
    table = sample(1, 1 + 4, 6)
    wide = resize_scale_table(table, [(1, 1), (2, 2)], [(1, 1), (3, 3), (4, 4)])
    assert wide.shape == (1, 1 + 9 + 16, 6)
    assert torch.equal(wide[:, :1], table[:, :1])
    torch.testing.assert_close(wide[:, 10:], resize_position_table(table[:, 1:], (2, 2), (4, 4)))
    assert torch.equal(extend_levels(table[0], 7)[4:], table[0, -1:].expand(3, -1))


def test_biases_keep_their_middle_which_is_no_displacement() -> None:
    table = sample(9, 2)  # a window of 2
    wide = resize_bias_table(table, 2, 3)
    assert wide.shape == (25, 2)
    torch.testing.assert_close(wide[12], table[4])
    assert torch.equal(resize_bias_table(table, 2, 2), table)


def test_times_move_by_the_side_over_the_trained_side() -> None:
    time = torch.linspace(0, 1, 5, dtype=torch.float64)
    torch.testing.assert_close(size_shift(time, (4, 4), (8, 8)), shifted(time, 2.0))
    assert torch.equal(size_shift(time, (4, 4), (4, 4)), time)
    # FLUX's rule as it is written there
    inner = time[1:-1]
    for tokens, mu in ((256, 0.5), (4096, 1.15), (2176, 0.825)):
        expected = math.exp(mu) / (math.exp(mu) + (1 / inner - 1))
        torch.testing.assert_close(token_shift(inner, tokens), expected)


def test_noise_grows_by_the_scale_relative_to_the_signal() -> None:
    alpha = torch.tensor([0.9, 0.5], dtype=torch.float64)
    sigma = (1 - alpha**2).sqrt()
    new_alpha, new_sigma = shifted_level(alpha, sigma, 2.0)
    torch.testing.assert_close(new_sigma / new_alpha, 2 * sigma / alpha)
    torch.testing.assert_close(new_alpha**2 + new_sigma**2, torch.ones_like(alpha))
