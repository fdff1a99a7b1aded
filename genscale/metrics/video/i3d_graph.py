"""I3D (arXiv:1705.07750): Inception-v1 with filters in space and time, 400 classes of Kinetics.

The state dict has the keys of ``i3d_pretrained_400.pt``: 12,697,264 parameters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.errors import DataError

_SMALLEST = 9  # frames: three halvings, rounded up, leave the two that the last pool takes
_SIDE = 224


def _same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Return zeros before and after one axis, as TensorFlow's SAME padding has them."""
    total = max(kernel - (size % stride or stride), 0)
    return total // 2, total - total // 2


def _pad(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    sizes = zip(x.shape[2:], kernel, stride, strict=True)
    t, h, w = (_same_padding(size, k, s) for size, k, s in sizes)
    return F.pad(x, (*w, *h, *t))


def _max_pool(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    # zeros are no larger than anything behind a ReLU
    return F.max_pool3d(_pad(x, kernel, stride), kernel, stride)


class _Unit(nn.Module):
    """Convolution with SAME padding, batch norm with eps 1e-3, ReLU; or the convolution alone."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        *,
        bare: bool = False,
    ) -> None:
        super().__init__()
        self.kernel = (kernel_size, kernel_size, kernel_size)
        self.stride = (stride, stride, stride)
        self.conv3d = nn.Conv3d(in_channels, out_channels, self.kernel, self.stride, bias=bare)
        self.bn = None if bare else nn.BatchNorm3d(out_channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv3d(_pad(x, self.kernel, self.stride))
        return x if self.bn is None else F.relu(self.bn(x), inplace=True)


class _Mixed(nn.Module):
    """Branches of 1x1x1, two of 3x3x3 behind a bottleneck, and a pool; side by side."""

    def __init__(self, in_channels: int, widths: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        point, narrow_1, wide_1, narrow_2, wide_2, pooled = widths
        self.b0 = _Unit(in_channels, point)
        self.b1a = _Unit(in_channels, narrow_1)
        self.b1b = _Unit(narrow_1, wide_1, 3)
        self.b2a = _Unit(in_channels, narrow_2)
        self.b2b = _Unit(narrow_2, wide_2, 3)
        self.b3b = _Unit(in_channels, pooled)

    def forward(self, x: Tensor) -> Tensor:
        branches = (
            self.b0(x),
            self.b1b(self.b1a(x)),
            self.b2b(self.b2a(x)),
            self.b3b(_max_pool(x, (3, 3, 3), (1, 1, 1))),
        )
        return torch.cat(branches, dim=1)


class I3DGraph(nn.Module):
    """Clips ``(B, 3, T, 224, 224)`` in [-1, 1] to logits ``(B, 400)``, the mean over time.

    Raises:
        DataError: clips are too short, or of another size.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = _Unit(3, 64, 7, 2)
        self.Conv3d_2b_1x1 = _Unit(64, 64)
        self.Conv3d_2c_3x3 = _Unit(64, 192, 3)
        self.Mixed_3b = _Mixed(192, (64, 96, 128, 16, 32, 32))
        self.Mixed_3c = _Mixed(256, (128, 128, 192, 32, 96, 64))
        self.Mixed_4b = _Mixed(480, (192, 96, 208, 16, 48, 64))
        self.Mixed_4c = _Mixed(512, (160, 112, 224, 24, 64, 64))
        self.Mixed_4d = _Mixed(512, (128, 128, 256, 24, 64, 64))
        self.Mixed_4e = _Mixed(512, (112, 144, 288, 32, 64, 64))
        self.Mixed_4f = _Mixed(528, (256, 160, 320, 32, 128, 128))
        self.Mixed_5b = _Mixed(832, (256, 160, 320, 32, 128, 128))
        self.Mixed_5c = _Mixed(832, (384, 192, 384, 48, 128, 128))
        self.logits = _Unit(1024, 400, bare=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class logits, before any softmax."""
        if x.shape[2] < _SMALLEST or tuple(x.shape[3:]) != (_SIDE, _SIDE):
            raise DataError(
                f"I3D reads clips of at least {_SMALLEST} frames and {_SIDE} x {_SIDE} pixels, but "
                f"got {x.shape[2]} frames of {x.shape[3]} x {x.shape[4]}. Give longer clips."
            )
        x = _max_pool(self.Conv3d_1a_7x7(x), (1, 3, 3), (1, 2, 2))
        x = self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x))
        x = _max_pool(x, (1, 3, 3), (1, 2, 2))
        x = _max_pool(self.Mixed_3c(self.Mixed_3b(x)), (3, 3, 3), (2, 2, 2))
        x = self.Mixed_4d(self.Mixed_4c(self.Mixed_4b(x)))
        x = _max_pool(self.Mixed_4f(self.Mixed_4e(x)), (2, 2, 2), (2, 2, 2))
        x = F.avg_pool3d(self.Mixed_5c(self.Mixed_5b(x)), (2, 7, 7), stride=1)
        logits: Tensor = self.logits(x)
        return logits.mean(dim=(2, 3, 4))
