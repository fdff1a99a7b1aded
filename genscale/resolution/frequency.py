"""Low frequencies of pictures: blurs, low-pass filters and masks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.layers.norm import upcast


def by_frames(change: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Change pictures ``(B, C, H, W)``, or each frame of clips ``(B, C, T, H, W)``."""
    if x.dim() == 4:
        return change(x)
    frames = x.transpose(1, 2)
    changed = change(frames.flatten(0, 1))
    return changed.unflatten(0, tuple(frames.shape[:2])).transpose(1, 2)


def gaussian_kernel(size: int, sigma: float, device: torch.device | None = None) -> Tensor:
    """Return ``(size,)`` float32 weights exp(-d^2 / 2 sigma^2) around the middle, of sum 1."""
    distance = torch.arange(size, dtype=torch.float32, device=device) - (size - 1) / 2
    weights = torch.exp(-(distance**2) / (2 * sigma**2))
    return weights / weights.sum()


def gaussian_blur(x: Tensor, size: int, sigma: float, *, blur_channels: bool = False) -> Tensor:
    """Blur pictures ``(B, C, H, W)``, or frames of clips; what lies outside counts as zero.

    Args:
        x: the pictures.
        size: side of the kernel, odd.
        sigma: its standard deviation in cells.
        blur_channels: parity: blur across neighbouring channels too, as FreeScale's program does.
    """

    def blur(x: Tensor) -> Tensor:
        y = upcast(x)[:, None]  # (B, 1, C, H, W): one pass of one dimension an axis
        kernel = gaussian_kernel(size, sigma, x.device).to(y.dtype)
        for axis in range(0 if blur_channels else 1, 3):
            shape, padding = [1, 1, 1], [0, 0, 0]
            shape[axis], padding[axis] = size, size // 2
            y = F.conv3d(y, kernel.view(1, 1, *shape), padding=tuple(padding))
        return y[:, 0].to(x.dtype)

    return by_frames(blur, x)


def match_statistics(x: Tensor, like: Tensor, *, per_sample: bool = True) -> Tensor:
    """Give ``x`` the mean and standard deviation of ``like``, in float32.

    Args:
        x: ``(B, C, H, W)``.
        like: ``(B, C, h, w)``.
        per_sample: each sample has its own, so that samples of a batch do not meet; parity:
            False takes those of the whole batch, as DemoFusion's program does.
    """
    axes = tuple(range(1, x.dim())) if per_sample else tuple(range(x.dim()))
    wide, target = upcast(x), upcast(like)
    mean, std = wide.mean(axes, keepdim=True), wide.std(axes, keepdim=True)
    new_mean, new_std = target.mean(axes, keepdim=True), target.std(axes, keepdim=True)
    # a constant picture has no deviation to rescale
    ratio = torch.where(std > 0, new_std / std.clamp_min(1e-30), torch.zeros_like(std))
    return ((wide - mean) * ratio + new_mean).to(x.dtype)


def butterworth(
    height: int,
    width: int,
    ratio: float = 0.2,
    *,
    order: int = 4,
    centred: bool = False,
    device: torch.device | None = None,
) -> Tensor:
    """Return the mask 1 / (1 + (d^2 / ratio^2)^order) of shifted spectra, ``(H, W)`` float32.

    d^2 = (2 h / H - 1)^2 + (2 w / W - 1)^2, which is 0 at the mean and 1 at the highest
    frequency along an axis.

    Args:
        height: rows H.
        width: columns W.
        ratio: the d of half the amplitude; 0 lets nothing pass, 1 and more nearly all.
        order: how steep.
        centred: put d = 0 on the mean on odd sides too, where HiFlow's program is off by half a
            frequency; even sides are the same.
        device: where to put it.
    """
    if ratio == 0:
        return torch.zeros(height, width, device=device)

    def along(count: int) -> Tensor:
        places = torch.arange(count, dtype=torch.float64)
        if centred:
            return (places - count // 2) * 2 / count
        return 2 * places / count - 1

    squares = along(height)[:, None] ** 2 + along(width) ** 2
    return (1 / (1 + (squares / ratio**2) ** order)).float().to(device)


def low_pass(x: Tensor, mask: Tensor) -> Tensor:
    """Multiply shifted spectra of pictures ``(..., H, W)`` by a mask ``(H, W)``.

    In float32 always: CUDA has no half-precision transform of sides that are no power of two.
    """
    spectrum = torch.fft.fft2(upcast(x))
    # moving the mask is cheaper than moving the spectrum there and back
    spectrum = spectrum * torch.fft.ifftshift(mask, dim=(-2, -1)).to(x.device)
    return torch.fft.ifft2(spectrum).real.to(x.dtype)


def haar_low_pass(x: Tensor) -> Tensor:
    """Keep the low band of one level of the Haar wavelet: the mean of every 2 x 2 block.

    Args:
        x: ``(B, C, H, W)``, or clips; odd sides are lengthened by their last cell and cut again.
    """
    height, width = x.shape[-2:]

    def keep(x: Tensor) -> Tensor:
        padded = F.pad(upcast(x), (0, width % 2, 0, height % 2), mode="replicate")
        means = F.avg_pool2d(padded, 2)
        whole = means.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)
        return whole[..., :height, :width].to(x.dtype)

    return by_frames(keep, x)
