"""What an invertible rescaler learns from: a small picture that looks right, and survives 8 bits.

Xiao et al., "Invertible Image Rescaling", arXiv:2005.05650, equations 9 to 12.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Quantise(torch.autograd.Function):
    """Rounding whose gradient is that of the identity, outside the range too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x.clamp(0.0, 1.0) * 255.0) / 255.0

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def quantise(x: Tensor) -> Tensor:
    """Round to the nearest of 256 levels in [0, 1]; the gradient passes as if nothing happened.

    Halves go to the even level, as ``torch.round`` has it.
    """
    out: Tensor = _Quantise.apply(x)
    return out


class RescalingLoss(NamedTuple):
    """A total and its three terms, weights included; numbers of one picture, batch means.

    Args:
        total: the sum.
        fit: how far the small picture is from the reference.
        reconstruction: how far the picture rebuilt from 8 bits and a fresh z is from the original.
        latent: how far z is from a standard normal law.
        extra: how far a rebuilt second latent is from zero; zero where there is none.
    """

    total: Tensor
    fit: Tensor
    reconstruction: Tensor
    latent: Tensor
    extra: Tensor


def rescaling_loss(
    *,
    small: Tensor,
    reference: Tensor,
    rebuilt: Tensor,
    original: Tensor,
    latent: Tensor | None = None,
    scale: int = 1,
    extra: Tensor | None = None,
    fit_weight: float | None = None,
    reconstruction_weight: float = 1.0,
    latent_weight: float = 1.0,
    extra_weight: float = 1.0,
    eps: float = 1e-6,
) -> RescalingLoss:
    """Return IRN's loss; every term is summed over a picture and averaged over the batch.

    Args:
        small: y ``(B, C, h, w)``, not quantised.
        reference: the picture downscaled with the antialiased bicubic filter, the same shape.
        rebuilt: x' ``(B, C, H, W)``, restored from ``quantise(small)`` and a normal z.
        original: x, the same shape.
        latent: z ``(B, D, h, w)`` of the original; None of networks without.
        scale: H / h, for the weight of the fit.
        extra: the second latent that was rebuilt beside ``rebuilt``, of a network with
            ``extra_latent_channels`` (arXiv:2207.11844; no program of it is public, and this term
            follows its abstract).
        fit_weight: weight of |y - reference|^2; None for scale^2, as published.
        reconstruction_weight: weight of the sum of sqrt((x - x')^2 + eps).
        latent_weight: weight of |z|^2.
        extra_weight: weight of |extra|^2.
        eps: under the root.
    """
    fit = _squared_norm(small.float() - reference.float())
    rebuilding = ((rebuilt.float() - original.float()).square() + eps).sqrt().flatten(1)
    terms = (
        (scale**2 if fit_weight is None else fit_weight) * fit,
        reconstruction_weight * rebuilding.sum(1).mean(),
        *(
            fit.new_zeros(()) if part is None else weight * _squared_norm(part.float())
            for part, weight in ((latent, latent_weight), (extra, extra_weight))
        ),
    )
    return RescalingLoss(terms[0] + terms[1] + terms[2] + terms[3], *terms)


def _squared_norm(x: Tensor) -> Tensor:
    """Return the squared norm of a sample, averaged over the batch."""
    return x.square().flatten(1).sum(1).mean()
