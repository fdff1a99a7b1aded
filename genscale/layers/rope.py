"""Rotary position embeddings."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.layers.norm import upcast


def axial_positions(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Return the cell centres of a grid whose longer axis spans [-1, 1].

    Cells are square: the shorter axis spans less, in proportion. A finer grid over the same
    picture therefore samples the same range more densely.

    Returns:
        ``(height * width, 2)`` float32 (row, column) positions, row by row.
    """
    longest = max(height, width)

    def centres(count: int) -> Tensor:
        edges = torch.linspace(-count / longest, count / longest, count + 1, device=device)
        return (edges[:-1] + edges[1:]) / 2

    grid = torch.meshgrid(centres(height), centres(width), indexing="ij")
    return torch.stack(grid, dim=-1).flatten(0, 1)


class AxialRoPE(nn.Module):
    """Rotary embedding with learned frequencies, half of them for rows, half for columns.

    Channel pairs (0, 1), (2, 3), ... are turned by position times exp(log-frequency). When
    ``head_size`` is no multiple of 4 the trailing channels are left as they are.

    Args:
        head_size: channels of one head.
        num_heads: heads; each learns frequencies of its own.
    """

    def __init__(self, head_size: int, num_heads: int) -> None:
        super().__init__()
        self.freqs_h = nn.Parameter(torch.empty(num_heads, head_size // 4))
        self.freqs_w = nn.Parameter(torch.empty(num_heads, head_size // 4))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Spread the log-frequencies evenly over [log pi, log 5 pi]."""
        for freqs in (self.freqs_h, self.freqs_w):
            freqs.copy_(initial_log_frequencies(freqs.shape[1]))

    def rotation(self, positions: Tensor, num_prefix_tokens: int = 0) -> tuple[Tensor, Tensor]:
        """Return cosines and sines ``(h, N, d // 4 * 2)`` for ``positions`` ``(N', 2)``.

        The first ``num_prefix_tokens`` of the N tokens (a class token) have no place in the
        picture and are turned by zero.
        """
        rows = positions[:, 0, None] * upcast(self.freqs_h).exp()[:, None]
        columns = positions[:, 1, None] * upcast(self.freqs_w).exp()[:, None]
        angles = torch.cat((rows, columns), dim=-1)  # (h, N', d // 4 * 2)
        angles = F.pad(angles, (0, 0, num_prefix_tokens, 0))
        return angles.cos(), angles.sin()


def initial_log_frequencies(count: int) -> Tensor:
    """Return ``(count,)`` log-frequencies evenly spaced over [log pi, log 5 pi]."""
    return torch.linspace(math.log(math.pi), math.log(5 * math.pi), count)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn the channel pairs of ``x`` ``(B, h, N, d)`` by angles ``(h, N, pairs)``."""
    turned, rest = x.split([2 * cosine.shape[-1], x.shape[-1] - 2 * cosine.shape[-1]], dim=-1)
    even, odd = turned[..., 0::2], turned[..., 1::2]
    pairs = torch.stack((even * cosine - odd * sine, odd * cosine + even * sine), dim=-1)
    return torch.cat((pairs.flatten(-2).to(x.dtype), rest), dim=-1)
