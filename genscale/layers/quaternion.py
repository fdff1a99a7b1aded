"""Quaternion-valued features: four real maps a channel, multiplied as Hamilton did.

Gaudet and Maida, "Deep Quaternion Networks", arXiv:1712.04604. A tensor of C quaternion channels is
``(B, 4 C, H, W)``: all real parts, then all i, j and k.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def hamilton_product(first: Tensor, second: Tensor, dim: int = 1) -> Tensor:
    """Return products of quaternions, whose parts are quarters of an axis; order matters."""
    a, b, c, d = first.chunk(4, dim=dim)
    e, f, g, h = second.chunk(4, dim=dim)
    parts = (
        a * e - b * f - c * g - d * h,
        a * f + b * e + c * h - d * g,
        a * g - b * h + c * e + d * f,
        a * h + b * g - c * f + d * e,
    )
    return torch.cat(parts, dim=dim)


class QuaternionConv(nn.Module):
    """A convolution whose weights are quaternions, multiplied from the left.

    Four kernels do the work of sixteen: a quarter of the parameters of a real convolution between
    as many maps, at the same operations.

    Args:
        in_channels: quaternion channels of the input.
        out_channels: quaternion channels of the output.
        kernel_size: odd; with stride 1 the size of the maps stays.
        stride: of the kernel.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1
    ) -> None:
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(
            torch.empty(4, out_channels, in_channels, kernel_size, kernel_size)
        )
        self.bias = nn.Parameter(torch.empty(4 * out_channels))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weights as a real convolution between as many maps has them; biases are zero."""
        bound = 1.0 / math.sqrt(4 * self.weight[0, 0].numel())
        self.weight.uniform_(-bound, bound)
        self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, 4 in_channels, H, W)`` to ``(B, 4 out_channels, H', W')``."""
        r, i, j, k = self.weight.unbind()
        rows = ((r, -i, -j, -k), (i, r, -k, j), (j, k, r, -i), (k, -j, i, r))
        weight = torch.cat([torch.cat(row, dim=1) for row in rows], dim=0)
        return F.conv2d(x, weight, self.bias, self.stride, padding=weight.shape[-1] // 2)
