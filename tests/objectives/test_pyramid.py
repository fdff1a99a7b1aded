"""Multi-scale targets and loss, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from genscale import rng
from genscale.objectives.pyramid import pyramid_loss, pyramid_targets

GRID = torch.arange(16.0).view(1, 1, 4, 4)  # rows 0-3, 4-7, 8-11, 12-15


def test_blocks_are_summed_and_divided_by_their_side() -> None:
    half, whole = pyramid_targets(GRID, [(2, 2), (4, 4)])
    # 0 + 1 + 4 + 5 = 10, 2 + 3 + 6 + 7 = 18, 42, 50; divided by k = 2
    assert half.flatten().tolist() == [5.0, 9.0, 21.0, 25.0]
    assert whole is GRID


def test_a_quarter_of_the_side_divides_by_4() -> None:
    (quarter,) = pyramid_targets(GRID, [(1, 1)])
    assert quarter.item() == 120.0 / 4  # 0 + ... + 15 = 120


def test_odd_sides_use_overlapping_windows() -> None:
    five = torch.arange(25.0).view(1, 1, 5, 5)
    (three,) = pyramid_targets(five, [(3, 3)])
    assert three.shape == (1, 1, 3, 3)
    # windows of 3 with stride 2 and padding 1, divided by 3
    assert three[0, 0, 0, 0].item() == pytest.approx((0 + 1 + 5 + 6) / 3)
    assert three[0, 0, 0, 1].item() == pytest.approx((1 + 2 + 3 + 6 + 7 + 8) / 3)
    assert three[0, 0, 1, 1].item() == pytest.approx(9 * 12 / 3)
    assert three[0, 0, 2, 2].item() == pytest.approx((18 + 19 + 23 + 24) / 3)


def test_odd_sides_at_a_quarter_use_windows_of_5() -> None:
    nine = torch.ones(1, 1, 9, 9)
    # 9 -> 9 / 4 rounded up = 3 by windows of 5, stride 4, padding 2; 9 is also 3 blocks of 3
    assert pyramid_targets(nine, [(3, 3)])[0][0, 0, 1, 1].item() == 3.0
    # 7 -> 2: stride 4; the first window holds 3 of its 5 rows, the second 5 (rows 2 to 6)
    seven = torch.ones(1, 1, 7, 7)
    values = pyramid_targets(seven, [(2, 2)])[0].flatten().tolist()
    assert values == pytest.approx([9 / 5, 15 / 5, 15 / 5, 25 / 5])


def test_each_side_keeps_its_own_rule() -> None:
    mixed = torch.ones(1, 1, 4, 5)
    (target,) = pyramid_targets(mixed, [(2, 3)])
    # windows of 2 rows and 3 columns: 6 ones over sqrt(2 * 3)
    assert target[0, 0, 0, 1].item() == pytest.approx(6**0.5)


def test_unit_variance_noise_keeps_unit_variance() -> None:
    noise = rng.normal(rng.key(0, torch.arange(4)), (3, 64, 64))
    for target in pyramid_targets(noise, [(8, 8), (16, 16), (32, 32)]):
        # 768 numbers at least: four standard errors of the variance are 4 sqrt(2 / 768) = 0.2
        assert target.var().item() == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize("shape", [(3, 3), (8, 8), (0, 4)])
def test_a_grid_that_does_not_fit_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="A side of 4 cannot be reduced to"):
        pyramid_targets(GRID, [shape])


def test_the_loss_is_the_weighted_sum_of_mean_squares() -> None:
    target = torch.stack((GRID[0], GRID[0] + 1))
    predictions = [torch.zeros(2, 1, 2, 2), target - torch.tensor([2.0, 3.0]).view(2, 1, 1, 1)]
    total, errors = pyramid_loss(predictions, target, [0.25, 1.0])
    # coarse: 5, 9, 21, 25 -> 1172 / 4 = 293; one more in every cell is + 2: 7, 11, 23, 27
    assert errors[0].tolist() == [293.0, (49 + 121 + 529 + 729) / 4]
    assert errors[1].tolist() == [4.0, 9.0]
    assert total.tolist() == [0.25 * 293 + 4, 0.25 * 357 + 9]


def test_a_weight_of_0_keeps_a_prediction_in_the_graph() -> None:
    coarse, fine = (torch.zeros(1, 1, n, n, requires_grad=True) for n in (2, 4))
    total, _ = pyramid_loss([coarse, fine], GRID, [0.0, 1.0])
    torch.autograd.backward(total.sum())
    assert coarse.grad is not None
    assert not coarse.grad.any()
    assert fine.grad is not None
    assert fine.grad.any()
