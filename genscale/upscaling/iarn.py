"""IARN: one bijection for downscaling by any factor, another one for each axis if need be.

After Pan et al., "Effective Invertible Arbitrary Image Rescaling", arXiv:2209.13055. No program of
the authors is public: that the picture is split before the couplings, and that they know where in
a small pixel a large one lies, is from the abstract; how both are done here is genscale's reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.errors import ConfigError, DataError
from genscale.upscaling.base import Upscaler, register_to_config
from genscale.upscaling.irn_blocks import DenseBlock, InvBlock, InvertibleChain

_PLACES = 4  # channels of a position map


class IARN(Upscaler):
    """Coupling blocks at full resolution around a bicubic resize, which alone is no bijection.

    A picture x is split into L, what bicubic resizing there and back leaves of it, and x - L. The
    couplings turn both into others, of which the first is made small. On the way back the first is
    made large, zeros stand for the second, and the couplings run backwards. They read, for every
    pixel, where it lies between the small picture's pixels. Pictures are in [0, 1]; weights are
    float32 or float64. A new model is bicubic resizing.

    Args:
        num_blocks: coupling blocks.
        growth: growth of the dense blocks.
        channels: channels C of pictures, large and small.
        scales: whole factors that :meth:`forward` offers; :meth:`downscale` and :meth:`enlarge`
            take any size.
        clamp: bound of the logarithm of a coupling's factor.
        reversible: rebuild activations in the backward pass in place of keeping them.

    Raises:
        ConfigError: no block, or a scale below 1.
    """

    block_classes: ClassVar[tuple[str, ...]] = ()

    @register_to_config
    def __init__(
        self,
        *,
        num_blocks: int = 8,
        growth: int = 32,
        channels: int = 3,
        scales: Sequence[int] = (2, 3, 4),
        clamp: float = 1.0,
        reversible: bool = True,
    ) -> None:
        super().__init__()
        if num_blocks < 1 or min(scales, default=0) < 1:
            raise ConfigError(
                "num_blocks must be at least 1 and scales whole numbers from 1 on, but "
                f"num_blocks={num_blocks} and scales={list(scales)} were given; change them."
            )
        self.space, self.scales, self.channels = "pixel", tuple(scales), channels
        blocks = [
            InvBlock(2 * channels, channels, growth, clamp, given=_PLACES)
            for _ in range(num_blocks)
        ]
        self.operations = InvertibleChain(blocks, reversible)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew from torch's generator; every block is then the identity."""
        for module in self.modules():
            if isinstance(module, DenseBlock):
                module.reset_parameters()

    def forward(self, x: Tensor, scale: int) -> Tensor:
        """Upscale small pictures ``(B, C, h, w)``; see :meth:`Upscaler.forward`."""
        self.check(x, scale)
        return self.enlarge(x, (x.shape[2] * scale, x.shape[3] * scale))

    def downscale(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Return small pictures ``(B, C, *size)``, not quantised, of pictures ``(B, C, H, W)``.

        Raises:
            DataError: a size that is larger than the pictures.
        """
        large = (x.shape[2], x.shape[3])
        _check_sizes(large, size)
        x = self._precise(x)
        low = resized(resized(x, size), large)
        return resized(
            self.couple(torch.cat((low, x - low), dim=1), size)[:, : self.channels], size
        )

    def enlarge(self, y: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the pictures ``(B, C, *size)`` that small pictures ``y`` stand for.

        Raises:
            DataError: a size that is smaller than the small pictures.
        """
        small = (y.shape[2], y.shape[3])
        _check_sizes(size, small)
        first = resized(self._precise(y), size)
        parts = torch.cat((first, torch.zeros_like(first)), dim=1)
        low, rest = self.couple(parts, small, inverse=True).chunk(2, dim=1)
        return low + rest

    def couple(self, parts: Tensor, small: tuple[int, int], inverse: bool = False) -> Tensor:
        """Run the couplings, a bijection of ``(B, 2C, H, W)``.

        Args:
            parts: both halves one behind the other.
            small: size of the small picture.
            inverse: the direction.
        """
        parts = self._precise(parts)
        places = position_map((parts.shape[2], parts.shape[3]), small, like=parts)
        whole = torch.cat((parts, places.expand(len(parts), -1, -1, -1)), dim=1)
        out: Tensor = self.operations(whole, inverse)[0]
        return out[:, : 2 * self.channels]

    def _precise(self, x: Tensor) -> Tensor:
        if self.dtype not in (torch.float32, torch.float64):
            raise ConfigError(
                f"IARN was put into {self.dtype}, where its inverse is none; keep it in float32."
            )
        return x.to(self.dtype)


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize ``(B, C, H, W)`` with the bicubic filter (a = -0.5), antialiased where it shrinks."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False)


def position_map(large: tuple[int, int], small: tuple[int, int], like: Tensor) -> Tensor:
    """Return where the pixels of a large picture lie among those of a small one: ``(1, 4, H, W)``.

    The first two channels are the offsets from the nearest small pixel's centre, down and to the
    right, in small pixels within [-0.5, 0.5]; the others are the sizes of a large pixel there.

    Args:
        large: H and W.
        small: h and w.
        like: gives type and device.
    """
    offsets, sizes = [], []
    for many, few in zip(large, small, strict=True):
        # float64: at whole factors the offsets repeat exactly
        centre = (torch.arange(many, dtype=torch.float64) + 0.5) * few / many - 0.5
        offsets.append(centre - torch.floor(centre + 0.5))
        sizes.append(few / many)
    down, right = torch.meshgrid(*offsets, indexing="ij")
    planes = (down, right, *(torch.full_like(down, size) for size in sizes))
    return torch.stack(planes)[None].to(like)


def _check_sizes(large: tuple[int, int], small: tuple[int, int]) -> None:
    if any(not 1 <= few <= many for many, few in zip(large, small, strict=True)):
        raise DataError(
            f"Pictures of {large[0]}x{large[1]} do not belong to smaller ones of "
            f"{small[0]}x{small[1]}: each side must be at least 1 and not grow; change the size."
        )
