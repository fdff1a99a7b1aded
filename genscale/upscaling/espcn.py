"""ESPCN: three convolutions and a rearrangement of pixels.

Shi et al., "Real-Time Single Image and Video Super-Resolution Using an Efficient Sub-Pixel
Convolutional Neural Network", arXiv:1609.05158. The authors published no PyTorch program; state
dicts of two well-known ports load through ``genscale.io.converters.espcn``.
"""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.errors import ConfigError, did_you_mean
from genscale.layers.ycbcr import rgb_to_ycbcr, ycbcr_to_rgb
from genscale.upscaling.base import Upscaler, register_to_config

Output = Literal["auto", "linear", "clamp", "sigmoid"]


class ESPCN(Upscaler):
    """Conv 5x5, tanh, conv 3x3, tanh, conv 3x3 to scale^2 channels each, pixel shuffle.

    Pictures are in [0, 1].

    Args:
        scale: factor.
        channels: channels of the pictures, in and out.
        hidden_size: channels behind the first convolution; the second has half of them.
        output: ``linear`` as in the paper; ``clamp`` to [0, 1]; ``sigmoid``; ``auto`` is linear in
            training, where a clamp has no gradient outside, and clamps in evaluation.
        luma: upscale the luma of RGB pictures (BT.601) alone, as papers do, and interpolate the
            chroma bicubically; ``channels`` is 3 then, and the network has one.
        icnr: start the last convolution with equal filters for the pixels of a square, which gives
            no checkerboard (Aitken et al., arXiv:1707.02937).

    Raises:
        ConfigError: settings that do not fit together.
    """

    tile_overlap: int = 8  # the network sees four pixels around
    block_classes: ClassVar[tuple[str, ...]] = ()

    @register_to_config
    def __init__(
        self,
        *,
        scale: int = 3,
        channels: int = 1,
        hidden_size: int = 64,
        output: Output = "auto",
        luma: bool = False,
        icnr: bool = False,
    ) -> None:
        super().__init__()
        if output not in get_args(Output):
            raise ConfigError(
                f"output is '{output}', expected one of {', '.join(get_args(Output))}."
                f"{did_you_mean(output, get_args(Output))}"
            )
        if luma and channels != 3:
            raise ConfigError(f"luma=true needs RGB pictures, but channels={channels}; give 3.")
        if scale < 1 or hidden_size < 2:
            raise ConfigError(
                "scale must be at least 1 and hidden_size at least 2, but "
                f"scale={scale} and hidden_size={hidden_size} were given; change them."
            )
        self.space, self.scales, self.channels = "pixel", (scale,), channels
        self.scale, self.output, self.luma, self.icnr = scale, output, luma, icnr
        own = 1 if luma else channels
        self.feature_maps = nn.Sequential(
            nn.Conv2d(own, hidden_size, 5, padding=2),
            nn.Tanh(),
            nn.Conv2d(hidden_size, hidden_size // 2, 3, padding=1),
            nn.Tanh(),
        )
        self.sub_pixel = nn.Sequential(
            nn.Conv2d(hidden_size // 2, own * scale**2, 3, padding=1), nn.PixelShuffle(scale)
        )
        self._start_last()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew from torch's generator."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.reset_parameters()
        self._start_last()

    @torch.no_grad()
    def _start_last(self) -> None:
        last = self.sub_pixel[0]
        assert isinstance(last, nn.Conv2d)
        assert last.bias is not None
        if self.icnr:
            for parameter in (last.weight, last.bias):
                first = parameter[:: self.scale**2]
                parameter.copy_(first.repeat_interleave(self.scale**2, dim=0))

    def forward(self, x: Tensor, scale: int) -> Tensor:
        """Upscale pictures in [0, 1]; see :meth:`Upscaler.forward`."""
        self.check(x, scale)
        if not self.luma:
            return self._network(x)
        luma, chroma = rgb_to_ycbcr(x).split((1, 2), dim=1)
        chroma = F.interpolate(chroma, scale_factor=scale, mode="bicubic", align_corners=False)
        out = ycbcr_to_rgb(torch.cat((self._network(luma), chroma), dim=1))
        return out if self._output() == "linear" else out.clamp(0.0, 1.0)

    def _network(self, x: Tensor) -> Tensor:
        out: Tensor = self.sub_pixel(self.feature_maps(x))
        kind = self._output()
        if kind == "clamp":
            return out.clamp(0.0, 1.0)
        return torch.sigmoid(out) if kind == "sigmoid" else out

    def _output(self) -> str:
        if self.output != "auto":
            return self.output
        return "linear" if self.training else "clamp"
