"""Resampling: unbiased, within its bounds, and the same numbers as the published programs.

The numbers themselves are golden cases of ``resampling``.
"""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from genscale import rng
from genscale.errors import ConfigError
from genscale.search.resampling import (
    Scheme,
    check_scheme,
    draw_from,
    effective_size,
    log_normalise,
    normalise,
    resample,
    uniforms_needed,
)

SCHEMES = get_args(Scheme)
WEIGHTS = torch.tensor([[0.02, 0.4, 0.13, 0.0, 0.35, 0.1]], dtype=torch.float64)
REPEATS = 20_000


def repeated(scheme: Scheme, draws: int | None = None) -> Tensor:
    """Return how often each particle was taken ``(REPEATS, N)``."""
    count = WEIGHTS.shape[1]
    needed = uniforms_needed(scheme, count, draws or count)
    uniforms = rng.uniform(rng.key(torch.arange(REPEATS), 3), (needed,))
    ancestors = resample(WEIGHTS.expand(REPEATS, -1), uniforms, scheme, draws)
    return torch.nn.functional.one_hot(ancestors, count).sum(1)


@pytest.mark.parametrize("draws", [None, 3, 11])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_particle_is_taken_in_proportion_to_its_weight(
    scheme: Scheme, draws: int | None
) -> None:
    taken = repeated(scheme, draws)
    wanted = (draws or WEIGHTS.shape[1]) * WEIGHTS[0]
    assert bool((taken.sum(1) == (draws or WEIGHTS.shape[1])).all())
    assert int(taken[:, 3].sum()) == 0  # no weight, no descendants
    # a count's standard deviation is at most that of multinomial draws; five of them
    allowed = 5 * torch.sqrt(wanted / REPEATS)
    assert bool(((taken.double().mean(0) - wanted).abs() <= allowed).all())


@pytest.mark.parametrize("scheme", ["systematic", "ssp"])
@pytest.mark.parametrize("draws", [None, 3, 11])
def test_counts_are_the_nearest_whole_numbers(scheme: Scheme, draws: int | None) -> None:
    wanted = (draws or WEIGHTS.shape[1]) * WEIGHTS[0]
    taken = repeated(scheme, draws)
    assert bool((taken >= wanted.floor()).all())
    assert bool((taken <= wanted.ceil()).all())


def test_schemes_differ_in_how_much_counts_vary() -> None:
    spread = {scheme: float(repeated(scheme).double().var(0).sum()) for scheme in SCHEMES}
    assert spread["multinomial"] > spread["residual"] > spread["ssp"]
    assert spread["multinomial"] > spread["stratified"] > spread["systematic"]


@pytest.mark.parametrize("scheme", ["systematic", "stratified", "residual", "ssp"])
@pytest.mark.parametrize("count", [1, 2, 5, 7])
def test_equal_weights_change_nothing(scheme: Scheme, count: int) -> None:
    weights = normalise(torch.zeros(40, count, dtype=torch.float64))
    uniforms = rng.uniform(rng.key(torch.arange(40), 5), (count + 1,))
    own = torch.arange(count).expand(40, -1)
    assert torch.equal(resample(weights, uniforms, scheme), own)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_populations_do_not_see_each_other(scheme: Scheme) -> None:
    log_weights = rng.normal(rng.key(torch.arange(6), 1), (9,), dtype=torch.float64) * 2
    uniforms = rng.uniform(rng.key(torch.arange(6), 2), (10,))
    together = resample(normalise(log_weights), uniforms, scheme)
    for row in range(6):
        alone = resample(normalise(log_weights[row : row + 1]), uniforms[row : row + 1], scheme)
        assert torch.equal(alone[0], together[row])


def test_the_points_of_a_cumulated_weight() -> None:
    weights = torch.tensor([[0.25, 0.25, 0.5, 0.0]], dtype=torch.float64)
    points = torch.tensor([[0.1, 0.25, 0.26, 0.5, 0.51, 1.0]], dtype=torch.float64)
    # the smallest n whose sum reaches the point; nothing behind the last weight
    assert draw_from(weights, points).tolist() == [[0, 0, 1, 1, 2, 2]]


class TestLogWeights:
    def test_neither_their_offset_nor_their_size_matters(self) -> None:
        log_weights = torch.tensor([[0.0, 1.0, -2.0], [1000.0, 1001.0, 998.0]], dtype=torch.float64)
        weights = normalise(log_weights)
        torch.testing.assert_close(weights[0], weights[1])
        torch.testing.assert_close(weights.sum(1), torch.ones(2, dtype=torch.float64))
        torch.testing.assert_close(log_normalise(log_weights).exp(), weights)

    def test_effective_sizes(self) -> None:
        log_weights = torch.tensor(
            [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, -torch.inf, -torch.inf], [-torch.inf] * 4],
            dtype=torch.float64,
        )
        # all alike, two of four, and no weight at all, which counts as all alike
        assert effective_size(log_weights).tolist() == [4.0, 2.0, 4.0]


def test_mistakes_are_told() -> None:
    with pytest.raises(ConfigError, match=r"must be one of ssp.*'sistematic'. Did you mean 'syst"):
        check_scheme("sistematic")
    with pytest.raises(ValueError, match="ssp takes 5 uniforms a population, but 2 were given"):
        resample(WEIGHTS, torch.rand(1, 2, dtype=torch.float64), "ssp")
