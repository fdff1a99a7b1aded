"""Streaming moments equal the moments of everything at once, without losing digits."""

import pytest
import torch

from genscale.errors import DataError
from genscale.metrics.moments import Moments, as_float64, check_features
from genscale.rng import key, normal


def _features(n: int, d: int, seed: int = 0, offset: float = 0.0) -> torch.Tensor:
    return normal(key(seed), (n, d), dtype=torch.float64) + offset


@pytest.mark.parametrize("chunk", [1, 7, 50, 1000])
def test_streaming_equals_the_whole(chunk: int) -> None:
    features = _features(50, 6)
    moments = Moments.empty(6)
    for part in features.split(chunk):
        moments.update(part)
    assert moments.count == 50
    torch.testing.assert_close(moments.mean, features.mean(0), rtol=0, atol=1e-14)
    torch.testing.assert_close(moments.covariance(), features.T.cov(), rtol=0, atol=1e-14)


def test_biased_covariance_divides_by_n() -> None:
    moments = Moments.of(_features(50, 3))
    ratio = moments.covariance(unbiased=False) / moments.covariance()
    torch.testing.assert_close(ratio, torch.full((3, 3), 49 / 50, dtype=torch.float64))


def test_merging_equals_the_whole_in_any_order() -> None:
    features = _features(61, 5)
    parts = [Moments.of(part) for part in features.split([1, 20, 40])]
    whole = Moments.of(features)
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        merged = Moments.empty(5)
        for index in order:
            merged = merged.merge(parts[index])
        assert merged.count == 61
        torch.testing.assert_close(merged.mean, whole.mean, rtol=0, atol=1e-14)
        torch.testing.assert_close(merged.scatter, whole.scatter, rtol=0, atol=1e-12)


def test_a_large_common_offset_costs_no_digits() -> None:
    # sums of squares in float32 are off by 458 here, raw float64 sums by 9e-7
    features = _features(2000, 8, offset=1e4)
    moments = Moments.empty(8)
    for part in features.split(64):
        moments.update(part)
    exact = (features - 1e4).T.cov()
    assert (moments.covariance() - exact).abs().max() < 1e-11


def test_float32_features_are_accumulated_in_float64() -> None:
    features = _features(1000, 4, offset=100.0).float()
    moments = Moments.of(features, chunk_size=10)
    assert moments.mean.dtype == moments.scatter.dtype == torch.float64
    exact = features.double().T.cov()
    assert (moments.covariance() - exact).abs().max() < 1e-12
    assert as_float64(features).dtype == torch.float64


def test_no_rows_change_nothing() -> None:
    moments = Moments.of(_features(5, 2))
    before = moments.mean.clone()
    moments.update(torch.zeros(0, 2))
    assert moments.count == 5
    assert torch.equal(moments.mean, before)
    assert Moments.empty(2).merge(Moments.empty(2)).count == 0


def test_mistakes_are_told_in_a_sentence() -> None:
    with pytest.raises(DataError, match="at least 2 samples, but 1 were given"):
        Moments.of(_features(1, 3)).covariance()
    with pytest.raises(DataError, match="Moments of 3 and 4 features"):
        Moments.of(_features(5, 3)).merge(Moments.of(_features(5, 4)))
    broken = _features(5, 3)
    broken[2, 1] = float("nan")
    with pytest.raises(DataError, match=r"1 of 5 rows of the logits hold NaN.*first: row 2"):
        check_features(broken, "logits")
    with pytest.raises(DataError, match=r"shape \(n, d\).*\(3,\)"):
        check_features(torch.zeros(3))
