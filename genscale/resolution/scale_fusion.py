"""Self-attention whose detail is that of the whole and whose layout is that of windows.

FreeScale (arXiv:2412.09626): out = G(local) + global - G(global), G a blur.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from genscale.errors import ConfigError
from genscale.layers.attention import SelfAttention
from genscale.resolution.base import Patches, ResolutionOp, Sides, extra_tokens
from genscale.resolution.frequency import gaussian_blur
from genscale.resolution.windows import crop_windows, fuse_windows, window_boxes


def fuse_scales(
    local: Tensor, whole: Tensor, size: int, sigma: float = 1.0, *, blur_channels: bool = False
) -> Tensor:
    """Return G(local) + whole - G(whole) of grids ``(B, C, H, W)``.

    Args:
        local: what windows gave.
        whole: what all tokens together gave.
        size: side of the blur's kernel, 2 s - 1.
        sigma: its standard deviation.
        blur_channels: parity: see :func:`~genscale.resolution.frequency.gaussian_blur`.
    """
    # the blur is linear: one does for both
    return whole + gaussian_blur(local - whole, size, sigma, blur_channels=blur_channels)


def attend_in_windows(
    attend: Callable[[Tensor], Tensor],
    x: Tensor,
    grid: Sides,
    window: int,
    stride: int,
    *,
    extras: int = 0,
) -> Tensor:
    """Attend inside overlapping windows and average.

    Args:
        attend: from tokens ``(B, n, D)`` to tokens.
        x: ``(B, extras + H W, D)``, row by row.
        grid: H and W.
        window: side of a window.
        stride: between windows.
        extras: tokens at the front (class, time, words) that stand before every window.

    Returns:
        ``(B, D', H, W)``, of the grid alone.
    """
    boxes = window_boxes(*grid, window, stride)
    front, cells = x[:, :extras], x[:, extras:]
    parts = crop_windows(cells.transpose(1, 2).unflatten(-1, grid), boxes)
    tokens = parts.flatten(2).transpose(1, 2)
    y = attend(torch.cat((front.repeat(len(boxes), 1, 1), tokens), dim=1))[:, extras:]
    return fuse_windows(y.transpose(1, 2).unflatten(-1, tuple(parts.shape[-2:])), boxes, *grid)


def grid_of(tokens: int, target: Sides) -> Sides | None:
    """Return the grid of so many tokens with the sides' ratio of ``target``; None if there is none.

    A sequence with further tokens (a class, words) mostly has none.
    """
    height = round(math.sqrt(tokens * target[0] / target[1]))
    if height == 0 or tokens % height or height * target[1] != tokens // height * target[0]:
        return None
    return height, tokens // height


class ScaleFusion(ResolutionOp):
    """Fuse the scales of all self-attention layers without rotary positions.

    Layers whose tokens are no grid of the target's sides, behind those that a U-ViT has for class,
    time and words, are left as they are. Windows have the
    trained side at every layer and overlap by half. On layers of diffusers not together with
    entropy-keeping attention, whose factor is that of the whole.

    Args:
        sigma: of the blur.
        blur_channels: parity: see :func:`fuse_scales`.
    """

    def __init__(self, sigma: float = 1.0, *, blur_channels: bool = False) -> None:
        self.sigma, self.blur_channels = sigma, blur_channels
        self._patches = Patches()

    def prepare(self, model: nn.Module, native: Sides, target: Sides, schedule: Any = None) -> None:
        """Replace the forward of the layers; see :class:`ResolutionOp`."""
        factor = max(round(target[0] / native[0]), 1)
        ratio = native[0] / target[0]
        extras = extra_tokens(model)
        for module in model.modules():
            own = isinstance(module, SelfAttention) and module.rope is None
            of_unet = (
                hasattr(module, "to_q") and getattr(module, "is_cross_attention", None) is False
            )
            if own or of_unet:
                replacement = self._forward(module.forward, target, ratio, 2 * factor - 1, extras)
                self._patches.method(module, "forward", replacement)
        if not len(self._patches):
            raise ConfigError(
                f"{type(model).__name__} has no self-attention whose scales could be fused. "
                "Use another operator."
            )

    def restore(self, model: nn.Module) -> None:
        """Give the layers their forward back."""
        self._patches.undo()

    def _forward(
        self, plain: Callable[..., Tensor], target: Sides, ratio: float, size: int, extras: int
    ) -> Callable[..., Tensor]:
        def fused(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            whole = plain(x, *args, **kwargs)
            grid = grid_of(x.shape[1] - extras, target) if x.dim() == 3 else None
            given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            if grid is None or given:  # words, masks or positions belong to the whole
                return whole
            window = max(round(grid[0] * ratio), 1)
            local = attend_in_windows(
                lambda part: plain(part, *args, **kwargs),
                x,
                grid,
                window,
                max(window // 2, 1),
                extras=extras,
            )
            y = fuse_scales(
                local,
                whole[:, extras:].transpose(1, 2).unflatten(-1, grid),
                size,
                self.sigma,
                blur_channels=self.blur_channels,
            )
            # what belongs to no cell keeps what all tokens together gave
            return torch.cat((whole[:, :extras], y.flatten(2).transpose(1, 2)), dim=1)

        return fused
