"""Features of a condition that scale and shift those of a network, place by place.

Wang et al., "Recovering Realistic Texture in Image Super-Resolution by Deep Spatial Feature
Transform", arXiv:1804.02815; with an encoder that knows the time, as diffusion models that are
conditioned on a small picture have it (Wang et al., StableSR, arXiv:2305.07015).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.errors import ConfigError


class FeatureModulation(nn.Module):
    """h (1 + gamma(c)) + beta(c); a new one changes nothing.

    Args:
        channels: of the features h.
        condition_channels: of the condition's features c.
        hidden_size: channels between.
    """

    def __init__(self, channels: int, condition_channels: int, hidden_size: int = 64) -> None:
        super().__init__()
        self.shared = nn.Conv2d(condition_channels, hidden_size, 3, padding=1)
        self.out = nn.Conv2d(hidden_size, 2 * channels, 3, padding=1)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the first convolution anew; the last is zero."""
        self.shared.reset_parameters()
        nn.init.zeros_(self.out.weight)
        if self.out.bias is not None:
            nn.init.zeros_(self.out.bias)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        """Modulate ``(B, channels, H, W)`` by ``(B, condition_channels, h, w)``.

        A condition of another size is interpolated.
        """
        if condition.shape[2:] != h.shape[2:]:
            condition = F.interpolate(condition, h.shape[2:], mode="bilinear", align_corners=False)
        gamma, beta = self.out(F.silu(self.shared(condition))).chunk(2, dim=1)
        return h * (1.0 + gamma) + beta


class TimeAwareBlock(nn.Module):
    """A residual block whose normalised features are scaled and shifted by an embedding.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        embed_size: of the embedding.
        groups: of the normalisations.
    """

    def __init__(self, in_channels: int, out_channels: int, embed_size: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.embed = nn.Linear(embed_size, 2 * out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = (
            nn.Identity()
            if in_channels == out_channels
            else nn.Conv2d(in_channels, out_channels, 1)
        )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map ``(B, in_channels, h, w)`` to ``(B, out_channels, h, w)``."""
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.embed(F.silu(embedding))[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(F.silu(self.norm2(h) * (1.0 + scale) + shift))
        out: Tensor = self.skip(x) + h
        return out


class TimeAwareEncoder(nn.Module):
    """The first half of a U-Net over a condition: one map of features a level.

    Because it knows the time, it can guide strongly while there is noise and weakly at the end.

    Args:
        in_channels: of the condition, such as the latents of a small picture.
        embed_size: of the embedding of time, and of whatever is joined to it.
        channels: of the levels, the finest first; each is half as large as the one before.
        groups: of the normalisations.

    Raises:
        ConfigError: no level, or channels that the groups do not divide.
    """

    def __init__(
        self, in_channels: int, embed_size: int, channels: Sequence[int], groups: int = 8
    ) -> None:
        super().__init__()
        if not channels or any(count % groups for count in channels):
            raise ConfigError(
                f"channels={list(channels)} must have a level or more, each a multiple of "
                f"groups={groups}; change one of them."
            )
        self.stem = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        before = (channels[0], *channels[:-1])
        self.blocks = nn.ModuleList(
            TimeAwareBlock(old, new, embed_size, groups)
            for old, new in zip(before, channels, strict=True)
        )
        self.downs = nn.ModuleList(
            nn.Conv2d(count, count, 3, stride=2, padding=1) for count in channels[:-1]
        )

    def forward(self, condition: Tensor, embedding: Tensor) -> list[Tensor]:
        """Return the features of every level.

        Args:
            condition: ``(B, in_channels, H, W)``.
            embedding: ``(B, embed_size)``.
        """
        h = self.stem(condition)
        features = []
        for number, block in enumerate(self.blocks):
            if number:
                h = self.downs[number - 1](h)
            h = block(h, embedding)
            features.append(h)
        return features
