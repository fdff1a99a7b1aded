"""The contract of an upscaler: latents or pictures in, more of the same out."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from genscale.errors import ConfigError
from genscale.upscaling.tiling import in_tiles

__all__ = ["Upscaler", "pad_to_multiple", "register_to_config"]


class Upscaler(ModelMixin, ConfigMixin):
    """Maps ``(B, C, h, w)`` to ``(B, C, h * scale, w * scale)``; single-device, plain torch.

    Subclasses decorate their keyword-only constructor with ``@register_to_config``, set the
    attributes below and implement :meth:`forward`. ``save_pretrained`` and ``from_pretrained``
    then work.

    Attributes:
        space: what it reads: ``latent`` (what a VAE's decoder takes) or ``pixel``.
        scales: factors it offers.
        channels: C.
        tile_overlap: cells that neighbouring tiles share unless a call says otherwise.
    """

    space: Literal["latent", "pixel"]
    scales: tuple[int, ...]
    channels: int
    tile_overlap: int = 16

    block_classes: ClassVar[tuple[str, ...]] = ()
    """Names of the block modules: units of FSDP wrapping, checkpointing, regional compile."""

    config_name = "config.json"  # type: ignore[assignment]  # the mixin's placeholder is None

    @abstractmethod
    def forward(self, x: Tensor, scale: int) -> Tensor:
        """Upscale ``(B, C, h, w)`` of any size in one network call.

        Args:
            x: latents or pictures.
            scale: one of :attr:`scales`.

        Returns:
            ``(B, C, h * scale, w * scale)``.

        Raises:
            ConfigError: other channels, or a scale that is not offered.
        """

    def upscale(
        self,
        x: Tensor,
        scale: int,
        *,
        tile: int | None = None,
        overlap: int | None = None,
        batch: int = 1,
    ) -> Tensor:
        """Upscale, tile by tile where a tile is given; tiles are blended linearly.

        A cell near the edge of a tile does not see all that it would see in the whole, so tiling
        is approximate; overlap lessens the difference.

        Args:
            x: ``(B, C, h, w)``.
            scale: one of :attr:`scales`.
            tile: side of a tile in cells of ``x``; None runs the whole at once.
            overlap: cells that neighbouring tiles share; None for :attr:`tile_overlap`, or half
                a tile where that is less.
            batch: tiles a network call.

        Returns:
            ``(B, C, h * scale, w * scale)``.

        Raises:
            ConfigError: other channels, a scale that is not offered, or tiles that do not move.
        """
        self.check(x, scale)
        if tile is None:
            return self(x, scale)
        if overlap is None:
            overlap = min(self.tile_overlap, tile // 2)
        return in_tiles(
            lambda part: self(part, scale), x, scale, tile=tile, overlap=overlap, batch=batch
        )

    def check(self, x: Tensor, scale: int) -> None:
        """Check what is asked for.

        Raises:
            ConfigError: other channels, no ``(B, C, h, w)``, or a scale that is not offered.
        """
        name = type(self).__name__
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ConfigError(
                f"{name} upscales inputs (B, {self.channels}, h, w), but one of shape "
                f"{tuple(x.shape)} was given. Give an upscaler of these channels."
            )
        if scale not in self.scales:
            raise ConfigError(
                f"upscaling.scale={scale} is not offered: {name} has the scales "
                f"{', '.join(map(str, self.scales))}. Give one of them."
            )


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Fill ``(B, C, h, w)`` up to multiples at the right and the bottom.

    An axis is continued by reflection where it is long enough for that, by its last cell else.
    """
    for axis in (3, 2):
        extra = -x.shape[axis] % multiple
        if extra:
            mode = "reflect" if extra < x.shape[axis] else "replicate"
            x = F.pad(x, (0, extra, 0, 0) if axis == 3 else (0, 0, 0, extra), mode=mode)
    return x
