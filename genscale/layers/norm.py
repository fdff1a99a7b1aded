"""Normalisation layers, statistics always in float32 (float64 for float64 inputs).

A layer whose scale depends on the condition does not own that scale: it says in
``vector_inits`` which vectors it wants, and its caller hands them to ``forward``, each of shape
``(B, D)``, or ``(1, D)`` when all samples share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def upcast(x: Tensor) -> Tensor:
    """Return half-precision tensors as float32, all others as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context without autocast; devices that know no autocast need none."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def per_sample(vector: Tensor, like: Tensor) -> Tensor:
    """View ``(B or 1, D)`` so that it broadcasts over the positions of ``like`` ``(B, ..., D)``."""
    return vector.view(len(vector), *([1] * (like.dim() - 2)), vector.shape[-1])


def rms_norm(x: Tensor, scale: Tensor, eps: float = 1e-8) -> Tensor:
    """Divide by the root mean square: y = scale x / (|x|_2 / sqrt(D) + eps) (arXiv:1910.07467).

    Args:
        x: ``(B, ..., D)``.
        scale: broadcastable to ``x``.
        eps: added to the root, not under it.
    """
    wide = upcast(x)
    root = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
    return (wide / (root + eps) * scale).to(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale, eps outside the root (arXiv:1910.07467)."""

    vector_inits: ClassVar[dict[str, float]] = {}

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.scale = nn.Parameter(torch.empty(hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with a scale of one."""
        nn.init.ones_(self.scale)

    def forward(self, x: Tensor, vectors: Sequence[Tensor] = ()) -> Tensor:
        """Normalise ``x`` ``(B, ..., D)``; ``vectors`` is empty."""
        return rms_norm(x, upcast(self.scale))


class WeightedRMSNorm(nn.Module):
    """Root-mean-square norm with a learned weight, eps under the root (arXiv:2302.13971).

    y = weight * cast(x / sqrt(mean(x^2) + eps)), the cast being to the type of x.

    Args:
        hidden_size: width D.
        eps: added to the mean square.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with a weight of one."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` ``(..., D)``."""
        wide = upcast(x)
        inverse_root = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * inverse_root).to(x.dtype) * self.weight


class AdaptiveRMSNorm(nn.Module):
    """Root-mean-square norm whose scale 1 + W c is read off the first row of its own input.

    The condition c is the (not yet normalised) class token of a token sequence ``(B, N, D)``. On
    a grid ``(B, H, W, D)`` it is the first row of cells, so that every column gets a scale of its
    own: a quirk of the layer's origin that is kept because the layer has no other meaning there.
    """

    vector_inits: ClassVar[dict[str, float]] = {}

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.eps = eps
        self.linear = nn.Linear(hidden_size, hidden_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with a scale of one, whatever the condition."""
        nn.init.zeros_(self.linear.weight)

    def forward(self, x: Tensor, vectors: Sequence[Tensor] = ()) -> Tensor:
        """Normalise ``x`` ``(B, ..., D)``; ``vectors`` is empty."""
        wide = upcast(x)
        scale = 1 + upcast(self.linear(x[:, :1]))
        inverse_root = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * (scale * inverse_root)).to(x.dtype)


class TimeDependentRMSNorm(nn.Module):
    """Root-mean-square norm with a time-dependent scale (arXiv:2406.09416, released models)."""

    vector_inits: ClassVar[dict[str, float]] = {"scale": 1.0}

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size

    def forward(self, x: Tensor, vectors: Sequence[Tensor]) -> Tensor:
        """Normalise ``x`` ``(B, ..., D)`` with ``vectors = (scale,)``."""
        (scale,) = vectors
        return rms_norm(x, per_sample(scale, x))


class TimeDependentLayerNorm(nn.Module):
    """TD-LN: layer norm with time-dependent weight and bias (arXiv:2406.09416)."""

    vector_inits: ClassVar[dict[str, float]] = {"weight": 1.0, "bias": 0.0}

    def __init__(self, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.eps = eps

    def forward(self, x: Tensor, vectors: Sequence[Tensor]) -> Tensor:
        """Normalise ``x`` ``(B, ..., D)`` with ``vectors = (weight, bias)``."""
        weight, bias = vectors
        wide, shape = upcast(x), (self.hidden_size,)
        if len(weight) == 1:  # shared by all samples: one fused kernel
            y = F.layer_norm(wide, shape, weight[0].to(wide), bias[0].to(wide), self.eps)
        else:
            y = F.layer_norm(wide, shape, eps=self.eps)
            y = torch.addcmul(per_sample(bias, x), y, per_sample(weight, x))
        return y.to(x.dtype)


VectorNorm = RMSNorm | AdaptiveRMSNorm | TimeDependentRMSNorm | TimeDependentLayerNorm
"""A norm over the last axis that takes the vectors it asks for in ``vector_inits``."""

BLOCK_NORMS: dict[str, type[VectorNorm]] = {
    "td_rms": TimeDependentRMSNorm,
    "td_ln": TimeDependentLayerNorm,
    "rms": RMSNorm,
    "ada_rms": AdaptiveRMSNorm,
}
"""The norms by the name that configs use."""
