"""A layer norm and a linear layer over the concatenation of many features, never built.

DiMR hands all feature maps of a branch to the next one: 40 maps of width 960, say, become one
vector of 38400 numbers a position, which is normalised and projected to 1920. Written plainly the
concatenation, its normalised copy and their gradients each hold 38400 numbers a position, more
than the whole rest of the network keeps. Here only a slice of a few features exists at a time:

    y = sum_i (gamma_i (f_i - mu) r + beta_i) W_i^T + b,    r = 1 / sqrt(variance + eps),

with mu and the variance from the features' own moments. The gradient of a layer norm needs two
means over the concatenation; both are inner products with numbers that are at hand, so that the
backward pass goes over the features once, as the forward pass does:

    mean(dh)   = g . (gamma W^T) / D,            h the normalised features, dh = gamma (g W)
    mean(dh h) = g . (y - beta W^T - b) / D,     g the gradient of y, D the total width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from genscale.layers.norm import no_autocast, upcast

SLICE_WIDTH = 4096
"""Columns of the concatenation that exist at a time: enough for matrix products at full speed."""


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Return the type in which a linear layer multiplies here: autocast's, or its weight's."""
    device = weight.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def concat_norm_linear(
    features: Sequence[Tensor],
    gamma: Tensor,
    beta: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
) -> Tensor:
    """Compute ``linear(layer_norm(cat(features)))`` without building the concatenation.

    Values and gradients are those of the plain way; statistics and sums are float32 (float64 for
    float64 inputs), products run in autocast's type where it is on. It can be differentiated
    once.

    Args:
        features: n tensors ``(B, N, D)`` of one shape; their types may differ.
        gamma: scale ``(B, n D)``, or ``(1, n D)`` when all samples share it.
        beta: offset, shaped as ``gamma``.
        weight: ``(O, n D)``.
        bias: ``(O,)``.
        eps: added to the variance.

    Returns:
        ``(B, N, O)`` in the type a linear layer would return.

    Raises:
        ValueError: shapes do not fit together.
    """
    shapes = {tuple(feature.shape) for feature in features}
    width = sum(feature.shape[-1] for feature in features)
    if len(shapes) != 1:
        raise ValueError(
            f"All features must have one shape (B, N, D), but {sorted(shapes)} were given. "
            "Concatenate features of different widths plainly instead."
        )
    if weight.shape[1] != width or gamma.shape[-1] != width or beta.shape != gamma.shape:
        raise ValueError(
            f"The features have {width} channels together, but weight takes {weight.shape[1]}, "
            f"gamma has {gamma.shape[-1]} and beta {beta.shape[-1]}. Give one number a channel."
        )
    result: Tensor = _ConcatNormLinear.apply(
        upcast(gamma), upcast(beta), weight, bias, eps, compute_dtype(weight), *features
    )
    return result


def _slices(num_features: int, width: int) -> Iterator[tuple[range, slice]]:
    """Yield the features of each slice and the columns they take in the concatenation."""
    step = max(1, SLICE_WIDTH // width)
    for start in range(0, num_features, step):
        stop = min(start + step, num_features)
        yield range(start, stop), slice(start * width, stop * width)


def _moments(features: Sequence[Tensor], eps: float) -> tuple[Tensor, Tensor]:
    """Return mean and 1 / sqrt(variance + eps) of the concatenation, each ``(B, N, 1)``.

    The variance of the whole is the mean of the parts' variances plus the variance of their
    means; unlike a running sum of squares this loses nothing when the mean is large.
    """
    parts = [_var_mean(upcast(feature)) for feature in features]
    variances = torch.stack([variance for variance, _ in parts])
    means = torch.stack([mean for _, mean in parts])
    between, mean = torch.var_mean(means, dim=0, correction=0)
    return mean, torch.rsqrt(variances.mean(0) + between + eps)


def _var_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return biased variance and mean over the last axis, each ``(B, N, 1)``."""
    if x.device.type != "cpu":
        return torch.var_mean(x, dim=-1, correction=0, keepdim=True)
    # the one-pass kernel is not vectorised on CPUs: two passes are ten times as fast there
    mean = x.mean(-1, keepdim=True)
    norm = torch.linalg.vector_norm(x - mean, dim=-1, keepdim=True)
    return norm.square() / x.shape[-1], mean


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return ``total + a b``, where ``total`` may be of a wider type than the factors."""
    return torch.addmm(total, a, b) if total.dtype == a.dtype else total.add_(a @ b)


class _ConcatNormLinear(torch.autograd.Function):
    """See :func:`concat_norm_linear`; every product is written out in its type, without autocast.

    Names as in the module's docstring: T = B N positions, G the samples ``gamma`` tells apart.
    """

    @staticmethod
    def forward(
        ctx: Any,
        gamma: Tensor,
        beta: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        dtype: torch.dtype,
        *features: Tensor,
    ) -> Tensor:
        batch, tokens, width = features[0].shape
        with no_autocast(weight.device):
            mean, rstd = _moments(features, eps)
            shift = -mean * rstd
            y = bias.to(mean.dtype).repeat(batch * tokens, 1)  # (T, O)
            # rows gamma W^T and beta W^T, (2 G, O), for the backward pass
            projected = y.new_zeros(2 * len(gamma), len(weight))
            for members, columns in _slices(len(features), width):
                rows = weight[:, columns]  # (O, slice)
                z = [
                    _scale(torch.addcmul(shift, upcast(features[i]), rstd), gamma, beta, i, dtype)
                    for i in members
                ]
                y = _add_product(y, _join(z), rows.t().to(dtype))
                if any(ctx.needs_input_grad):
                    vectors = torch.cat((gamma[:, columns], beta[:, columns])).to(y.dtype)
                    projected.addmm_(vectors, rows.t().to(y.dtype))
            result = y.to(dtype)
        ctx.save_for_backward(gamma, beta, weight, bias, mean, rstd, result, projected, *features)
        ctx.dtype = dtype
        return result.view(batch, tokens, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gamma, beta, weight, bias, mean, rstd, y, projected, *features = ctx.saved_tensors
        need_gamma, need_beta, need_weight, need_bias, _, _, *need = ctx.needs_input_grad
        dtype, wide = ctx.dtype, mean.dtype
        batch, tokens, width = features[0].shape
        total = width * len(features)
        with no_autocast(weight.device):
            grad = grad.to(dtype)  # (B, N, O)
            flat = grad.flatten(0, 1)
            grad_wide = grad.to(wide)
            slope, offset = projected.chunk(2)  # (G, O) each
            centred = y.view_as(grad).to(wide) - (offset + bias.to(wide))[:, None]
            mean_dh = (grad_wide * slope[:, None]).sum(-1, keepdim=True) / total
            mean_dh_h = (grad_wide * centred).sum(-1, keepdim=True) / total
            grad_rows = grad_wide.sum(1)  # (B, O)
            grad_bias = grad_rows.sum(0) if need_bias else None
            if len(gamma) == 1:
                grad_rows = grad_rows.sum(0, keepdim=True)
            grad_gamma = torch.empty_like(gamma) if need_gamma else None
            grad_beta = torch.empty_like(beta) if need_beta else None
            grad_weight = torch.empty_like(weight) if need_weight else None
            grads: list[Tensor | None] = [None] * len(features)
            shift = -mean * rstd
            for members, columns in _slices(len(features), width):
                rows = weight[:, columns]  # (O, slice)
                if grad_beta is not None:
                    grad_beta[:, columns] = grad_rows @ rows.to(wide)
                dz_slice = (flat @ rows.to(dtype)).view(batch, tokens, -1)
                z = []
                for place, i in enumerate(members):
                    own = slice(i * width, (i + 1) * width)
                    h = torch.addcmul(shift, upcast(features[i]), rstd)
                    if need_weight:
                        z.append(_scale(h, gamma, beta, i, dtype))
                    dz = dz_slice[..., place * width : (place + 1) * width].to(wide)
                    if grad_gamma is not None:
                        dims = (0, 1) if len(gamma) == 1 else (1,)
                        grad_gamma[:, own] = (dz * h).sum(dims)
                    if need[i]:
                        dh = dz * gamma[:, None, own]
                        dh = torch.addcmul(dh - mean_dh, h, mean_dh_h, value=-1) * rstd
                        grads[i] = dh.to(features[i].dtype)
                if grad_weight is not None:
                    grad_weight[:, columns] = flat.t() @ _join(z)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return (grad_gamma, grad_beta, grad_weight, grad_bias, None, None, *grads)


def _scale(h: Tensor, gamma: Tensor, beta: Tensor, i: int, dtype: torch.dtype) -> Tensor:
    """Return feature i after scale and offset, flat ``(T, D)``, as the product wants it."""
    own = slice(i * h.shape[-1], (i + 1) * h.shape[-1])
    return torch.addcmul(beta[:, None, own], h, gamma[:, None, own]).to(dtype).flatten(0, 1)


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
