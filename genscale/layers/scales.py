"""Scales of a picture: growing grids of tokens, and the running latent seen at each of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch.nn.functional as F
from torch import Tensor

from genscale.errors import ConfigError

Scales = tuple[tuple[int, int], ...]
"""Height and width of every scale, coarse first."""


def as_scales(scales: Sequence[int | Sequence[int]]) -> Scales:
    """Return scales as pairs of height and width; a number stands for a square.

    Raises:
        ConfigError: no scales, a size below 1, or a scale smaller than the one before.
    """
    pairs = []
    for scale in scales:
        sides = (scale, scale) if isinstance(scale, int) else tuple(scale)
        if len(sides) != 2 or min(sides) < 1:
            raise ConfigError(
                f"A scale must be a side or [height, width] of at least 1, but {scale!r} was given "
                f"in {list(scales)}. Give e.g. [1, 2, 4]."
            )
        pairs.append((int(sides[0]), int(sides[1])))
    if not pairs or any(a > b for side in zip(*pairs, strict=True) for a, b in pairwise(side)):
        raise ConfigError(
            f"Scales must grow from coarse to fine, but {list(scales)} was given. "
            "Give e.g. [1, 2, 4]."
        )
    return tuple(pairs)


def stretched_scales(scales: Scales, height: int, width: int) -> Scales:
    """Return as many scales that end with another grid, the first one being as it was.

    Of K scales, side s_k becomes s_k r^(k / (K - 1)), r being the new last side over the old one,
    along each axis by itself: coarse scales, which hold the layout, change least. The 1 to 16 of
    VAR's model of 256 pixels become 1, 2, 3, 5, 7, 9, 13, 17, 24, 32, and its published ones for
    512 pixels are 1, 2, 3, 4, 6, 9, 13, 18, 24, 32.

    Args:
        scales: the trained ones.
        height: rows of the last scale.
        width: its columns.
    """
    if scales[-1] == (height, width):
        return scales
    last = len(scales) - 1

    def stretch(trained: list[int], end: int) -> list[int]:
        ratio, sides = end / trained[-1], [1]
        for k, side in enumerate(trained[:-1]):
            sides.append(min(max(sides[-1], round(side * ratio ** (k / last))), end))
        return [*sides[1:], end]

    rows, columns = ([scale[axis] for scale in scales] for axis in (0, 1))
    return tuple(zip(stretch(rows, height), stretch(columns, width), strict=True))


def scale_spans(scales: Scales) -> list[tuple[int, int]]:
    """Return where the tokens of every scale begin and end in the sequence of all of them."""
    ends = list(accumulate(height * width for height, width in scales))
    return list(zip([0, *ends[:-1]], ends, strict=True))


def features_at(latent: Tensor, scale: tuple[int, int]) -> Tensor:
    """Return the running latent as a scale sees it: averaged over areas, row by row.

    Args:
        latent: ``(B, Cv, H, W)``.
        scale: its height and width.

    Returns:
        ``(B, height * width, Cv)``.
    """
    if latent.shape[2:] != scale:
        latent = F.adaptive_avg_pool2d(latent, scale)
    return latent.flatten(2).transpose(1, 2)
