"""Encoder and decoder of a VQGAN (arXiv:2012.09841): residual blocks over levels of resolution."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

_EPS = 1e-6  # of every group norm


@dataclass(frozen=True, slots=True)
class LevelSettings:
    """What encoder and decoder are built of; levels are numbered from the picture's own down.

    Args:
        widths: channels of every level.
        num_blocks: residual blocks a level; the decoder has one more.
        attention_levels: levels with attention behind every block.
        middle_attention: attention at the bottom.
        groups: of the norms; divides all widths.
        dropout: share of activations dropped in the blocks.
    """

    widths: tuple[int, ...]
    num_blocks: int
    attention_levels: tuple[int, ...]
    middle_attention: bool
    groups: int
    dropout: float


class ResidualBlock(nn.Module):
    """x + conv(dropout(SiLU(norm(conv(SiLU(norm(x))))))), with 1 x 1 weights where widths change.

    Args:
        in_channels: channels that come in.
        out_channels: channels that go out.
        groups: of the norms; divides both.
        dropout: share of activations dropped before the last convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.norm_1 = nn.GroupNorm(groups, in_channels, eps=_EPS)
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm_2 = nn.GroupNorm(groups, out_channels, eps=_EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        changes = in_channels != out_channels
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in, H, W)`` to ``(B, out, H, W)``."""
        y = self.conv_1(F.silu(self.norm_1(x)))
        y = self.conv_2(self.dropout(F.silu(self.norm_2(y))))
        return (x if self.shortcut is None else self.shortcut(x)) + y


class SpatialAttention(nn.Module):
    """x + self-attention of one head over all cells.

    Args:
        channels: width.
        groups: of the norm.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=_EPS)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to the same shape."""
        cells = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)[:, None]  # (B, 1, HW, 3C)
        y = F.scaled_dot_product_attention(*cells.chunk(3, dim=-1))  # (B, 1, HW, C)
        return x + self.out(y[:, 0].transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halve height and width with a 3 x 3 convolution of stride 2.

    Args:
        channels: width.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to ``(B, C, H / 2, W / 2)``."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # zeros on the right and at the bottom only


class Upsample(nn.Module):
    """Double height and width by repeating cells, then convolve.

    Args:
        channels: width.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to ``(B, C, 2H, 2W)``."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, each with attention behind it where there is any.

    Args:
        in_channels: channels that come in.
        number: which level.
        num_blocks: residual blocks.
        resample: what leads to the next level, or None at the last.
        settings: of all levels.
    """

    def __init__(
        self,
        in_channels: int,
        number: int,
        num_blocks: int,
        resample: nn.Module | None,
        settings: LevelSettings,
    ) -> None:
        super().__init__()
        width, groups = settings.widths[number], settings.groups
        self.blocks = nn.ModuleList(
            ResidualBlock(before, after, groups, settings.dropout)
            for before, after in pairwise([in_channels] + [width] * num_blocks)
        )
        attends = number in settings.attention_levels
        self.attentions = nn.ModuleList(
            SpatialAttention(width, groups) if attends else nn.Identity() for _ in self.blocks
        )
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in, H, W)`` to ``(B, out, H', W')``."""
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            x = attention(block(x))
        return x if self.resample is None else self.resample(x)


class Middle(nn.Module):
    """The bottom between the halves: block, attention, block.

    Args:
        settings: of all levels.
    """

    def __init__(self, settings: LevelSettings) -> None:
        super().__init__()
        width, groups, dropout = settings.widths[-1], settings.groups, settings.dropout
        self.block_1 = ResidualBlock(width, width, groups, dropout)
        attends = settings.middle_attention
        self.attention = SpatialAttention(width, groups) if attends else nn.Identity()
        self.block_2 = ResidualBlock(width, width, groups, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to the same shape."""
        return self.block_2(self.attention(self.block_1(x)))


class Encoder(nn.Module):
    """Pictures -> latents; ``levels`` run from the picture's resolution down.

    Args:
        in_channels: channels of the pictures.
        out_channels: channels of the latents.
        settings: of all levels.
    """

    def __init__(self, in_channels: int, out_channels: int, settings: LevelSettings) -> None:
        super().__init__()
        widths = settings.widths
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.levels = nn.ModuleList(
            Level(
                widths[max(number - 1, 0)],
                number,
                settings.num_blocks,
                Downsample(width) if number < last else None,
                settings,
            )
            for number, width in enumerate(widths)
        )
        self.middle = Middle(settings)
        self.norm_out = nn.GroupNorm(settings.groups, widths[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map pictures ``(B, C, H, W)`` to ``(B, Cv, H / f, W / f)``, f = 2 ^ (levels - 1)."""
        x = self.conv_in(x)
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.middle(x))))


class Decoder(nn.Module):
    """Latents -> pictures; ``levels`` run from the latents' resolution up, the deepest first.

    Args:
        in_channels: channels of the latents.
        out_channels: channels of the pictures.
        settings: of all levels.
    """

    def __init__(self, in_channels: int, out_channels: int, settings: LevelSettings) -> None:
        super().__init__()
        widths = settings.widths
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(in_channels, widths[-1], 3, padding=1)
        self.middle = Middle(settings)
        self.levels = nn.ModuleList(
            Level(
                widths[min(number + 1, last)],
                number,
                settings.num_blocks + 1,
                Upsample(widths[number]) if number > 0 else None,
                settings,
            )
            for number in range(last, -1, -1)
        )
        self.norm_out = nn.GroupNorm(settings.groups, widths[0], eps=_EPS)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map latents ``(B, Cv, h, w)`` to pictures ``(B, C, f h, f w)``; see :class:`Encoder`."""
        x = self.middle(self.conv_in(x))
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))
