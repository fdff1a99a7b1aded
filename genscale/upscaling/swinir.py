"""SwinIR: one network a scale, for pictures (arXiv:2108.10257)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from genscale.errors import ConfigError
from genscale.upscaling.base import Upscaler, register_to_config
from genscale.upscaling.swin import Residual, SwinTrunk, pixel_shuffle_layers

Reconstruction = Literal["pixelshuffle", "pixelshuffledirect", "nearest+conv", ""]
_WIDTH = 64  # of the reconstruction, in all published models


class SwinIR(Upscaler):
    """Restores or upscales pictures; defaults are those of the classical model, x2.

    ==================  =========================================================================
    upsampler           what it is made of
    ==================  =========================================================================
    pixelshuffle        convolutions and pixel shuffles (classical)
    pixelshuffledirect  one convolution and one pixel shuffle (light)
    nearest+conv        nearest neighbours, a convolution after each (real photographs); x2, x4
    (empty)             one convolution beside the input: same size (noise, JPEG artefacts)
    ==================  =========================================================================

    Args:
        channels: of the pictures; three are centred by the mean of the training pictures.
        scale: factor; 1 with an empty ``upsampler``.
        upsampler: see above.
        input_size: see :class:`~genscale.upscaling.swin.SwinTrunk`, as are all the others.
        window_size: side of a window.
        depths: blocks of every group.
        hidden_size: width D.
        num_heads: heads of every group.
        mlp_ratio: width of the MLPs in units of D.
        residual: ``1conv`` or ``3conv``.
        img_range: range of the numbers inside; pictures are in [0, 1].
        drop_path: stochastic depth of the last block.
        qkv_bias: biases of queries, keys and values.
        patch_norm: a norm before the first block.
        positions: a learned table of positions.

    Raises:
        ConfigError: settings that do not fit together.
    """

    block_classes: ClassVar[tuple[str, ...]] = ("SwinBlock",)
    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        *,
        channels: int = 3,
        scale: int = 2,
        upsampler: Reconstruction = "pixelshuffle",
        input_size: int = 64,
        window_size: int = 8,
        depths: Sequence[int] = (6, 6, 6, 6, 6, 6),
        hidden_size: int = 180,
        num_heads: Sequence[int] = (6, 6, 6, 6, 6, 6),
        mlp_ratio: float = 2.0,
        residual: Residual = "1conv",
        img_range: float = 1.0,
        drop_path: float = 0.1,
        qkv_bias: bool = True,
        patch_norm: bool = True,
        positions: bool = False,
    ) -> None:
        super().__init__()
        _check_scale(upsampler, scale)
        self.space, self.channels, self.scales = "pixel", channels, (scale,)
        self.tile_overlap = max(16, 2 * window_size)
        self.trunk = SwinTrunk(
            channels=channels,
            input_size=input_size,
            window_size=window_size,
            depths=depths,
            hidden_size=hidden_size,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            residual=residual,
            img_range=img_range,
            drop_path=drop_path,
            qkv_bias=qkv_bias,
            patch_norm=patch_norm,
            positions=positions,
        )
        self.head = _HEADS[upsampler](hidden_size, channels, scale)

    def forward(self, x: Tensor, scale: int) -> Tensor:
        """Upscale; see :meth:`Upscaler.forward`."""
        self.check(x, scale)
        inner = self.trunk.enter(x)
        y = self.head(self.trunk(inner))
        if self.config["upsampler"] == "":
            y = inner + y
        return self.trunk.leave(y, (x.shape[2] * scale, x.shape[3] * scale))


class ShuffleHead(nn.Module):
    """Features ``(B, D, H, W)`` to ``(B, C, H * scale, W * scale)`` by pixel shuffles.

    Args:
        hidden_size: width D of the features.
        channels: C.
        scale: 3, or a power of 2.
        width: channels of the layers in between.
    """

    def __init__(self, hidden_size: int, channels: int, scale: int, *, width: int = _WIDTH) -> None:
        super().__init__()
        self.before = nn.Conv2d(hidden_size, width, 3, padding=1)
        self.upsample = pixel_shuffle_layers(width, scale)
        self.last = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Upscale features."""
        return self.last(self.upsample(F.leaky_relu(self.before(x), 0.01)))


class DirectHead(nn.Module):
    """One convolution and one pixel shuffle; arguments as of :class:`ShuffleHead`."""

    def __init__(self, hidden_size: int, channels: int, scale: int) -> None:
        super().__init__()
        self.scale = scale
        self.last = nn.Conv2d(hidden_size, scale**2 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Upscale features."""
        return F.pixel_shuffle(self.last(x), self.scale)


class NearestHead(nn.Module):
    """Nearest neighbours with a convolution after each; arguments as of :class:`ShuffleHead`.

    The first activation has another slope than the rest, as in the published networks.
    """

    def __init__(self, hidden_size: int, channels: int, scale: int) -> None:
        super().__init__()
        self.before = nn.Conv2d(hidden_size, _WIDTH, 3, padding=1)
        self.up = nn.ModuleList(
            nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1) for _ in range(scale.bit_length() - 1)
        )
        self.conv = nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1)
        self.last = nn.Conv2d(_WIDTH, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Upscale features."""
        x = F.leaky_relu(self.before(x), 0.01)
        for conv in self.up:
            x = F.leaky_relu(conv(F.interpolate(x, scale_factor=2, mode="nearest")), 0.2)
        return self.last(F.leaky_relu(self.conv(x), 0.2))


class PlainHead(nn.Module):
    """One convolution at the same size; arguments as of :class:`ShuffleHead`."""

    def __init__(self, hidden_size: int, channels: int, scale: int) -> None:
        super().__init__()
        self.last = nn.Conv2d(hidden_size, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map features to what is added to the picture."""
        return self.last(x)


_HEADS: dict[str, type[nn.Module]] = {
    "pixelshuffle": ShuffleHead,
    "pixelshuffledirect": DirectHead,
    "nearest+conv": NearestHead,
    "": PlainHead,
}


def _check_scale(upsampler: str, scale: int) -> None:
    if upsampler not in _HEADS:
        raise ConfigError(
            "model.upsampler must be pixelshuffle, pixelshuffledirect, nearest+conv or empty, but "
            f"'{upsampler}' was given. Change it."
        )
    offered = {"nearest+conv": (2, 4), "": (1,)}.get(upsampler)
    if scale < 1 or (offered is not None and scale not in offered):
        raise ConfigError(
            f"model.upsampler='{upsampler}' offers the scales {offered or 'from 1 on'}, but "
            f"scale={scale} was given. Change one of them."
        )
