"""Factors on long skips, each against its formula (arXiv:2310.13545)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from genscale.layers.skip_scale import SkipScale, TokenGate


def scale(kind: str, num_skips: int = 3, num_tokens: int = 32, kappa: float = 0.5) -> SkipScale:
    torch.manual_seed(0)
    return SkipScale(kind, num_skips, hidden_size=4, num_tokens=num_tokens, kappa=kappa)


def skip(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_no_scaling_hands_on_the_skip_itself() -> None:
    s = skip(2, 32, 4)
    assert scale("none")(s, 0) is s


@pytest.mark.parametrize(
    ("kind", "factors"),
    [("constant", [0.5**0.5] * 3), ("geometric", [0.25, 0.5, 1.0]), ("channel", [1.0] * 3)],
)
def test_factors_from_the_innermost_to_the_outermost(kind: str, factors: list[float]) -> None:
    s, module = skip(2, 4, 8, 4), scale(kind)
    for index, factor in enumerate(factors):
        torch.testing.assert_close(module(s, index), s * factor)


def test_gates_are_a_bottleneck_over_the_tokens_means() -> None:
    module, s = scale("gate"), skip(2, 32, 4)
    gate = module.gates[1]
    assert isinstance(gate, TokenGate)
    assert gate.linear_1.weight.shape == (2, 32)  # a sixteenth
    inner = torch.relu(s.mean(-1) @ gate.linear_1.weight.T + gate.linear_1.bias)
    factors = torch.sigmoid(inner @ gate.linear_2.weight.T + gate.linear_2.bias)
    torch.testing.assert_close(module(s, 1), s * factors[..., None])
    # grids of as many cells are gated alike
    torch.testing.assert_close(module(s.view(2, 4, 8, 4), 1).view_as(s), module(s, 1))


def test_gates_are_one_a_skip_or_one_for_all() -> None:
    s = skip(1, 32, 4)
    own, shared = scale("gate"), scale("gate_shared")
    assert not torch.equal(own(s, 0), own(s, 2))
    assert torch.equal(shared(s, 0), shared(s, 2))
    # two layers of 32 x 2 weights and their biases: 2 L (L // 16) + L + L // 16 (arXiv:2310.13545)
    count = 2 * 32 * 2 + 32 + 2
    assert sum(p.numel() for p in shared.parameters()) == count
    assert sum(p.numel() for p in own.parameters()) == 3 * count


def test_a_backbone_without_skips_has_no_gates() -> None:
    assert not list(scale("gate", num_skips=0, num_tokens=4).parameters())


@pytest.mark.parametrize("kind", ["constant", "geometric", "gate", "channel"])
def test_half_precision_stays_half(kind: str) -> None:
    module = scale(kind).to(torch.bfloat16)
    assert module(skip(1, 32, 4).bfloat16(), 0).dtype == torch.bfloat16
