"""What keeps optimised noises noise. Values and gradients of the programs: the golden case."""

from __future__ import annotations

import math

import pytest
import torch

from genscale import rng
from genscale.search.noise_regularisers import norm_penalty, shuffles, typicality_penalty


def _noise(count: int, *shape: int) -> torch.Tensor:
    return rng.normal(rng.key(3, torch.arange(count)), shape, dtype=torch.float64)


class TestNormPenalty:
    def test_is_least_where_noise_lies(self) -> None:
        noise = _noise(1, 4, 5, 5)  # D = 100
        least = math.sqrt(99) * noise / noise.norm()
        least.requires_grad_()
        norm_penalty(least).sum().backward()
        assert least.grad is not None
        assert least.grad.abs().max() < 1e-14
        for scale in (0.9, 1.1):
            assert norm_penalty(scale * least) > norm_penalty(least)

    def test_rows_are_apart(self) -> None:
        noise = _noise(3, 2, 2)
        torch.testing.assert_close(norm_penalty(noise)[1:2], norm_penalty(noise[1:2]))

    def test_half_precision_is_computed_in_float32(self) -> None:
        # |z|^2 = 4e4 * 9 is beyond float16
        assert torch.isfinite(norm_penalty(torch.full((1, 200, 200), 3.0, dtype=torch.float16)))


class TestTypicalityPenalty:
    def test_of_typical_noise_is_the_least_there_is(self) -> None:
        # both probabilities count from 1/2 downwards, and once more for the permutations
        penalty = typicality_penalty(_noise(2, 4096), shuffles(3, 4096, 0))
        expected = torch.full((2,), 4 * math.log(2.0), dtype=torch.float64)
        assert ((penalty - expected) < 3.0).all()
        assert (penalty >= expected - 1e-12).all()

    def test_by_hand(self) -> None:
        # two blocks (1, 1) and (1, 1): mean^2 = 2, covariance error [[0, 1], [1, 0]] of norm 1
        penalty = typicality_penalty(torch.ones(1, 4, dtype=torch.float64), block=2)
        log_p1 = -2 * 2.0 / (2 * 2)
        assert float(penalty) == pytest.approx(-log_p1 + math.log(2.0))  # sqrt(2) - 2 < 0

    def test_sees_a_shift_a_scale_and_a_pattern(self) -> None:
        noise = _noise(1, 1024)
        pattern = noise.clone()
        pattern[:, 1::2] = pattern[:, ::2]  # neighbours alike: the law of each element is kept
        for unlike in (noise + 0.5, 1.5 * noise, pattern):
            assert typicality_penalty(unlike) > typicality_penalty(noise) + 10.0

    def test_permutations_count_in_the_mean(self) -> None:
        noise, orders = 1.5 * _noise(2, 64), shuffles(3, 64, 7)
        alone = [typicality_penalty(noise[:, order]) for order in orders]
        torch.testing.assert_close(
            typicality_penalty(noise, orders), typicality_penalty(noise) + sum(alone) / 3
        )

    def test_too_few_elements(self) -> None:
        with pytest.raises(ValueError, match="Blocks of 4 elements were asked for"):
            typicality_penalty(torch.ones(1, 3))


def test_shuffles_are_permutations_and_differ_by_turn() -> None:
    first = shuffles(2, 10, 0)
    assert first.sort(1).values.tolist() == [list(range(10))] * 2
    assert torch.equal(first, shuffles(2, 10, 0))
    assert not torch.equal(first, shuffles(2, 10, 1))
    assert shuffles(0, 10, 0).shape == (0, 10)
