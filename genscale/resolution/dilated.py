"""Convolutions that see as far in a larger picture as they did in training (arXiv:2310.07702)."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.errors import ConfigError
from genscale.resolution.base import Patches, ResolutionOp, Sides, linear_factor
from genscale.resolution.branches import check_halves, prediction_of, rows_of, with_prediction

SDXL_LAYERS = (
    "mid_block.resnets.*.conv[12]",
    "up_blocks.0.resnets.*.conv[12]",
    "up_blocks.0.upsamplers.0.conv",
)
"""Convolutions of SDXL's UNet that ScaleCrafter dilates at 2048 x 2048."""

WEAK_LAYERS = ("mid_block.resnets.*.conv[12]",)
"""Those that stay dilated in the base of noise-damped guidance; which ones is our choice."""


def dilated_conv(x: Tensor, conv: nn.Conv2d, dilation: int) -> Tensor:
    """Apply the kernel of ``conv`` with a whole dilation, padded to keep its output's size."""
    padding = tuple(dilation * (side // 2) for side in conv.kernel_size)
    return F.conv2d(x, conv.weight, conv.bias, conv.stride, padding, dilation, conv.groups)


def redilated_conv(x: Tensor, conv: nn.Conv2d, dilation: float) -> Tensor:
    """Apply a convolution with a real dilation d.

    With k = ceil(d), the input is resized (bilinear) to k / d of its sides, convolved with
    dilation k, and the result resized to the sides the plain convolution gives.

    Args:
        x: ``(B, C, H, W)``.
        conv: of odd kernels and padded to keep sides.
        dilation: d, at least 1.

    Returns:
        ``(B, C', floor(H / stride), floor(W / stride))``.
    """
    whole = math.ceil(dilation)
    sides = x.shape[-2:]
    out = tuple(side // stride for side, stride in zip(sides, conv.stride, strict=True))
    finer = tuple(round(side * whole / dilation) for side in sides)
    if finer != tuple(sides):
        x = F.interpolate(x, size=finer, mode="bilinear", align_corners=False)
    y = dilated_conv(x, conv, whole)
    if tuple(y.shape[-2:]) != out:
        y = F.interpolate(y, size=out, mode="bilinear", align_corners=False)
    return y


def dilation_at(step: int, dilation: float, until: int, *, progressive: bool = False) -> float:
    """Return the dilation of a step: d before step ``until``, 1 (the plain convolution) from it on.

    Args:
        step: i, counted from 0.
        dilation: d.
        until: tau.
        progressive: max(ceil(d (tau - i) / tau), 2) instead of d, smaller step by step.
    """
    if step >= until:
        return 1.0
    if not progressive:
        return dilation
    return float(max(math.ceil(dilation * (until - step) / until), 2))


def noise_damped(
    weak_uncond: Tensor, dilated_cond: Tensor, dilated_uncond: Tensor, scale: float
) -> Tensor:
    """Return weak_uncond + w (cond - uncond), guidance whose base is a less dilated network."""
    return weak_uncond + scale * (dilated_cond - dilated_uncond)


def matching_convs(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Conv2d]:
    """Return the convolutions whose names match a shell pattern.

    Raises:
        ConfigError: none does.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and any(fnmatch.fnmatch(name, p) for p in patterns)
    }
    if not found:
        raise ConfigError(
            f"No convolution of {type(model).__name__} is named like {', '.join(patterns)}, which "
            "were to be dilated. Give the names of its inner 3 x 3 convolutions."
        )
    return found


class ConvReplacement(ResolutionOp):
    """Replace what listed convolutions compute, step by step; see the subclasses.

    Steps are told by :meth:`pre_step`, never counted inside the network.

    Args:
        layers: shell patterns of the names of convolutions.
    """

    def __init__(self, layers: Sequence[str]) -> None:
        self.layers = tuple(layers)
        self.step = 0
        self._patches = Patches()

    def convolve(self, conv: nn.Conv2d, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return what stands in the place of ``plain(x)`` at ``self.step``."""
        raise NotImplementedError(f"{type(self).__name__} must implement convolve")  # abstract

    def pre_step(self, x: Tensor, t: Tensor | float, i: int) -> Tensor:
        """Note the step."""
        self.step = i
        return x

    def prepare(self, model: nn.Module, native: Sides, target: Sides, schedule: Any = None) -> None:
        """Replace the forward of each listed convolution; see :class:`ResolutionOp`."""
        self.step = 0
        for conv in matching_convs(model, self.layers).values():
            self._patches.method(conv, "forward", self._forward(conv))

    def restore(self, model: nn.Module) -> None:
        """Give the convolutions their forward back."""
        self._patches.undo()

    def _forward(self, conv: nn.Conv2d) -> Callable[[Tensor], Tensor]:
        plain = conv.forward
        return lambda x: self.convolve(conv, plain, x)


class DilatedConvs(ConvReplacement):
    """Dilate listed convolutions during the first steps (ScaleCrafter).

    Args:
        layers: see :class:`ConvReplacement`.
        dilation: d; default the side over the trained side.
        until: see :func:`dilation_at`.
        progressive: see there.
    """

    def __init__(
        self,
        layers: Sequence[str] = SDXL_LAYERS,
        *,
        dilation: float | None = None,
        until: int = 30,
        progressive: bool = False,
    ) -> None:
        super().__init__(layers)
        self.dilation, self.until, self.progressive = dilation, until, progressive
        self._factor = 1.0

    def prepare(self, model: nn.Module, native: Sides, target: Sides, schedule: Any = None) -> None:
        """See :class:`ConvReplacement`."""
        super().prepare(model, native, target, schedule)
        self._factor = self.dilation or max(linear_factor(native, target), 1.0)

    def convolve(self, conv: nn.Conv2d, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Dilate, or compute the plain convolution where the dilation is 1."""
        dilation = dilation_at(self.step, self._factor, self.until, progressive=self.progressive)
        return plain(x) if dilation <= 1 else redilated_conv(x, conv, dilation)


class NoiseDampedConvs(DilatedConvs):
    """Dilated convolutions, and guidance whose base is a network with fewer of them (ScaleCrafter).

    Pipelines guide by eps_u + w (eps_c - eps_u) of a batch [unconditional, conditional]. What the
    network returns is changed so that this becomes :func:`noise_damped`, whatever w is:
    eps_weak and eps_weak + eps_c - eps_u stand in the halves' places. A step costs half as much
    again.

    Args:
        layers: see :class:`DilatedConvs`, as are ``dilation``, ``until`` and ``progressive``.
        weak_layers: patterns of those that stay dilated in the base.
        damped_until: step from which guidance is as usual.
    """

    def __init__(
        self,
        layers: Sequence[str] = SDXL_LAYERS,
        *,
        weak_layers: Sequence[str] = WEAK_LAYERS,
        damped_until: int = 35,
        dilation: float | None = None,
        until: int = 35,
        progressive: bool = True,
    ) -> None:
        super().__init__(layers, dilation=dilation, until=until, progressive=progressive)
        self.weak_layers, self.damped_until = tuple(weak_layers), damped_until
        self._weak: set[nn.Module] = set()
        self._in_base = False

    def prepare(self, model: nn.Module, native: Sides, target: Sides, schedule: Any = None) -> None:
        """See :class:`ConvReplacement`."""
        super().prepare(model, native, target, schedule)
        self._weak = set(matching_convs(model, self.weak_layers).values())
        self._patches.method(model, "forward", self._damped(model.forward))

    def restore(self, model: nn.Module) -> None:
        """Give network and convolutions their forward back."""
        super().restore(model)
        self._weak = set()

    def convolve(self, conv: nn.Conv2d, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Dilate, but in the base only what stays dilated there."""
        if self._in_base and conv not in self._weak:
            return plain(x)
        return super().convolve(conv, plain, x)

    def _damped(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            out = plain(x, *args, **kwargs)
            # where nothing is dilated any more, the base is the network itself
            if self.step >= min(self.damped_until, self.until):
                return out
            check_halves(x, "Noise-damped guidance", "use ScaleCrafter with ndcfg_tau=0")
            first = slice(len(x) // 2)
            self._in_base = True
            try:
                half = plain(*rows_of((x, *args), len(x), first), **rows_of(kwargs, len(x), first))
            finally:
                self._in_base = False
            uncond, cond = prediction_of(out).chunk(2)
            weak = prediction_of(half)
            damped = torch.cat((weak, noise_damped(weak, cond, uncond, 1.0)))
            return with_prediction(out, damped)

        return forward
