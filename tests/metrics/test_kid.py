"""Kernel distances: the estimator is unbiased, blockwise sums are whole, subsets are keyed."""

from itertools import combinations

import pytest
import torch

from genscale.errors import ConfigError, DataError
from genscale.metrics import kid
from genscale.metrics.kid import (
    cmmd,
    gaussian_kernel,
    kernel_distance,
    kernel_distance_full,
    polynomial_kernel,
    squared_mmd,
    subset_indices,
)
from genscale.rng import key, normal


def _features(n: int, d: int, seed: int) -> torch.Tensor:
    return normal(key(seed), (n, d), dtype=torch.float64)


def test_kernels_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    y = torch.tensor([[3.0, -1.0]], dtype=torch.float64)
    assert polynomial_kernel(x, y).item() == pytest.approx((1 / 2 + 1) ** 3)
    # |x - y|^2 = 13, sigma = 10
    assert gaussian_kernel(x, y).item() == pytest.approx(torch.tensor(-13 / 200).exp().item())


def test_subsets_of_one_side_average_to_the_whole() -> None:
    """A U-statistic's mean over all subsets of a size is its value on the whole set."""
    x, y = _features(6, 3, 1), _features(5, 3, 2) + 0.5
    values = [
        squared_mmd(x[list(rows)], y, polynomial_kernel, unbiased=True)
        for rows in combinations(range(6), 4)
    ]
    assert torch.stack(values).mean().item() == pytest.approx(kernel_distance_full(x, y), rel=1e-12)


def test_samples_of_one_law_average_to_zero() -> None:
    values = torch.tensor(
        [kernel_distance_full(_features(10, 2, i), _features(10, 2, 1000 + i)) for i in range(400)]
    )
    error = values.std() / 400**0.5
    assert values.min() < 0
    assert abs(values.mean()) < 4 * error
    biased = squared_mmd(
        _features(10, 2, 0), _features(10, 2, 1), polynomial_kernel, unbiased=False
    )
    assert biased > 0


def test_blocks_do_not_change_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = _features(23, 4, 1), _features(17, 4, 2)
    whole = kernel_distance_full(x, y), cmmd(x, y)
    monkeypatch.setattr(kid, "_BLOCK_ROWS", 5)
    assert kernel_distance_full(x, y) == pytest.approx(whole[0], rel=1e-12)
    assert cmmd(x, y) == pytest.approx(whole[1], rel=1e-12)


def test_subsets_are_keyed_and_without_replacement() -> None:
    rows = subset_indices(30, 10, 4, key_of=key(5))
    assert rows.shape == (4, 10)
    assert all(len(row.unique()) == 10 for row in rows)
    assert not torch.equal(rows[0], rows[1])
    assert torch.equal(rows, subset_indices(30, 10, 4, key_of=key(5)))
    x, y = _features(30, 3, 1), _features(40, 3, 2)
    first = kernel_distance(x, y, subset_size=12, num_subsets=6, seed=3)
    assert first.subset_size == 12
    assert torch.equal(
        first.subsets, kernel_distance(x, y, subset_size=12, num_subsets=6, seed=3).subsets
    )
    assert first.mean != kernel_distance(x, y, subset_size=12, num_subsets=6, seed=4).mean


def test_subsets_never_exceed_the_smaller_set() -> None:
    result = kernel_distance(_features(8, 3, 1), _features(20, 3, 2), num_subsets=3)
    assert result.subset_size == 8
    assert result.std == pytest.approx(float(result.subsets.std(correction=0)))


def test_given_indices_are_taken() -> None:
    x, y = _features(9, 3, 1), _features(9, 3, 2)
    rows = torch.arange(9)[None]
    result = kernel_distance(x, y, indices=(rows, rows))
    assert result.mean == pytest.approx(kernel_distance_full(x, y), rel=1e-12)
    assert result.std == 0.0


def test_cmmd_ignores_lengths_and_is_zero_on_one_set() -> None:
    x, y = _features(9, 5, 1), _features(11, 5, 2)
    assert cmmd(x, 7.0 * y) == pytest.approx(cmmd(x, y), rel=1e-9)
    assert cmmd(x, x) == pytest.approx(0.0, abs=1e-9)


def test_mistakes_are_told_in_a_sentence() -> None:
    x = _features(9, 3, 1)
    with pytest.raises(DataError, match="first set has 3 features and the second 4"):
        kernel_distance(x, _features(9, 4, 1))
    with pytest.raises(DataError, match="at least 2 samples a side, but 1 and 9"):
        kernel_distance_full(x[:1], x)
    with pytest.raises(ConfigError, match="subset_size=1 and num_subsets=5"):
        kernel_distance(x, x, subset_size=1, num_subsets=5)
    with pytest.raises(DataError, match="1 embeddings are all zeros"):
        cmmd(x, torch.cat((x, torch.zeros(1, 3))))
