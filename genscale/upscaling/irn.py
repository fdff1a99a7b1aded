"""IRN: downscaling and upscaling as the two directions of one bijection.

Xiao et al., "Invertible Image Rescaling", arXiv:2005.05650 and 2210.04188; official program
pkuxmq/Invertible-Image-Rescaling (Apache-2.0), whose state dicts load as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from genscale.errors import ConfigError, DataError
from genscale.upscaling.base import Upscaler, register_to_config
from genscale.upscaling.irn_blocks import (
    ConvDownsampling,
    DenseBlock,
    HaarDownsampling,
    InvBlock,
    Invertible,
    InvertibleChain,
)


class IRN(Upscaler):
    """A bijection between a picture x and (y, z): a small picture, and what it lost.

    z is trained to be standard normal whatever y is, so that it need not be kept: upscaling takes
    zeros or a draw in its place. Pictures are in [0, 1]. Weights are float32 or float64: in
    half precision the inverse is none.

    Args:
        scale: how much smaller y is; a power of 2 with ``downsampling="haar"``.
        num_blocks: coupling blocks behind every halving; with ``down_first`` or
            ``downsampling="conv"`` one number, of the blocks behind them all.
        growth: growth of the dense blocks.
        channels: channels of x.
        small_channels: channels of y; None for those of x. One gives a grey picture.
        extra_latent_channels: channels of a second latent beside x, which is zero before
            downscaling and trained to be zero again after upscaling, so that the small picture has
            room to differ (dual latent variables, arXiv:2207.11844). 0 is IRN as published.
        downsampling: ``haar``, or ``conv``: a learnt mixing of the pixels of a square.
        down_first: halve as often as needed before the first block.
        clamp: bound of the logarithm of a coupling's factor.
        reversible: rebuild activations in the backward pass in place of keeping them, so that
            memory does not grow with depth.

    Raises:
        ConfigError: settings that do not fit together.
    """

    # the unit of recomputation is the whole chain, so blocks are not wrapped one by one
    block_classes: ClassVar[tuple[str, ...]] = ()

    @register_to_config
    def __init__(
        self,
        *,
        scale: int = 4,
        num_blocks: Sequence[int] = (8, 8),
        growth: int = 32,
        channels: int = 3,
        small_channels: int | None = None,
        extra_latent_channels: int = 0,
        downsampling: Literal["haar", "conv"] = "haar",
        down_first: bool = False,
        clamp: float = 1.0,
        reversible: bool = True,
    ) -> None:
        super().__init__()
        self.space, self.scales, self.channels = "pixel", (scale,), channels
        self.scale, self.image_channels = scale, channels
        self.small_channels = channels if small_channels is None else small_channels
        self.extra_latent_channels = extra_latent_channels
        plan = _plan(scale, num_blocks, downsampling, down_first)
        if not 1 <= self.small_channels < channels * scale**2:
            raise ConfigError(
                f"small_channels is {self.small_channels}, expected 1 to "
                f"{channels * scale**2 - 1}, one less than all channels at scale {scale}; "
                "change it."
            )
        if extra_latent_channels < 0:
            raise ConfigError(
                f"extra_latent_channels must be 0 or more, but {extra_latent_channels} was given; "
                "change it."
            )
        self.channels = self.small_channels  # what is upscaled
        layers: list[Invertible] = []
        width = channels + extra_latent_channels
        for factor, blocks in plan:
            if factor > 1 and downsampling == "conv":
                layers.append(ConvDownsampling(factor))
            elif factor > 1:
                layers.append(HaarDownsampling(width))
            width *= factor**2
            if blocks and width <= self.small_channels:
                raise ConfigError(
                    f"Blocks of {width} channels cannot split off small_channels="
                    f"{self.small_channels}; give fewer, or down_first=true."
                )
            layers += [InvBlock(width, self.small_channels, growth, clamp) for _ in range(blocks)]
        self.operations = InvertibleChain(layers, reversible)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew from torch's generator; every block is then the identity."""
        for module in self.modules():
            if isinstance(module, HaarDownsampling | ConvDownsampling | DenseBlock):
                module.reset_parameters()

    def forward(self, x: Tensor, scale: int) -> Tensor:
        """Upscale small pictures ``(B, C, h, w)`` with z = 0; see :meth:`Upscaler.forward`."""
        self.check(x, scale)
        return self.restore(x, x.new_zeros(len(x), *self.latent_shape(x)))

    def downscale(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the small picture, not quantised, and the latent of what it lost.

        Args:
            x: ``(B, channels, H, W)`` in [0, 1], with sides that the scale divides.

        Returns:
            y ``(B, small_channels, H / scale, W / scale)`` and z, as :meth:`latent_shape` says.

        Raises:
            DataError: other sides or channels.
        """
        self._check_picture(x)
        if self.extra_latent_channels:
            x = torch.cat((x, x.new_zeros(len(x), self.extra_latent_channels, *x.shape[2:])), dim=1)
        out, _ = self.transform(x)
        return out[:, : self.small_channels], out[:, self.small_channels :]

    def restore(self, y: Tensor, z: Tensor) -> Tensor:
        """Return the picture that :meth:`downscale` maps to ``(y, z)``."""
        return self.invert(y, z)[0]

    def invert(self, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the picture ``(B, channels, H, W)`` behind ``(y, z)``, and the second latent.

        The latter is ``(B, extra_latent_channels, H, W)``: zero where ``y`` and ``z`` are exactly
        what :meth:`downscale` returned, something else where ``y`` was rounded or ``z`` drawn.

        Raises:
            DataError: shapes that do not belong together.
        """
        if y.shape[1] != self.small_channels or tuple(z.shape[1:]) != self.latent_shape(y):
            raise DataError(
                f"A small picture of shape {tuple(y.shape)} was given a latent of shape "
                f"{tuple(z.shape)}, expected {self.small_channels} channels and "
                f"(B, {', '.join(map(str, self.latent_shape(y)))}); give what downscale returns."
            )
        out = self.transform(torch.cat((y, z.to(y.dtype)), dim=1), inverse=True)[0]
        return out[:, : self.image_channels], out[:, self.image_channels :]

    def latent_shape(self, y: Tensor) -> tuple[int, int, int]:
        """Return the shape (channels, h, w) of one z beside small pictures ``y``."""
        return (
            self._all_channels * self.scale**2 - self.small_channels,
            y.shape[2],
            y.shape[3],
        )

    def transform(self, x: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """Run the bijection.

        Args:
            x: ``(B, channels + extra_latent_channels, H, W)``; for the inverse y and z, one behind
                the other.
            inverse: the direction.

        Returns:
            The image of ``x`` in the model's type, autocast or not, and the logarithm of the
            determinant of one picture, averaged over the batch, of that direction.
        """
        if self.dtype not in (torch.float32, torch.float64):
            raise ConfigError(
                f"IRN was put into {self.dtype}, where its inverse is none; keep it in float32."
            )
        if not inverse:
            self._check_picture(x, self._all_channels)
        out: tuple[Tensor, Tensor] = self.operations(x.to(self.dtype), inverse)
        return out

    @property
    def _all_channels(self) -> int:
        return self.image_channels + self.extra_latent_channels

    def _check_picture(self, x: Tensor, channels: int | None = None) -> None:
        channels = self.image_channels if channels is None else channels
        if x.dim() != 4 or x.shape[1] != channels or any(n % self.scale for n in x.shape[2:]):
            raise DataError(
                f"IRN downscales pictures (B, {channels}, H, W) with sides that "
                f"{self.scale} divides, but got {tuple(x.shape)}; pad or crop them first."
            )


def _plan(
    scale: int, num_blocks: Sequence[int], downsampling: str, down_first: bool
) -> list[tuple[int, int]]:
    """Return the factor of every downsampling and the number of blocks behind it."""
    if downsampling == "conv":
        factors, first = [scale], True
    elif downsampling == "haar":
        factors, first = [2] * (scale.bit_length() - 1), down_first
        if scale < 2 or 2 ** len(factors) != scale:
            raise ConfigError(
                f"scale is {scale}, but downsampling=haar halves: give 2, 4 or 8, or "
                "downsampling=conv."
            )
    else:
        raise ConfigError(f"downsampling is '{downsampling}'; give haar or conv.")
    if scale < 2 or len(num_blocks) != (1 if first else len(factors)):
        raise ConfigError(
            f"num_blocks={list(num_blocks)} has {len(num_blocks)} entries, expected "
            f"{1 if first else len(factors)} for scale={scale} with downsampling={downsampling} "
            f"and down_first={str(down_first).lower()}; change one of them."
        )
    blocks = [0] * (len(factors) - 1) + [num_blocks[0]] if first else list(num_blocks)
    return list(zip(factors, blocks, strict=True))
