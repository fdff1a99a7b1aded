"""The trunk that SwinIR and LUA share: window attention at the input's own resolution.

SwinIR is arXiv:2108.10257; shifted windows are those of Swin (arXiv:2103.14030).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from genscale.errors import ConfigError
from genscale.layers.mlp import MLP
from genscale.layers.window_attention import WindowAttention, relative_index, window_mask
from genscale.upscaling.base import pad_to_multiple

Residual = Literal["1conv", "3conv"]

# of the pictures that the published models were trained on; latents are not centred
_RGB_MEAN = (0.4488, 0.4371, 0.4040)


@lru_cache(maxsize=64)
def soft_mask(
    size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], device: torch.device
) -> Tensor | None:
    """Return :func:`window_mask` with -100 for minus infinity, as the published weights know it."""
    mask = window_mask(size, window, shift, device)
    with torch.inference_mode(False):
        return None if mask is None else mask.clamp(min=-100.0)


class FixedWindowAttention(WindowAttention):
    """Attention in windows of one size, on grids that they divide.

    A grid of a single window is shifted too: what a network does must not depend on whether its
    input is as large as its window.
    """

    def _fit(self, side: int) -> tuple[int, int, int]:
        return self.window_size, self.window_size // 2 * self.shifted, 0

    def _bias(
        self,
        device: torch.device,
        size: tuple[int, int],
        window: tuple[int, int],
        shift: tuple[int, int],
    ) -> Tensor:
        cells, index = relative_index(self.window_size, *window, device)
        bias = F.embedding(index, self.bias_table).view(cells, cells, -1).permute(2, 0, 1)[None]
        mask = soft_mask(size, window, shift, device)
        return bias if mask is None else bias + mask[:, None].to(bias.dtype)


class SwinBlock(nn.Module):
    """Attention in windows and an MLP, each behind a norm and beside a residual.

    Args:
        hidden_size: width D.
        num_heads: heads; D must be a multiple of it.
        window_size: side of a window.
        shifted: roll the grid by half a window.
        mlp_ratio: width of the MLP in units of D.
        qkv_bias: biases of queries, keys and values.
        drop_path: probability with which a sample skips a residual in training, drawn from
            torch's own generator (arXiv:1603.09382).
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        window_size: int,
        *,
        shifted: bool,
        mlp_ratio: float,
        qkv_bias: bool,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm_1 = nn.LayerNorm(hidden_size)
        self.attention = FixedWindowAttention(hidden_size, num_heads, window_size, shifted=shifted)
        if not qkv_bias:
            self.attention.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.norm_2 = nn.LayerNorm(hidden_size)
        self.mlp = MLP(hidden_size, int(hidden_size * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, H, W, D)`` to the same shape."""
        x = x + self._dropped(self.attention(self.norm_1(x)))
        return x + self._dropped(self.mlp(self.norm_2(x)))

    def _dropped(self, y: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return y
        kept = torch.empty(len(y), 1, 1, 1, device=y.device).bernoulli_(1 - self.drop_path)
        return y * (kept / (1 - self.drop_path)).to(y.dtype)


class SwinGroup(nn.Module):
    """Blocks, shifted in turn, then a convolution, beside a residual.

    Args:
        hidden_size: width D.
        residual: see :func:`residual_conv`.
        blocks: the blocks.
    """

    def __init__(self, hidden_size: int, residual: Residual, blocks: Sequence[SwinBlock]) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.blocks = nn.ModuleList(blocks)
        self.conv = residual_conv(hidden_size, residual)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, H, W, D)`` to the same shape."""
        y = x
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                y = checkpoint(block, y, use_reentrant=False)
            else:
                y = block(y)
        return x + self.conv(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class SwinTrunk(nn.Module):
    """From a picture or latent to features of the same size, for a head to upscale.

    Args:
        channels: channels C of the input.
        input_size: side it is made for. Inputs of any side are taken; but where the side is no
            larger than the window, windows are of that side and never shifted.
        window_size: side of a window; inputs are filled up to multiples of it.
        depths: blocks of every group.
        hidden_size: width D.
        num_heads: heads of every group.
        mlp_ratio: width of the MLPs in units of D.
        residual: see :func:`residual_conv`.
        img_range: inputs are multiplied by it, outputs divided.
        drop_path: stochastic depth of the last block; earlier ones have less.
        qkv_bias: biases of queries, keys and values.
        patch_norm: a norm before the first block.
        positions: a learned table of positions is added, which fits inputs of ``input_size`` only.

    Raises:
        ConfigError: settings that do not fit together.
    """

    def __init__(
        self,
        *,
        channels: int,
        input_size: int,
        window_size: int,
        depths: Sequence[int],
        hidden_size: int,
        num_heads: Sequence[int],
        mlp_ratio: float,
        residual: Residual,
        img_range: float,
        drop_path: float,
        qkv_bias: bool = True,
        patch_norm: bool = True,
        positions: bool = False,
    ) -> None:
        super().__init__()
        _check_settings(depths, num_heads, hidden_size, residual)
        shifts = input_size > window_size
        window = min(input_size, window_size)
        self.channels, self.img_range = channels, img_range
        self.multiple = math.lcm(window_size, window)
        self.stem = nn.Conv2d(channels, hidden_size, 3, padding=1)
        self.stem_norm = nn.LayerNorm(hidden_size) if patch_norm else nn.Identity()
        self.position_table = None
        if positions:
            self.position_table = nn.Parameter(torch.empty(1, input_size**2, hidden_size))
        rates = [float(r) for r in _spread(drop_path, sum(depths))]
        self.groups = nn.ModuleList()
        for index, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            first = sum(depths[:index])
            blocks = [
                SwinBlock(
                    hidden_size,
                    heads,
                    window,
                    shifted=shifts and number % 2 == 1,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    drop_path=rates[first + number],
                )
                for number in range(depth)
            ]
            self.groups.append(SwinGroup(hidden_size, residual, blocks))
        self.norm = nn.LayerNorm(hidden_size)
        self.conv = residual_conv(hidden_size, residual)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw linear weights and tables with standard deviation 0.02; biases are zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.position_table is not None:
            nn.init.trunc_normal_(self.position_table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)``, centred and filled up, to features ``(B, D, H, W)``."""
        stem = self.stem(x)
        y = self.stem_norm(stem.permute(0, 2, 3, 1))
        if self.position_table is not None:
            y = y + self._positions(y)
        for group in self.groups:
            y = group(y)
        return stem + self.conv(self.norm(y).permute(0, 3, 1, 2))

    def enter(self, x: Tensor) -> Tensor:
        """Fill ``(B, C, h, w)`` up to whole windows, centre and scale it."""
        x = pad_to_multiple(x, self.multiple)
        return (x - self._mean(x)) * self.img_range

    def leave(self, y: Tensor, size: tuple[int, int]) -> Tensor:
        """Undo :meth:`enter` for an output ``(B, C, H, W)``, of which ``size`` is left over."""
        y = y / self.img_range
        return (y + self._mean(y))[:, :, : size[0], : size[1]]

    def _mean(self, like: Tensor) -> Tensor:
        values = _RGB_MEAN if self.channels == 3 else (0.0,)
        return _constant(values, like.device, like.dtype)

    def _positions(self, y: Tensor) -> Tensor:
        table = self.position_table
        assert table is not None
        side = math.isqrt(table.shape[1])
        if tuple(y.shape[1:3]) != (side, side):
            raise ConfigError(
                f"The network has a table of positions for inputs of {side} x {side}, but "
                f"{y.shape[1]} x {y.shape[2]} were given. Give tiles of {side}."
            )
        return table.view(1, side, side, -1)


def residual_conv(hidden_size: int, kind: Residual) -> nn.Module:
    """Return what ends a group: one 3x3 convolution, or three through a quarter of the width."""
    if kind == "1conv":
        return nn.Conv2d(hidden_size, hidden_size, 3, padding=1)
    narrow = hidden_size // 4
    return nn.Sequential(
        nn.Conv2d(hidden_size, narrow, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(narrow, narrow, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(narrow, hidden_size, 3, padding=1),
    )


def pixel_shuffle_layers(width: int, scale: int) -> nn.Sequential:
    """Return convolutions and pixel shuffles that enlarge ``scale`` times: 3, or a power of 2.

    Raises:
        ConfigError: another scale.
    """
    steps = [3] if scale == 3 else [2] * (scale.bit_length() - 1)
    if scale < 1 or math.prod(steps) != scale:
        raise ConfigError(
            f"Pixel shuffles enlarge 3 times or a power of 2, but scale {scale} was given. "
            "Change it."
        )
    layers: list[nn.Module] = []
    for step in steps:
        layers += [nn.Conv2d(width, step**2 * width, 3, padding=1), nn.PixelShuffle(step)]
    return nn.Sequential(*layers)


def _check_settings(
    depths: Sequence[int], num_heads: Sequence[int], hidden_size: int, residual: str
) -> None:
    """Check that a trunk's settings fit together.

    Raises:
        ConfigError: lists of other lengths, heads that do not divide, or an unknown residual.
    """
    if len(depths) != len(num_heads) or not depths:
        raise ConfigError(
            "model.depths and num_heads must be of one length, a number for each group, but "
            f"{list(depths)} and {list(num_heads)} were given. Change them."
        )
    uneven = [heads for heads in num_heads if heads < 1 or hidden_size % heads]
    if uneven:
        raise ConfigError(
            f"model.num_heads must divide hidden_size={hidden_size}, but {uneven[0]} was given. "
            "Change it."
        )
    if residual not in ("1conv", "3conv"):
        raise ConfigError(
            f"model.residual must be 1conv or 3conv, but '{residual}' was given. Change it."
        )


def _spread(last: float, count: int) -> list[float]:
    """Return ``count`` numbers from 0 to ``last``, evenly spaced."""
    return [last * i / max(1, count - 1) for i in range(count)]


@lru_cache(maxsize=32)
def _constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return ``(1, n, 1, 1)``; kept, so that no forward waits for a copy to the device."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device, dtype=dtype).view(1, -1, 1, 1)
