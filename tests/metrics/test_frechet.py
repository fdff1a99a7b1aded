"""The Frechet distance: identities, all routes against each other, and what it refuses."""

import math

import pytest
import torch

from genscale.errors import ConfigError, DataError
from genscale.metrics.frechet import (
    compare_features,
    compare_gaussians,
    frechet_distance,
    frechet_distance_from_features,
    frechet_infinity,
)
from genscale.metrics.moments import Moments
from genscale.rng import key, normal


def _features(n: int, d: int, seed: int) -> torch.Tensor:
    mixing = normal(key(99), (d, d), dtype=torch.float64) / math.sqrt(d)
    return normal(key(seed), (n, d), dtype=torch.float64) @ mixing + 0.1 * seed


def _gaussian(d: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    moments = Moments.of(_features(4 * d, d, seed))
    return moments.mean, moments.covariance()


def _identity(d: int) -> torch.Tensor:
    return torch.eye(d, dtype=torch.float64)


@pytest.mark.parametrize("route", ["auto", "cholesky", "eigen", "singular"])
def test_identical_gaussians_are_at_distance_zero(route: str) -> None:
    mean, cov = _gaussian(12, 1)
    assert compare_gaussians(mean, cov, mean, cov, route=route).value == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("n", [3, 12, 40])
def test_identical_features_are_at_distance_zero(n: int) -> None:
    features = _features(n, 12, 1)
    assert frechet_distance_from_features(features, features) == pytest.approx(0, abs=1e-12)


def test_a_shift_of_the_mean_costs_its_squared_length() -> None:
    shift = normal(key(3), (9,), dtype=torch.float64)
    distance = frechet_distance(torch.zeros(9), _identity(9), shift, _identity(9))
    assert distance == pytest.approx(float(shift.square().sum()), rel=1e-12)


def test_isotropic_gaussians_differ_by_d_times_the_squared_difference_of_deviations() -> None:
    zero = torch.zeros(7)
    distance = frechet_distance(zero, 4 * _identity(7), zero, 9 * _identity(7))
    assert distance == pytest.approx(7 * (2 - 3) ** 2, rel=1e-12)


def test_rotation_and_order_change_nothing() -> None:
    mean_1, cov_1 = _gaussian(10, 1)
    mean_2, cov_2 = _gaussian(10, 2)
    distance = frechet_distance(mean_1, cov_1, mean_2, cov_2)
    rotation = torch.linalg.qr(normal(key(5), (10, 10), dtype=torch.float64)).Q
    rotated = frechet_distance(
        rotation @ mean_1,
        rotation @ cov_1 @ rotation.T,
        rotation @ mean_2,
        rotation @ cov_2 @ rotation.T,
    )
    assert rotated == pytest.approx(distance, rel=1e-10)
    assert frechet_distance(mean_2, cov_2, mean_1, cov_1) == pytest.approx(distance, rel=1e-10)


def test_all_routes_agree_at_full_rank() -> None:
    first, second = _features(80, 16, 1), _features(60, 16, 2)
    (mean_1, cov_1), (mean_2, cov_2) = (
        (m.mean, m.covariance()) for m in (Moments.of(first), Moments.of(second))
    )
    auto = compare_gaussians(mean_1, cov_1, mean_2, cov_2)
    assert auto.route == "cholesky"
    for route in ("eigen", "singular"):
        value = compare_gaussians(mean_1, cov_1, mean_2, cov_2, route=route).value
        assert value == pytest.approx(auto.value, rel=1e-9)
    assert auto.mean_term + auto.covariance_term == pytest.approx(auto.value, rel=1e-12)


def test_sets_smaller_than_the_dimension_are_compared_exactly() -> None:
    # two points a side: covariances v v^T / 2 and w w^T / 2 of differences v, w, so
    # tr (S1 S2)^(1/2) = |v . w| / 2
    first = torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0]], dtype=torch.float64)
    second = torch.tensor([[0.0, 0.0, 0.0], [3.0, 4.0, 0.0]], dtype=torch.float64)
    result = compare_features(first, second)
    mean_term = (1 - 1.5) ** 2 + 2.0**2
    assert result.route == "features"
    assert result.value == pytest.approx(mean_term + 4 / 2 + 25 / 2 - 2 * 6 / 2, rel=1e-12)


@pytest.mark.parametrize(("n_1", "n_2"), [(10, 200), (200, 10), (10, 12)])
def test_small_sets_agree_with_the_route_from_covariances(n_1: int, n_2: int) -> None:
    first, second = _features(n_1, 24, 1), _features(n_2, 24, 2)
    exact = compare_features(first, second)
    moments = Moments.of(first), Moments.of(second)
    other = compare_gaussians(
        moments[0].mean, moments[0].covariance(), moments[1].mean, moments[1].covariance()
    )
    assert exact.route == "features"
    assert other.value == pytest.approx(exact.value, abs=1e-6)


def test_singular_covariances_take_the_safe_route() -> None:
    mean, cov = torch.zeros(3), torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
    turn = torch.linalg.qr(normal(key(1), (3, 3), dtype=torch.float64)).Q
    rotated = turn @ cov @ turn.T
    result = compare_gaussians(mean, rotated, mean, rotated)
    assert result.route == "singular"
    assert result.value == pytest.approx(0, abs=1e-7)
    with pytest.raises(ConfigError, match="route='cholesky' needs a covariance of full rank"):
        compare_gaussians(mean, rotated, mean, rotated, route="cholesky")


def test_constant_features_do_not_cost_the_fast_route() -> None:
    mean_1, cov_1 = _gaussian(6, 1)
    mean_2, cov_2 = _gaussian(6, 2)
    padded = [
        torch.block_diag(cov, torch.zeros(1, 1, dtype=torch.float64)) for cov in (cov_1, cov_2)
    ]
    zero = torch.zeros(1, dtype=torch.float64)
    result = compare_gaussians(
        torch.cat((mean_1, zero)), padded[0], torch.cat((mean_2, zero)), padded[1]
    )
    assert result.route == "cholesky"
    assert result.value == pytest.approx(frechet_distance(mean_1, cov_1, mean_2, cov_2), rel=1e-12)
    nothing = torch.zeros(2, 2)
    assert frechet_distance(torch.zeros(2), nothing, torch.ones(2), nothing) == pytest.approx(2.0)


def test_one_singular_covariance_factors_the_other_one() -> None:
    full = _gaussian(8, 1)
    thin = Moments.of(_features(5, 8, 2))
    result = compare_gaussians(*full, thin.mean, thin.covariance())
    exact = compare_gaussians(*full, thin.mean, thin.covariance(), route="singular")
    assert result.route == "cholesky"
    assert result.value == pytest.approx(exact.value, abs=1e-7)


def test_wrong_statistics_are_refused_with_diagnostics() -> None:
    mean, cov = _gaussian(4, 1)
    with pytest.raises(DataError, match=r"came out as -.*one covariance is no covariance"):
        compare_gaussians(mean, -cov, mean, -cov)
    with pytest.raises(DataError, match="second Gaussian holds NaN"):
        frechet_distance(mean, cov, mean, cov * float("nan"))
    with pytest.raises(DataError, match=r"mean of shape \(4,\) and a covariance of shape \(3, 3\)"):
        frechet_distance(mean, cov[:3, :3], mean, cov)
    with pytest.raises(DataError, match="first Gaussian has 4 features and the second 3"):
        frechet_distance(mean, cov, mean[:3], cov[:3, :3])
    with pytest.raises(ConfigError, match="route='schur' is unknown"):
        compare_gaussians(mean, cov, mean, cov, route="schur")
    with pytest.raises(DataError, match="at least 2 samples a side, but 1 and 9"):
        compare_features(_features(1, 4, 1), _features(9, 4, 1))
    with pytest.raises(DataError, match="first set has 4 features and the second 5"):
        compare_features(_features(9, 4, 1), _features(9, 5, 1))


def test_extrapolation_removes_the_bias_of_small_sets() -> None:
    # against an exact N(0, I) reference the bias is (d + d (d + 1) / 4) / n
    d, n = 8, 3000
    features = normal(key(7), (n, d), dtype=torch.float64)
    bias = (d + d * (d + 1) / 4) / n
    line = frechet_infinity(features, torch.zeros(d), _identity(d), smallest=200, num_points=8)
    assert line.sizes[0] == 200
    assert line.sizes[-1] == n
    assert line.distances[-1] == pytest.approx(bias, rel=0.35)
    assert line.slope == pytest.approx(d + d * (d + 1) / 4, rel=0.35)
    assert abs(line.value) < 0.35 * bias
    again = frechet_infinity(features, torch.zeros(d), _identity(d), smallest=200, num_points=8)
    assert again == line
    with pytest.raises(ConfigError, match="at least 2 sizes between 2 and n"):
        frechet_infinity(features[:2], torch.zeros(d), _identity(d))
