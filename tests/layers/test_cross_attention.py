"""Attention to a context: held to a softmax written out, and to what masks promise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from genscale.layers.cross_attention import CrossAttention

B, N, M, D, HEADS, CONTEXT = 3, 5, 4, 8, 2, 6


def parts(qk_norm: bool = False) -> tuple[CrossAttention, Tensor, Tensor, Tensor]:
    layer = CrossAttention(D, HEADS, CONTEXT, qk_norm=qk_norm).double()
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 1, 0, 0]]).bool()
    return layer, torch.randn(B, N, D).double(), torch.randn(B, M, CONTEXT).double(), mask


def written_out(layer: CrossAttention, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention, one sample and head at a time, over the places that count."""
    q, (k, v) = layer.q(x), layer.kv(context).chunk(2, dim=-1)
    if layer.qk_norm:
        q, k = F.layer_norm(q, (D,), eps=1e-6), F.layer_norm(k, (D,), eps=1e-6)
    size = D // HEADS
    y = torch.zeros_like(x)
    for b in range(B):
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            keys, values = k[b, mask[b], part], v[b, mask[b], part]
            weights = (q[b, :, part] @ keys.T / size**0.5).softmax(-1)
            y[b, :, part] = weights @ values
    return layer.out(y)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_it_is_softmax_attention_over_the_places_that_count(qk_norm: bool) -> None:
    layer, x, context, mask = parts(qk_norm)
    expected = written_out(layer, x, context, mask)
    found = layer(x, layer.project(context), mask)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_without_a_mask_all_places_count() -> None:
    layer, x, context, mask = parts()
    kv = layer.project(context)
    torch.testing.assert_close(layer(x, kv), layer(x, kv, torch.ones_like(mask)))


def test_masked_places_do_not_matter() -> None:
    layer, x, context, mask = parts()
    other = torch.where(mask[:, :, None], context, torch.full_like(context, 1e3))
    first, second = (layer(x, layer.project(each), mask) for each in (context, other))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_sample_without_any_place_attends_to_nothing() -> None:
    layer, x, context, mask = parts()
    mask = mask.clone()
    mask[1] = False
    context.requires_grad_()
    y = layer(x, layer.project(context), mask)
    assert torch.equal(y[1], layer.out.bias.expand(N, D))
    (gradient,) = torch.autograd.grad(y.square().sum(), context)
    assert torch.isfinite(gradient).all()
    assert not gradient[1].any()
    assert gradient[0].any()
