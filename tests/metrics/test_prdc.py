"""Precision, recall, density, coverage: edge cases by hand, ties, bounded memory."""

import pytest
import torch

from genscale.errors import ConfigError, DataError
from genscale.metrics import neighbours
from genscale.metrics.neighbours import (
    approximate_squared,
    blocks,
    direct_squared_distance,
    inside_blocks,
    nearest_squared,
    squared_norms,
)
from genscale.metrics.prdc import ball_radii, fidelity_diversity, squared_ball_radii
from genscale.rng import key, normal


def _features(n: int, d: int, seed: int) -> torch.Tensor:
    return normal(key(seed), (n, d), dtype=torch.float64)


def _line(*places: float) -> torch.Tensor:
    return torch.tensor(places, dtype=torch.float64)[:, None]


def test_radii_leave_the_point_itself_out_but_count_its_copies() -> None:
    points = _line(0.0, 0.0, 1.0, 5.0)
    assert ball_radii(points, 1).tolist() == [0.0, 0.0, 1.0, 4.0]
    assert squared_ball_radii(points, 2).tolist() == [1.0, 1.0, 1.0, 25.0]


def test_on_a_line_by_hand() -> None:
    # k = 1: real radii are 1, 1, 2 around 0, 1, 3; fake radii are 3, 3, 6 around 1, 4, 10
    real, fake = _line(0.0, 1.0, 3.0), _line(1.0, 4.0, 10.0)
    closed = fidelity_diversity(real, fake, num_neighbours=1)
    # fake 1 lies in the balls of 0 (on the rim), 1 and 3 (on the rim); fake 4 in that of 3
    assert closed.precision == pytest.approx(2 / 3)
    assert closed.density == pytest.approx((3 + 1) / 3)
    assert closed.coverage == 1.0
    assert closed.recall == 1.0
    open_ = fidelity_diversity(real, fake, num_neighbours=1, strict=True)
    # on the rim does not count: fake 1 lies in the ball of 1, fake 4 in that of 3
    assert open_.density == pytest.approx((1 + 1) / 3)
    assert open_.coverage == pytest.approx(2 / 3)
    assert open_.recall == 1.0


def test_a_set_covers_itself() -> None:
    points = _features(40, 5, 1)
    result = fidelity_diversity(points, points, num_neighbours=3)
    assert (result.precision, result.recall, result.coverage) == (1.0, 1.0, 1.0)
    # every closed ball holds its centre and k neighbours
    assert result.density == pytest.approx(4 / 3)


def test_far_sets_share_nothing() -> None:
    result = fidelity_diversity(_features(20, 4, 1), _features(20, 4, 2) + 1e6)
    assert (result.precision, result.recall, result.density, result.coverage) == (0, 0, 0, 0)


def test_a_collapsed_model_is_precise_but_covers_little() -> None:
    real = _features(200, 4, 1)
    fake = real[:1] + 1e-3 * _features(50, 4, 2)
    result = fidelity_diversity(real, fake)
    assert result.precision == 1.0
    assert result.recall < 0.05
    assert result.coverage < 0.1


def test_copies_tie_exactly_however_far_from_the_origin() -> None:
    """Rounding of the matrix product must not decide whether a copy is inside a ball."""
    real = _features(30, 64, 1) + 1e3
    doubled = torch.cat((real, real))
    result = fidelity_diversity(doubled, doubled, num_neighbours=1)
    # with k = 1 every radius is 0: a closed ball holds the point and its copy, an open one nothing
    assert result.precision == 1.0
    assert result.density == pytest.approx(2.0)
    assert fidelity_diversity(doubled, doubled, num_neighbours=1, strict=True).precision == 0.0


def test_block_sizes_do_not_change_the_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = _features(61, 6, 1), _features(45, 6, 2)
    whole = fidelity_diversity(real, fake)
    nearest = nearest_squared(fake, real, 4)
    monkeypatch.setattr(neighbours, "_BLOCK", 7)
    # the default of `blocks` was bound at import
    monkeypatch.setattr(neighbours, "blocks", lambda count: blocks(count, 7))
    assert fidelity_diversity(real, fake) == whole
    again = nearest_squared(fake, real, 4)
    assert torch.equal(again[0], nearest[0])
    assert torch.equal(again[1], nearest[1])


def test_nearest_equals_sorting_all_distances() -> None:
    x, y = _features(20, 3, 1), _features(30, 3, 2)
    distances, rows = nearest_squared(x, y, 5)
    every = direct_squared_distance(x[:, None], y[None])
    expected, order = every.sort(dim=1)
    assert torch.equal(distances, expected[:, :5])
    assert torch.equal(rows, order[:, :5])
    rounded, bound = approximate_squared(x, y)
    assert bool(((rounded - every).abs() <= bound).all())
    assert torch.equal(squared_norms(x), direct_squared_distance(x, torch.zeros_like(x)))


def test_inside_blocks_cover_every_pair_once() -> None:
    x, y = _features(9, 2, 1), _features(8, 2, 2)
    seen = torch.zeros(9, 8)
    for rows, columns, inside in inside_blocks(x, y, torch.full((8,), 1e9), strict=False):
        assert bool(inside.all())
        seen[rows, columns] += 1
    assert bool((seen == 1).all())
    assert [s.stop - s.start for s in blocks(7, 3)] == [3, 3, 1]


def test_mistakes_are_told_in_a_sentence() -> None:
    points = _features(3, 2, 1)
    with pytest.raises(ConfigError, match="3 nearest neighbours were asked for among 2 points"):
        fidelity_diversity(points, points)
    with pytest.raises(DataError, match="real set has 2 features and the samples 3"):
        fidelity_diversity(_features(9, 2, 1), _features(9, 3, 1))
