"""Any upscaler of pictures as a pair of functions: made small, and made large again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from genscale.errors import ConfigError, DataError
from genscale.upscaling.base import Upscaler
from genscale.upscaling.iarn import IARN, resized
from genscale.upscaling.irn import IRN

Scale = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Rescaler:
    """How pictures in [0, 1] become small and large again, both with gradient.

    Args:
        down: ``(B, C, H, W)`` to small pictures, neither rounded nor clipped.
        up: small pictures to ``(B, C, H, W)``, not clipped.
        own: whether the small picture is the network's work; else it is bicubically reduced.
    """

    down: Callable[[Tensor], Tensor]
    up: Callable[[Tensor], Tensor]
    own: bool


def rescaler_of(network: Upscaler, scale: Scale, size: tuple[int, int]) -> Rescaler:
    """Return what a network makes of pictures of one size.

    Args:
        network: an upscaler of pictures.
        scale: how much smaller, down and to the right; other networks than IARN need the same
            whole number twice.
        size: H and W, see :func:`fitting_size`.

    Raises:
        ConfigError: an upscaler of latents, or a scale that the network does not have.
        DataError: sides that do not divide.
    """
    if network.space != "pixel":
        raise ConfigError(
            f"{type(network).__name__} enlarges latents, but pictures are rescaled. Give an "
            "upscaler of pictures: irn, iarn, swinir, espcn or wdsr."
        )
    if isinstance(network, IARN):
        small = (round(size[0] / scale[0]), round(size[1] / scale[1]))
        return Rescaler(
            lambda x: network.downscale(x, small), lambda y: network.enlarge(y, size), own=True
        )
    if scale[0] != scale[1] or scale[0] not in network.scales:
        raise ConfigError(
            f"{type(network).__name__} has the scales {', '.join(map(str, network.scales))}, the "
            f"same on both axes, but {scale[0]:g} x {scale[1]:g} was asked for. Give one of "
            "them, or an IARN."
        )
    factor = int(scale[0])
    if any(side % factor for side in size):
        raise DataError(
            f"Pictures of {size[0]}x{size[1]} cannot be made {factor} times smaller; crop them to "
            "sides that it divides."
        )
    small = (size[0] // factor, size[1] // factor)
    if isinstance(network, IRN):
        return Rescaler(lambda x: network.downscale(x)[0], lambda y: network(y, factor), own=True)
    return Rescaler(lambda x: resized(x, small), lambda y: network(y, factor), own=False)


def fitting_size(network: Upscaler, scale: Scale, size: tuple[int, int]) -> tuple[int, int]:
    """Return the largest size within ``size`` that pictures must be cropped to."""
    if isinstance(network, IARN):
        return size
    height, width = (side - side % int(factor) for side, factor in zip(size, scale, strict=True))
    return height, width
