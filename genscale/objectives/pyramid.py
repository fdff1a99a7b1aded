"""The multi-scale loss of multi-resolution backbones (DiMR, arXiv:2406.09416, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def pyramid_targets(target: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Reduce a target to coarser grids so that unit-variance noise keeps unit variance.

    A grid coarser by k gets the sums over its k x k blocks, divided by k (not k^2: a mean of k^2
    independent numbers has standard deviation 1 / k). A side that k does not divide is covered
    by overlapping windows of k + 1, stride k, zero padding (k + 1) // 2, divided by k + 1 for
    two such sides.

    Args:
        target: ``(B, C, H, W)``, or ``(B, C, T, H, W)``, whose frames are reduced one by one.
        shapes: height and width of each grid, none larger than (H, W).

    Returns:
        One target a grid, ``(B, C, [T,] h, w)``, in the order of ``shapes``.

    Raises:
        ValueError: a grid that no window and stride lead to.
    """
    return [_reduce(target, height, width) for height, width in shapes]


def _reduce(target: Tensor, height: int, width: int) -> Tensor:
    if target.shape[-2:] == (height, width):
        return target
    if target.dim() == 5:
        frames = target.shape[2]
        reduced = _reduce(target.transpose(1, 2).flatten(0, 1), height, width)
        return reduced.unflatten(0, (-1, frames)).transpose(1, 2)
    rows = _window(target.shape[2], height)
    columns = _window(target.shape[3], width)
    sizes, strides, paddings = zip(rows, columns, strict=True)
    # pooling divides by all elements of the window, padding included; each side keeps a root
    factor = math.sqrt(sizes[0] * sizes[1])
    return F.avg_pool2d(target, sizes, strides, paddings) * factor


def _window(size: int, reduced: int) -> tuple[int, int, int]:
    """Return (window, stride, padding) that reduce a side of ``size`` to ``reduced``."""
    if 0 < reduced <= size:
        if size % reduced == 0:
            return size // reduced, size // reduced, 0
        stride = 2
        while stride <= size:
            if (size - 1) // stride + 1 == reduced:
                return stride + 1, stride, (stride + 1) // 2
            stride *= 2
    raise ValueError(
        f"A side of {size} cannot be reduced to {reduced}: divisors of it, or its halvings "
        "rounded up, were expected. Give predictions on such grids."
    )


def pyramid_loss(
    predictions: Sequence[Tensor], target: Tensor, weights: Sequence[float]
) -> tuple[Tensor, list[Tensor]]:
    """Compare predictions at several resolutions with one target.

    Args:
        predictions: ``(B, C, [T,] H_r, W_r)`` each, coarse first.
        target: ``(B, C, [T,] H, W)`` at the finest resolution.
        weights: one a prediction; 0 keeps a prediction in the graph without teaching it, so that
            data-parallel training sees every parameter used.

    Returns:
        ``(B,)`` float32 weighted sum over levels of the mean squared error of each, and these
        errors ``(B,)`` by level.
    """
    shapes = [(prediction.shape[-2], prediction.shape[-1]) for prediction in predictions]
    targets = pyramid_targets(target.float(), shapes)
    errors = [
        (prediction.float() - level).square().flatten(1).mean(1)
        for prediction, level in zip(predictions, targets, strict=True)
    ]
    terms = [weight * error for weight, error in zip(weights, errors, strict=True)]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total, errors
