"""Parts of a DiMR's branches: blocks on tokens and on grids, and the way to a finer branch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from einops import rearrange
from torch import Tensor, nn

from genscale.backbones.dimr_settings import BranchSettings
from genscale.layers.attention import SelfAttention
from genscale.layers.concat_norm import concat_norm_linear
from genscale.layers.mlp import GEGLU
from genscale.layers.norm import BLOCK_NORMS, TimeDependentLayerNorm, VectorNorm


class TransformerBlock(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x)), on tokens ``(B, N, D)``."""

    def __init__(self, settings: BranchSettings, norm: str, *, axial_rope: bool) -> None:
        super().__init__()
        size = settings.hidden_size
        self.attention_norm: VectorNorm = BLOCK_NORMS[norm](size)
        self.attention = SelfAttention(size, settings.num_heads, axial_rope=axial_rope)
        self.mlp_norm: VectorNorm = BLOCK_NORMS[norm](size)
        self.mlp = GEGLU(size, settings.mlp_size)
        self.dropout = nn.Dropout(settings.dropout)
        self.num_vectors = 2 * len(self.mlp_norm.vector_inits)

    def forward(
        self, x: Tensor, vectors: tuple[Tensor, ...], positions: Tensor | None = None
    ) -> Tensor:
        """Advance tokens; ``vectors`` are those of both norms, in order."""
        half = self.num_vectors // 2
        x = x + self.dropout(self.attention(self.attention_norm(x, vectors[:half]), positions))
        return x + self.dropout(self.mlp(self.mlp_norm(x, vectors[half:])))


class ConvNeXtBlock(nn.Module):
    """x += depthwise convolution(x); x += mlp(norm(x)), on a grid ``(B, H, W, D)``.

    Not the ConvNeXt block of arXiv:2201.03545: the convolution is a residual branch of its own,
    without a norm before or an activation after it.
    """

    def __init__(self, settings: BranchSettings, norm: str) -> None:
        super().__init__()
        size, kernel = settings.hidden_size, settings.kernel_size
        self.conv = nn.Conv2d(size, size, kernel, padding=kernel // 2, groups=size)
        self.mlp_norm: VectorNorm = BLOCK_NORMS[norm](size)
        self.mlp = GEGLU(size, settings.mlp_size)
        self.dropout = nn.Dropout(settings.dropout)
        self.num_vectors = len(self.mlp_norm.vector_inits)

    def forward(
        self, x: Tensor, vectors: tuple[Tensor, ...], positions: Tensor | None = None
    ) -> Tensor:
        """Advance a grid; ``vectors`` are those of the norm, ``positions`` is not used."""
        # both permutations are views: the convolution reads and writes channels-last memory
        mixed = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.dropout(mixed)
        return x + self.dropout(self.mlp(self.mlp_norm(x, vectors)))


class FeatureUpsampler(nn.Module):
    """All features of a coarser branch -> one map on the finer grid.

    TD-LN over the concatenated features, linear layer to ``ratio``^2 cells, TD-LN.

    Args:
        num_features: how many maps the coarser branch hands over.
        coarse_size: their width.
        hidden_size: width D of the result.
        ratio: finer cells along one side of a coarser cell.
        fused: never build the concatenation (:mod:`genscale.layers.concat_norm`).
    """

    def __init__(
        self, num_features: int, coarse_size: int, hidden_size: int, ratio: int, *, fused: bool
    ) -> None:
        super().__init__()
        self.ratio, self.fused = ratio, fused
        self.norm_in = TimeDependentLayerNorm(num_features * coarse_size)
        self.project = nn.Linear(num_features * coarse_size, hidden_size * ratio**2)
        self.norm_out = TimeDependentLayerNorm(hidden_size)

    def forward(
        self, features: list[Tensor], height: int, width: int, vectors: Iterator[Tensor]
    ) -> Tensor:
        """Upsample features.

        Args:
            features: ``(B, N, D_low)`` each; tokens before the last ``height * width`` are left
                out.
            height: rows of the coarser grid.
            width: its columns.
            vectors: the next four are those of both norms.

        Returns:
            ``(B, height * ratio, width * ratio, D)``.
        """
        gamma, beta = islice(vectors, 2)
        if self.fused:
            y = concat_norm_linear(
                features, gamma, beta, self.project.weight, self.project.bias, self.norm_in.eps
            )
        else:
            y = self.project(self.norm_in(torch.cat(features, dim=-1), (gamma, beta)))
        y = y[:, -height * width :]
        # channels are ordered (row, column, channel): not the order of torch's PixelShuffle
        y = rearrange(y, "b (h w) (i j c) -> b (h i) (w j) c", h=height, i=self.ratio, j=self.ratio)
        return self.norm_out(y, tuple(islice(vectors, 2)))
