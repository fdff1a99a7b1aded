"""The fused upsampler equals norm(cat) -> linear, forwards and backwards, and never builds cat."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from genscale.layers import concat_norm
from genscale.layers.concat_norm import concat_norm_linear


def plain(
    features: list[Tensor], gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    normalised = F.layer_norm(torch.cat(features, -1).to(gamma), (gamma.shape[-1],))
    return F.linear(torch.addcmul(beta[:, None], normalised, gamma[:, None]), weight, bias)


def inputs(
    rows: int,
    *,
    batch: int = 2,
    tokens: int = 3,
    width: int = 4,
    count: int = 5,
    out: int = 6,
    dtype: torch.dtype = torch.float64,
    offset: float = 0.0,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """Features, gamma, beta, weight, bias; ``rows`` is 1 (shared time) or the batch."""
    draw = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=dtype)

    features = [normal(batch, tokens, width) * (i + 1) + offset for i in range(count)]
    return (
        [feature.requires_grad_() for feature in features],
        (1 + normal(rows, count * width)).requires_grad_(),
        normal(rows, count * width).requires_grad_(),
        normal(out, count * width).requires_grad_(),
        normal(out).requires_grad_(),
    )


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("slice_width", [4, 8, 4096])  # 1, 2 and all 5 features at a time
def test_values_and_all_gradients_equal_the_plain_way(
    rows: int, slice_width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(concat_norm, "SLICE_WIDTH", slice_width)
    features, *others = inputs(rows)
    leaves = [*features, *others]
    results = []
    for function in (concat_norm_linear, plain):
        y = function(features, *others)
        results.append([y, *torch.autograd.grad(y.pow(3).sum(), leaves)])
    for fused, reference in zip(*results, strict=True):
        torch.testing.assert_close(fused, reference, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rows", [1, 2])
def test_gradcheck(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concat_norm, "SLICE_WIDTH", 6)
    features, *others = inputs(rows, width=3, count=3, out=2)

    def function(*leaves: Tensor) -> Tensor:
        return concat_norm_linear(list(leaves[:3]), *leaves[3:])

    assert torch.autograd.gradcheck(function, (*features, *others))


@pytest.mark.parametrize("detached", ["features", "vectors", "layer"])
def test_what_needs_no_gradient_gets_none_and_the_rest_is_unchanged(detached: str) -> None:
    features, gamma, beta, weight, bias = inputs(2)
    groups = {"features": features, "vectors": [gamma, beta], "layer": [weight, bias]}
    results = []
    for function in (concat_norm_linear, plain):
        for name, tensors in groups.items():
            for tensor in tensors:
                tensor.grad = None
                tensor.requires_grad_(name != detached)
        function(features, gamma, beta, weight, bias).square().sum().backward()
        results.append([t.grad for tensors in groups.values() for t in tensors])
    for fused, reference in zip(*results, strict=True):
        assert (fused is None) == (reference is None)
        if fused is not None and reference is not None:
            torch.testing.assert_close(fused, reference)


def test_variance_survives_a_large_mean() -> None:
    # E[x^2] - E[x]^2 in float32 would lose everything: 1e4^2 / 1 is past 2^24
    features, *others = inputs(1, dtype=torch.float32, offset=1e4)
    fused = concat_norm_linear(features, *others)
    reference = plain([f.double() for f in features], *(o.double() for o in others))
    torch.testing.assert_close(fused.double(), reference, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_only_the_products(dtype: torch.dtype) -> None:
    features, *others = inputs(2, dtype=torch.float32, width=16, tokens=8)
    leaves = [*features, *others]
    mixed = [feature.to(dtype) if i % 2 else feature for i, feature in enumerate(features)]
    exact = plain([feature.float() for feature in mixed], *others)
    exact_grads = torch.autograd.grad(exact.square().mean(), leaves)
    with torch.autocast("cpu", dtype=dtype):
        y = concat_norm_linear(mixed, *others)
    grads = torch.autograd.grad(y.float().square().mean(), leaves)
    assert y.dtype == dtype
    assert all(g.dtype == leaf.dtype for g, leaf in zip(grads, leaves, strict=True))
    # one rounding is 2^-9 of a number in bfloat16; sums of a few of them stay within 2 percent
    for got, expected in zip([y, *grads], [exact, *exact_grads], strict=True):
        error = (got.float() - expected).norm() / expected.norm()
        assert error < 0.02


class LargestTensor(TorchDispatchMode):
    """Remember the most numbers any operation returned in one tensor."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_the_concatenation_never_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concat_norm, "SLICE_WIDTH", 16)
    # 64 positions of 10 features of 8: the concatenation has 5120 numbers, a slice 1024
    features, *others = inputs(2, batch=4, tokens=16, width=8, count=10, out=4)
    others[0], others[1] = others[0][:1], others[1][:1]
    with LargestTensor() as fused:
        concat_norm_linear(features, *others).sum().backward()
    with LargestTensor() as reference:
        plain(features, *others).sum().backward()
    assert fused.numel == 64 * 16
    assert reference.numel == 64 * 80


def test_it_runs_on_the_meta_device() -> None:
    features, *others = inputs(2, dtype=torch.float32)
    y = concat_norm_linear([f.to("meta") for f in features], *(o.to("meta") for o in others))
    assert y.shape == (2, 3, 6)


def test_features_of_several_shapes_are_refused() -> None:
    features, *others = inputs(1)
    features[2] = features[2][..., :3]
    with pytest.raises(ValueError, match=r"one shape.*\(2, 3, 3\), \(2, 3, 4\).*Concatenate"):
        concat_norm_linear(features, *others)


def test_a_weight_of_another_width_is_refused() -> None:
    features, gamma, beta, weight, bias = inputs(1)
    with pytest.raises(ValueError, match="20 channels together, but weight takes 19"):
        concat_norm_linear(features, gamma, beta, weight[:, :19], bias)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2])
def test_it_agrees_with_the_plain_way_on_a_gpu(rows: int) -> None:
    features, *others = inputs(rows, dtype=torch.float32, width=64, tokens=16)
    leaves = [leaf.detach().cuda().requires_grad_() for leaf in (*features, *others)]
    results = []
    for function in (concat_norm_linear, plain):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y = function(leaves[:5], *leaves[5:])
        results.append([y, *torch.autograd.grad(y.float().square().mean(), leaves)])
    for fused, reference in zip(*results, strict=True):
        error = (fused.float() - reference.float()).norm() / reference.float().norm()
        assert error < 0.02  # a few bfloat16 roundings of 2^-9
