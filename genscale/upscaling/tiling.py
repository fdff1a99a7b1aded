"""Large inputs in tiles that overlap and are blended linearly."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from genscale.errors import ConfigError


def in_tiles(
    run: Callable[[Tensor], Tensor],
    x: Tensor,
    scale: int,
    *,
    tile: int,
    overlap: int,
    batch: int = 1,
) -> Tensor:
    """Upscale tile by tile.

    All tiles are of one size, ``tile`` or the whole side where that is shorter; the last ones of
    an axis end with it. An output cell is the mean of the tiles that cover it, weighted by ramps
    over the overlap.

    Args:
        run: maps ``(b, C, t, t')`` to ``(b, C', t * scale, t' * scale)``.
        x: ``(B, C, h, w)``.
        scale: of ``run``.
        tile: side of a tile in cells of ``x``.
        overlap: cells that neighbouring tiles share, at least.
        batch: tiles a call of ``run``.

    Returns:
        ``(B, C', h * scale, w * scale)``.

    Raises:
        ConfigError: a tile, overlap or batch that makes no sense.
    """
    check_tiles(tile, overlap, batch)
    height, width = x.shape[2:]
    rows, columns = tile_starts(height, tile, overlap), tile_starts(width, tile, overlap)
    tall, wide = min(tile, height), min(tile, width)
    weight = {
        (top, left): _ramps(top, rows, tall, overlap, scale, x.device)[:, None]
        * _ramps(left, columns, wide, overlap, scale, x.device)
        for top in rows
        for left in columns
    }
    places = [(row, *corner) for row in range(len(x)) for corner in weight]
    total: Tensor | None = None
    for first in range(0, len(places), batch):
        chunk = places[first : first + batch]
        parts = torch.stack([x[n, :, i : i + tall, j : j + wide] for n, i, j in chunk])
        done = run(parts)
        if total is None:
            total = done.new_zeros(len(x), done.shape[1], height * scale, width * scale).float()
        for (n, i, j), part in zip(chunk, done.float(), strict=True):
            rows_out = slice(i * scale, (i + tall) * scale)
            columns_out = slice(j * scale, (j + wide) * scale)
            total[n, :, rows_out, columns_out] += part * weight[i, j]
        kind = done.dtype
    assert total is not None  # x has rows
    covered = total.new_zeros(total.shape[2:])
    for (i, j), ramp in weight.items():
        covered[i * scale : (i + tall) * scale, j * scale : (j + wide) * scale] += ramp
    return (total / covered).to(kind)


def check_tiles(tile: int, overlap: int, batch: int = 1) -> None:
    """Check how something is to be tiled.

    Raises:
        ConfigError: a tile, overlap or batch that makes no sense.
    """
    if tile < 1 or batch < 1 or not 0 <= overlap < tile:
        raise ConfigError(
            "upscaling.tile and batch must be at least 1 and overlap in [0, tile), but "
            f"tile={tile}, overlap={overlap} and batch={batch} were given. Change them."
        )


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Return where the tiles of an axis begin; they cover it, and the last ends with it."""
    if length <= tile:
        return [0]
    return [*range(0, length - tile, tile - overlap), length - tile]


def _ramps(
    start: int, starts: list[int], size: int, overlap: int, scale: int, device: torch.device
) -> Tensor:
    """Return a tile's weights along one axis: rising where one lies before, falling to the next."""
    place = torch.arange(size * scale, device=device, dtype=torch.float32) + 0.5
    weight = torch.ones_like(place)
    if overlap and start != starts[0]:
        weight = (place / (overlap * scale)).clamp(max=1.0)
    if overlap and start != starts[-1]:
        weight = weight.minimum(place.flip(0) / (overlap * scale))
    return weight
