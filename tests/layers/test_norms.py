"""Norms: closed forms, precision, and the vectors they ask for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.layers.norm import (
    BLOCK_NORMS,
    AdaptiveRMSNorm,
    RMSNorm,
    TimeDependentLayerNorm,
    TimeDependentRMSNorm,
    WeightedRMSNorm,
    rms_norm,
)


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_rms_norm_adds_eps_outside_the_root() -> None:
    x = torch.tensor([[[3.0, 4.0]]])
    # |x| / sqrt(2) = 5 / sqrt(2) = 3.53553; with eps 1 the divisor is 4.53553
    expected = torch.tensor([[[3.0, 4.0]]]) / 4.53553
    torch.testing.assert_close(rms_norm(x, torch.ones(2), eps=1.0), expected)


def test_weighted_rms_norm_adds_eps_under_the_root_and_weighs_after_the_cast() -> None:
    norm = WeightedRMSNorm(2, eps=12.0)
    norm.weight.data = torch.tensor([1.0, 1 + 2.0**-10])
    # sqrt((9 + 16) / 2 + 12) = sqrt(24.5)
    expected = torch.tensor([[3.0, 4.0]]) / 24.5**0.5
    torch.testing.assert_close(norm(torch.tensor([[3.0, 4.0]])), expected * norm.weight)
    # rounding to half precision comes first: the weight, which half precision lacks, stays
    half = norm(torch.tensor([[3.0, 4.0]], dtype=torch.bfloat16))
    assert torch.equal(half, expected.bfloat16() * norm.weight)
    assert half.dtype == torch.float32


def test_rms_norm_of_zeros_is_zero_with_finite_gradient() -> None:
    x = torch.zeros(1, 1, 4, requires_grad=True)
    y = rms_norm(x, torch.ones(4))
    y.sum().backward()
    assert torch.equal(y, torch.zeros(1, 1, 4))
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_sums_of_squares_do_not_overflow_half_precision() -> None:
    # 300^2 = 90000 is past float16's 65504
    x = torch.full((1, 2, 8), 300.0, dtype=torch.float16)
    assert torch.equal(RMSNorm(8)(x), torch.ones(1, 2, 8, dtype=torch.float16))


@pytest.mark.parametrize("shape", [(2, 5, 8), (2, 3, 4, 8)])
def test_time_dependent_layer_norm_per_sample_and_shared(shape: tuple[int, ...]) -> None:
    norm, x = TimeDependentLayerNorm(8), sample(*shape)
    weight, bias = sample(2, 8, seed=1), sample(2, 8, seed=2)
    y = norm(x, (weight, bias))
    for i in range(2):
        expected = F.layer_norm(x[i], (8,), weight[i], bias[i])
        torch.testing.assert_close(y[i], expected)
        shared = norm(x[i : i + 1], (weight[i : i + 1], bias[i : i + 1]))
        torch.testing.assert_close(shared[0], expected)


def test_time_dependent_rms_norm_scales_each_sample_by_its_own_vector() -> None:
    x, scale = sample(2, 5, 8), sample(2, 8, seed=1)
    y = TimeDependentRMSNorm(8)(x, (scale,))
    torch.testing.assert_close(y[1], rms_norm(x[1:], scale[1])[0])


def test_adaptive_norm_reads_its_scale_off_the_first_token() -> None:
    norm, x = AdaptiveRMSNorm(4), sample(2, 3, 4)
    expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(norm(x), expected)  # the layer starts at a scale of one
    torch.nn.init.eye_(norm.linear.weight)
    torch.testing.assert_close(norm(x), expected * (1 + x[:, :1]))


def test_adaptive_norm_on_a_grid_gives_every_column_its_own_scale() -> None:
    norm, x = AdaptiveRMSNorm(4), sample(2, 3, 5, 4)
    torch.nn.init.eye_(norm.linear.weight)
    expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(norm(x), expected * (1 + x[:, :1]))


@pytest.mark.parametrize("name", sorted(BLOCK_NORMS))
def test_every_norm_keeps_the_type_of_its_input(name: str) -> None:
    norm = BLOCK_NORMS[name](8)
    vectors = [torch.full((2, 8), init) for init in norm.vector_inits.values()]
    x = sample(2, 3, 8).bfloat16()
    assert norm.bfloat16()(x, vectors).dtype == torch.bfloat16
