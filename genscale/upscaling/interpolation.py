"""Interpolation as an upscaler: what trained ones are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from genscale.errors import ConfigError
from genscale.upscaling.base import Upscaler, register_to_config


class Interpolation(Upscaler):
    """Bicubic, bilinear or nearest interpolation of latents or pictures; has no weights.

    Args:
        space: ``latent`` or ``pixel``; where in a pipeline it belongs.
        channels: channels C.
        scales: factors it offers.
        mode: ``bicubic`` (a = -0.75, as torch's), ``bilinear`` or ``nearest``.

    Raises:
        ConfigError: an unknown mode or space.
    """

    @register_to_config
    def __init__(
        self,
        *,
        space: Literal["latent", "pixel"] = "latent",
        channels: int = 4,
        scales: Sequence[int] = (2, 3, 4, 8),
        mode: Literal["bicubic", "bilinear", "nearest"] = "bicubic",
    ) -> None:
        super().__init__()
        if mode not in ("bicubic", "bilinear", "nearest") or space not in ("latent", "pixel"):
            raise ConfigError(
                "upscaling.mode must be bicubic, bilinear or nearest and space latent or pixel, "
                f"but mode={mode} and space={space} were given. Change them."
            )
        self.space, self.channels, self.scales = space, channels, tuple(scales)

    def forward(self, x: Tensor, scale: int) -> Tensor:
        """Interpolate; see :meth:`Upscaler.forward`. Pixel centres are aligned, not corners."""
        self.check(x, scale)
        return F.interpolate(x, scale_factor=scale, mode=self.config["mode"])
