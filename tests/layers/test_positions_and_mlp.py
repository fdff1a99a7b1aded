"""Position tables on other grids, and the gated feed-forward layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from genscale.layers.embed import LearnedPositions
from genscale.layers.mlp import GEGLU, SwiGLU


def ramp(height: int, width: int) -> LearnedPositions:
    """A table whose two channels are the row's and the column's place in [0, 1]."""
    table = LearnedPositions(height, width, 2)
    rows = (torch.arange(height) + 0.5)[:, None].expand(height, width) / height
    columns = (torch.arange(width) + 0.5)[None].expand(height, width) / width
    with torch.no_grad():
        table.table.copy_(torch.stack((rows, columns), -1).flatten(0, 1))
    return table


def test_the_trained_grid_reads_the_table_row_by_row() -> None:
    table = LearnedPositions(2, 3, 4)
    assert torch.equal(table(2, 3)[1, 2], table.table[5])


def test_interpolation_keeps_each_vector_at_its_place_in_the_picture() -> None:
    fine = ramp(8, 8)(16, 8)
    assert fine.shape == (16, 8, 2)
    # away from the border a bicubic curve follows a straight line to a tenth of a cell (1 / 16)
    torch.testing.assert_close(fine[7, 4], torch.tensor([7.5 / 16, 4.5 / 8]), atol=6e-3, rtol=0)


def test_crop_keeps_row_and_column_numbers() -> None:
    table = LearnedPositions(4, 4, 3, resize="crop")
    assert torch.equal(table(2, 3)[1, 2], table.table[1 * 4 + 2])


def test_crop_refuses_a_larger_grid() -> None:
    with pytest.raises(ValueError, match="holds 4 x 4 cells but the input has 4 x 5"):
        LearnedPositions(4, 4, 3, resize="crop")(4, 5)


def test_geglu_is_the_gated_product_of_its_stacked_halves() -> None:
    layer, x = GEGLU(3, 5), torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    (w0, w1), (b0, b1) = layer.gate_up.weight.chunk(2), layer.gate_up.bias.chunk(2)
    expected = layer.down(F.gelu(x @ w0.t() + b0) * (x @ w1.t() + b1))
    torch.testing.assert_close(layer(x), expected)


def test_swiglu_is_the_gated_product_of_its_stacked_halves_without_biases() -> None:
    layer, x = SwiGLU(3, 5), torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    assert [name for name, _ in layer.named_parameters()] == ["gate_up.weight", "down.weight"]
    w0, w1 = layer.gate_up.weight.chunk(2)
    gate = x @ w0.t()
    torch.testing.assert_close(layer(x), layer.down(gate * torch.sigmoid(gate) * (x @ w1.t())))
