"""The quaternion wavelet transform: four real wavelet trees, whose phases tell where edges lie.

Chan, Choi and Baraniuk, "Coherent Multiscale Image Processing Using Dual-Tree Quaternion Wavelets",
IEEE TIP 2008; filters of Kingsbury's dual tree ("Complex Wavelets for Shift Invariant Analysis and
Filtering of Signals", 2001). Every axis has two orthonormal trees, half a sample apart at every
level, so that their wavelets are nearly a Hilbert pair; the four pairs of trees of both axes are
the parts 1, i (rows), j (columns) and k of a quaternion. Each of the four is invertible alone.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from genscale.errors import ConfigError

# Kingsbury's q-shift filter of six taps: orthonormal, delayed by a quarter of a sample; its mirror
# image is delayed by three quarters
_QUARTER = (
    *(0.0351638400, 0.0, -0.0883294200, 0.2338903200, 0.7602723700),
    *(0.5875183000, 0.0, -0.1143018400, 0.0, 0.0),
)


class QuaternionBands(NamedTuple):
    """What a transform leaves; parts of quaternions are 1, i, j, k.

    Args:
        low: ``(B, C, 4, H / 2^levels, W / 2^levels)``: the four means.
        high: of every level, the finest first: ``(B, C, 3, 4, h, w)`` of changes along columns,
            rows, and both.
    """

    low: Tensor
    high: tuple[Tensor, ...]


def quaternion_wavelet(x: Tensor, levels: int = 1) -> QuaternionBands:
    """Transform pictures, which are periodic.

    Args:
        x: ``(B, C, H, W)`` with sides that ``2^levels`` divides.
        levels: how often the means are split again. One gives 16 bands a channel.

    Raises:
        ConfigError: no level, or other sides.
    """
    if levels < 1 or any(side % 2**levels for side in x.shape[2:]):
        raise ConfigError(
            f"A wavelet transform of {levels} levels needs at least one, and sides that "
            f"{2 ** max(levels, 1)} divides, but pictures of {x.shape[2]}x{x.shape[3]} were given; "
            "pad them, or give fewer levels."
        )
    low = x[:, :, None].expand(-1, -1, 4, -1, -1)
    high = []
    for level in range(levels):
        split = torch.stack([_split(low[:, :, part], part, level) for part in range(4)], dim=3)
        low = split[:, :, 0]
        high.append(split[:, :, 1:])
    return QuaternionBands(low, tuple(high))


def inverse_quaternion_wavelet(bands: QuaternionBands) -> Tensor:
    """Return the pictures ``(B, C, H, W)`` of bands, the mean of what the four trees say."""
    low = bands.low
    for level in reversed(range(len(bands.high))):
        whole = torch.cat((low[:, :, None], bands.high[level]), dim=2)  # (B, C, 4 bands, 4 parts)
        low = torch.stack([_join(whole[:, :, :, part], part, level) for part in range(4)], dim=2)
    return low.mean(dim=2)


def magnitude(bands: Tensor, dim: int) -> Tensor:
    """Return the lengths of quaternions, which move little where the picture is shifted."""
    return bands.square().sum(dim=dim).sqrt()


def _split(x: Tensor, part: int, level: int) -> Tensor:
    """Return the bands ``(B, C, 4, H/2, W/2)`` of one tree: means, columns, rows, both."""
    rows, columns = _matrices(x, part, level)
    out = rows @ x @ columns.mT
    height, width = out.shape[2] // 2, out.shape[3] // 2
    corners = out.unflatten(3, (2, width)).unflatten(2, (2, height))  # (B, C, 2, h, 2, w)
    return corners.movedim(4, 3).flatten(2, 3)


def _join(bands: Tensor, part: int, level: int) -> Tensor:
    """Undo :func:`_split`."""
    corners = bands.unflatten(2, (2, 2)).movedim(3, 4)  # (B, C, 2, h, 2, w)
    whole = corners.flatten(4, 5).flatten(2, 3)
    rows, columns = _matrices(whole, part, level)
    return rows.mT @ whole @ columns


def _matrices(x: Tensor, part: int, level: int) -> tuple[Tensor, Tensor]:
    """Return the matrices of rows and of columns; i is the second tree of rows, j of columns."""
    rows = wavelet_matrix(x.shape[2], part % 2, level).to(x)
    return rows, wavelet_matrix(x.shape[3], part // 2, level).to(x)


@lru_cache(maxsize=64)
def wavelet_matrix(size: int, tree: int, level: int) -> Tensor:
    """Return one level of one tree as an orthonormal matrix ``(size, size)``, float64.

    The first half of the rows gives means, the second changes.

    Args:
        size: of the periodic signal, even.
        tree: 0 or 1.
        level: 0 is the finest: there both trees have one filter, a sample apart; at others, one
            has the mirror image of the other's.
    """
    taps = list(_QUARTER)
    if level > 0 and tree == 1:
        taps.reverse()
    shift = tree if level == 0 else 0
    count = len(taps)
    changes = [(-1) ** n * taps[count - 1 - n] for n in range(count)]
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for half, own in enumerate((taps, changes)):
        for row in range(size // 2):
            for n, tap in enumerate(own):
                matrix[half * (size // 2) + row, (2 * row + n - count // 2 + shift) % size] += tap
    # published to ten digits; one step of Newton's makes them orthonormal to the last
    return 1.5 * matrix - 0.5 * matrix @ matrix.mT @ matrix
