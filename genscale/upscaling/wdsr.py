"""WDSR-A: residual blocks that widen before their activation, all convolutions weight-normalised.

Yu et al., "Wide Activation for Efficient and Accurate Image Super-Resolution", arXiv:1808.08718;
with the sizes by which STDO overfits it to videos (Li et al., arXiv:2303.08331).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.errors import ConfigError, did_you_mean
from genscale.upscaling.base import Upscaler, register_to_config

Start = Literal["random", "bicubic"]

_MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K


class NormalizedConv(nn.Module):
    """A convolution whose filters are a length times a direction (arXiv:1602.07868).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: odd; the size of the picture stays.
        length: of every filter at the start.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, length: float
    ) -> None:
        super().__init__()
        self.length = length
        self.weight_g = nn.Parameter(torch.empty(out_channels, 1, 1, 1))
        self.weight_v = nn.Parameter(
            torch.empty(out_channels, in_channels, kernel_size, kernel_size)
        )
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw directions anew; lengths and biases are constants."""
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5.0))
        nn.init.constant_(self.weight_g, self.length)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_channels, h, w)`` to ``(B, out_channels, h, w)``."""
        norm = self.weight_v.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()
        weight = self.weight_v * (self.weight_g / norm)
        return F.conv2d(x, weight, self.bias, padding=self.weight_v.shape[-1] // 2)


class WideBlock(nn.Module):
    """x + conv(relu(conv(x))), with ``expansion`` times as many channels between.

    Args:
        hidden_size: channels of x.
        expansion: how much wider the activation is.
        kernel_size: of both convolutions.
        length: of the last convolution's filters at the start.
    """

    def __init__(self, hidden_size: int, expansion: int, kernel_size: int, length: float) -> None:
        super().__init__()
        wide = hidden_size * expansion
        self.widen = NormalizedConv(hidden_size, wide, kernel_size, 2.0)
        self.narrow = NormalizedConv(wide, hidden_size, kernel_size, length)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, hidden_size, h, w)`` to the same shape."""
        out: Tensor = x + self.narrow(F.relu(self.widen(x)))
        return out


class WDSR(Upscaler):
    """A deep path of wide blocks and a shallow one of one convolution, added before the shuffle.

    Pictures are in [0, 1].

    Args:
        scale: factor.
        channels: channels of the pictures, in and out.
        hidden_size: channels between the blocks.
        num_blocks: residual blocks.
        expansion: how much wider their activations are.
        mean: of every channel, taken away before and added behind; None for that of DIV2K, or
            one half where pictures are not RGB.
        start: ``random``; or ``bicubic``: the shallow path interpolates and the deep one is silent,
            which spares a network that is fitted to little data the first half of its steps (ours).

    Raises:
        ConfigError: settings that do not fit together.
    """

    block_classes: ClassVar[tuple[str, ...]] = ("WideBlock",)

    @register_to_config
    def __init__(
        self,
        *,
        scale: int = 2,
        channels: int = 3,
        hidden_size: int = 32,
        num_blocks: int = 16,
        expansion: int = 4,
        mean: Sequence[float] | None = None,
        start: Start = "random",
    ) -> None:
        super().__init__()
        if mean is None:
            mean = _MEAN if channels == 3 else (0.5,) * channels
        if len(mean) != channels:
            raise ConfigError(
                f"mean has {len(mean)} numbers, but channels={channels}; give one a channel."
            )
        if min(scale, hidden_size, num_blocks, expansion) < 1:
            raise ConfigError(
                "scale, hidden_size, num_blocks and expansion must be at least 1, but "
                f"{scale}, {hidden_size}, {num_blocks} and {expansion} were given; change them."
            )
        if start not in get_args(Start):
            raise ConfigError(
                f"start is '{start}', expected random or bicubic."
                f"{did_you_mean(start, get_args(Start))}"
            )
        self.space, self.scales, self.channels = "pixel", (scale,), channels
        self.scale, self.mean, self.start = scale, tuple(mean), start
        out = channels * scale**2
        length = 1.0 / math.sqrt(num_blocks)
        self.head = NormalizedConv(channels, hidden_size, 3, 1.0)
        self.blocks = nn.ModuleList(
            WideBlock(hidden_size, expansion, 3, length) for _ in range(num_blocks)
        )
        self.tail = NormalizedConv(hidden_size, out, 3, 1.0)
        self.skip = NormalizedConv(channels, out, 5, 1.0)
        self._start_interpolating()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew from torch's generator."""
        for module in self.modules():
            if isinstance(module, NormalizedConv):
                module.reset_parameters()
        self._start_interpolating()

    @torch.no_grad()
    def _start_interpolating(self) -> None:
        if self.start != "bicubic":
            return
        self.tail.weight_g.zero_()
        # what each of 5x5 small pixels adds to the large ones in the middle pixel
        taps = torch.eye(25).view(25, 1, 5, 5)
        large = F.interpolate(taps, scale_factor=self.scale, mode="bicubic", align_corners=False)
        inside = slice(2 * self.scale, 3 * self.scale)
        kernels = large[:, 0, inside, inside].permute(1, 2, 0).reshape(-1, 5, 5)
        self.skip.weight_v.zero_()
        for channel, own in enumerate(self.skip.weight_v.chunk(self.channels)):
            own[:, channel] = kernels.to(own)
        self.skip.weight_g.copy_(self.skip.weight_v.flatten(1).norm(dim=1).view(-1, 1, 1, 1))

    def forward(self, x: Tensor, scale: int) -> Tensor:
        """Upscale pictures in [0, 1], not clipped; see :meth:`Upscaler.forward`."""
        self.check(x, scale)
        mean = torch.tensor(self.mean, dtype=x.dtype, device=x.device).view(1, -1, 1, 1)
        x = x - mean
        features = self.head(x)
        for block in self.blocks:
            features = block(features)
        return F.pixel_shuffle(self.tail(features) + self.skip(x), self.scale) + mean
