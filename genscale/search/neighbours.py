"""Noises around a noise: on the sphere through it, where typical noises lie."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genscale.samplers.base import Sampler
from genscale.samplers.next_scale import NextScale


def neighbours(pivot: Tensor, directions: Tensor, cosine: Tensor | float) -> Tensor:
    """Return noises at an angle from a pivot, of the pivot's norm (arXiv:2501.09732, sec. 3).

    n' = |n| (c u + sqrt(1 - c^2) w), with u = n / |n|, and w the part of the direction that is
    orthogonal to u, normalised. A noise of a single number has no such part: there
    n' = c n + sqrt(1 - c^2) v, which is normal where n and v are.

    Args:
        pivot: ``(B, ...)`` unit normal.
        directions: ``(B, N, ...)`` unit normal v.
        cosine: of the angle, c in [0, 1]: 1 stays, 0 goes as far as there is; a number, or
            ``(B, N)``.

    Returns:
        ``(B, N, ...)`` of the pivot's dtype.
    """
    old = pivot.double().flatten(1)[:, None]  # (B, 1, D)
    way = directions.double().flatten(2)  # (B, N, D)
    near = torch.as_tensor(cosine, dtype=torch.float64, device=pivot.device)
    near = near.expand(way.shape[:2])[..., None]
    far = (1.0 - near**2).clamp(min=0.0).sqrt()
    if old.shape[-1] > 1:
        radius = torch.linalg.vector_norm(old, dim=-1, keepdim=True)
        unit = old / radius
        way = way - (way * unit).sum(-1, keepdim=True) * unit
        way = radius * way / torch.linalg.vector_norm(way, dim=-1, keepdim=True)
    return (near * old + far * way).to(pivot.dtype).view(directions.shape)


def cosine_of_step(pivot: Tensor, length: Tensor) -> Tensor:
    """Return the cosine of a step along the tangent that is then pulled back to the sphere.

    Args:
        pivot: ``(B, ...)``.
        length: ``(B, N)`` lengths of the steps, in units of sqrt(D).

    Returns:
        ``(B, N)`` float64 on the pivot's device.
    """
    radius: Tensor = torch.linalg.vector_norm(pivot.double().flatten(1), dim=-1, keepdim=True)
    size = math.sqrt(pivot[0].numel())
    return (1.0 + (length.to(radius) * size / radius) ** 2).rsqrt()


def deaf_to_noise(name: str, sampler: Sampler) -> list[str]:
    """Return why a search over start noises cannot move anything with this sampler, if so."""
    if not isinstance(sampler, NextScale):
        return []
    if sampler.top_k != 1 and any(temperature > 0.0 for temperature in sampler.temperatures):
        return []
    return [
        f"search {name} looks for better noise, but sampler {sampler.label} takes the likeliest "
        "tokens whatever the noise. Use a positive sampler.temperature, and sampler.top_k other "
        "than 1."
    ]
