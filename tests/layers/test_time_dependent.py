"""Packed time-dependent vectors: p = value_1 + sigmoid(tau (1 + w) + b) (value_0 - value_1)."""

from __future__ import annotations

import torch

from genscale.layers.time_dependent import TimeDependentVectors


def vectors() -> TimeDependentVectors:
    module = TimeDependentVectors({"scale": (3, 1.0), "bias": (2, 0.0), "other": (4, 1.0)})
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(9, generator=draw))
    return module


def test_each_vector_follows_the_formula() -> None:
    module, tau = vectors(), torch.tensor([-1.0, 0.3])
    found = module(tau)
    assert [tuple(v.shape) for v in found] == [(2, 3), (2, 2), (2, 4)]
    for vector, part in zip(found, module.slices().values(), strict=True):
        gate = torch.sigmoid(tau[:, None] * (1 + module.gate_weight[part]) + module.gate_bias[part])
        expected = module.value_1[part] + gate * (module.value_0[part] - module.value_1[part])
        torch.testing.assert_close(vector, expected)


def test_slices_lie_end_to_end_in_the_layouts_order() -> None:
    assert vectors().slices() == {"scale": slice(0, 3), "bias": slice(3, 5), "other": slice(5, 9)}


def test_a_fresh_model_ignores_time() -> None:
    module = TimeDependentVectors({"scale": (3, 1.0), "bias": (2, 0.0)})
    scale, bias = module(torch.tensor([-1.0, 1.0]))
    assert torch.equal(scale, torch.ones(2, 3))
    assert torch.equal(bias, torch.zeros(2, 2))


def test_one_shared_time_gives_one_row_equal_to_the_rows_of_a_batch() -> None:
    module = vectors()
    for shared, rows in zip(
        module(torch.tensor([0.7])), module(torch.full((3,), 0.7)), strict=True
    ):
        assert shared.shape[0] == 1
        assert torch.equal(shared.expand_as(rows), rows)


def test_half_precision_weights_still_blend_in_float32() -> None:
    assert all(v.dtype == torch.float32 for v in vectors().bfloat16()(torch.tensor([0.5])))
