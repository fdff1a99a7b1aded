"""Norm-aware linear attention and the positions of cells, against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.layers.embed import TimeEmbedding, grid_places, sincos_positions, sinusoid
from genscale.layers.linear_attention import NormAwareLinearAttention, axial_rotation
from genscale.layers.mlp import MLP
from genscale.layers.norm import no_autocast


def attention(size: int = 8, heads: int = 2) -> NormAwareLinearAttention:
    torch.manual_seed(0)
    return NormAwareLinearAttention(size, heads)


def rotation(height: int, width: int, head_size: int) -> tuple[Tensor, Tensor]:
    return axial_rotation(torch.arange(height).double(), torch.arange(width).double(), head_size)


def plainly(module: NormAwareLinearAttention, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """The paper's sums over pairs of tokens, one head and one pair at a time."""
    q, k, v, g = module.qkvg(x[0]).chunk(4, dim=-1)
    size = q.shape[1] // module.num_heads
    cosine, sine = (table[0].repeat_interleave(2, dim=-1) for table in rotation(*grid, size))

    def turned(part: Tensor) -> Tensor:
        swapped = torch.stack((-part[:, 1::2], part[:, 0::2]), dim=-1).flatten(-2)
        return part * cosine + swapped * sine

    rows = []
    for head in range(module.num_heads):
        own = slice(head * size, (head + 1) * size)
        norm = q[:, own].norm(dim=-1, keepdim=True)
        power = 3 * (0.5 + torch.tanh(norm))
        queries = [F.relu(sign * q[:, own] / norm) ** power for sign in (1, -1)]
        keys = [F.relu(sign * k[:, own] ** 3) for sign in (1, -1)]
        weights = sum(turned(a) @ turned(b).T for a, b in zip(queries, keys, strict=True))
        total = sum(a @ b.T for a, b in zip(queries, keys, strict=True)).sum(-1, keepdim=True)
        rows.append(weights @ v[:, own] / (total + 1e-6 * len(q)))
    y = torch.cat(rows, dim=-1)
    picture = v.T.reshape(1, -1, *grid)
    y = y + module.local(picture)[0].flatten(1).T
    return module.out(module.norm(y) * F.silu(g))[None]


def test_it_is_the_sum_over_pairs() -> None:
    module = attention().double()
    x = torch.randn(1, 12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = module(x, (3, 4), rotation(3, 4, 4))
    torch.testing.assert_close(y, plainly(module, x, (3, 4)), rtol=1e-6, atol=1e-7)


def test_zeros_have_finite_values_and_gradients() -> None:
    module = attention()
    with torch.no_grad():
        module.qkvg.bias.zero_()
    x = torch.zeros(1, 4, 8, requires_grad=True)
    y = module(x, (2, 2), rotation(2, 2, 4))
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(x.grad).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in module.parameters())


def test_the_core_keeps_float32_under_autocast() -> None:
    module = attention()
    x = 40 * torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(1))
    exact = module(x, (4, 4), rotation(4, 4, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = module(x, (4, 4), rotation(4, 4, 4))
        with no_autocast(x.device):
            assert (x @ x.transpose(1, 2)).dtype == torch.float32
    # the two projections round at 2^-9, and the cube triples what the first one leaves
    assert (rounded.float() - exact).norm() / exact.norm() < 0.05


def test_rotation_turns_rows_and_columns_by_their_own_frequencies() -> None:
    cosine, sine = rotation(2, 3, 8)
    assert cosine.shape == (1, 6, 4)
    # the cell (1, 2); frequencies 1 and 10^-4, both ends of the range
    expected = torch.tensor([1.0, 1e-4, 2.0, 2e-4])
    torch.testing.assert_close(cosine[0, 5], expected.cos())
    torch.testing.assert_close(sine[0, 5], expected.sin())


# positions and times


@pytest.mark.parametrize("resize", ["interpolate", "extend"])
def test_places_on_the_trained_grid_are_whole_numbers(resize: str) -> None:
    assert grid_places(4, 4, resize).tolist() == [0, 1, 2, 3]


def test_places_on_other_grids() -> None:
    assert grid_places(4, 2, "extend").tolist() == [0, 1, 2, 3]
    # centres of quarters where the trained grid has centres of halves at 0 and 1
    assert grid_places(4, 2, "interpolate").tolist() == [-0.25, 0.25, 0.75, 1.25]


def test_sincos_positions_hold_the_column_first() -> None:
    table = sincos_positions(torch.arange(2).double(), torch.arange(3).double(), 8)
    assert table.shape == (2, 3, 8)
    # the cell in row 1, column 2; frequencies 1 and 10000^(-1/2) = 0.01
    expected = [math.sin(2), math.sin(0.02), math.cos(2), math.cos(0.02)]
    expected += [math.sin(1), math.sin(0.01), math.cos(1), math.cos(0.01)]
    torch.testing.assert_close(table[1, 2], torch.tensor(expected))


def test_sinusoid_of_an_odd_width_ends_in_a_zero() -> None:
    wave = sinusoid(torch.tensor([2.0]), 5)
    expected = [math.cos(2), math.cos(0.02), math.sin(2), math.sin(0.02), 0.0]
    torch.testing.assert_close(wave[0], torch.tensor(expected))


def test_time_embedding_has_the_widths_asked_for() -> None:
    module = TimeEmbedding(6, frequency_size=10, inner_size=7)
    assert module.linear_1.weight.shape == (7, 10)
    assert module(torch.tensor([0.5, 3.0])).shape == (2, 6)
    # the sinusoid is exact also where the weights are not
    assert module.to(torch.bfloat16)(torch.tensor([999.0])).dtype == torch.bfloat16


@pytest.mark.parametrize("gelu", ["none", "tanh"])
def test_mlp_is_two_layers_around_a_gelu(gelu: str) -> None:
    module = MLP(4, 8, gelu=gelu)
    x = torch.linspace(-3, 3, 8).view(2, 4)
    expected = module.down(F.gelu(module.up(x), approximate=gelu))
    assert torch.equal(module(x), expected)
