"""Losses between an upscaled picture (or latent) and its target; all are means of absolute values.

L1, the magnitudes of the spectrum, the picture made small again, what a blur removes, and EAGLE
(Sun et al., "EAGLE: an edge-aware gradient localization enhanced loss", arXiv:2403.10695).
Everything is computed in float32, autocast or not: half precision has no Fourier transform.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.errors import ConfigError, did_you_mean
from genscale.layers.norm import no_autocast

FourierNorm = Literal["ortho", "backward"]
HighPass = Literal["paper", "eagle_code"]

_LUMINANCE = (0.2989, 0.5870, 0.1140)  # MATLAB's rgb2gray, ITU-R BT.601


def l1_loss(made: Tensor, target: Tensor) -> Tensor:
    """Return the mean absolute difference of tensors ``(B, C, H, W)``."""
    return (made.float() - target.float()).abs().mean()


def fourier_loss(made: Tensor, target: Tensor, norm: FourierNorm = "ortho") -> Tensor:
    """Return the mean absolute difference of the magnitudes of the spectra.

    Args:
        made: ``(B, C, H, W)``; the transform is that of every channel.
        target: the same shape.
        norm: ``ortho`` keeps the scale of the values at every size; ``backward`` does not
            normalise, so that magnitudes grow with sqrt(H W).
    """
    _check_choice("norm", norm, get_args(FourierNorm))
    with no_autocast(made.device):
        spectra = (torch.fft.rfft2(x.float(), norm=norm) for x in (made, target))
        first, second = (spectrum.abs() for spectrum in spectra)
        # real values: every column but the first, and the middle one, stands for itself and for
        # its mirror image
        width = made.shape[-1]
        weight = first.new_full((first.shape[-1],), 2.0)
        weight[0] = 1.0
        if width % 2 == 0:
            weight[-1] = 1.0
        return ((first - second).abs() * weight).mean(dim=(0, 1, 2)).sum() / width


def downscaled_loss(made: Tensor, target: Tensor, factor: int = 2) -> Tensor:
    """Return the mean absolute difference after antialiased bicubic downscaling.

    Args:
        made: ``(B, C, H, W)``.
        target: the same shape.
        factor: how much smaller, an integer.
    """
    size = [side // factor for side in made.shape[2:]]
    if factor < 1 or min(size) < 1:
        raise ConfigError(
            f"Pictures of {made.shape[2]}x{made.shape[3]} cannot be made {factor} times smaller; "
            "give a factor from 1 to their shorter side."
        )
    with no_autocast(made.device):
        small, wanted = (
            F.interpolate(x.float(), size, mode="bicubic", antialias=True, align_corners=False)
            for x in (made, target)
        )
        return (small - wanted).abs().mean()


def high_frequency_loss(
    made: Tensor, target: Tensor, kernel_size: int = 5, sigma: float = 1.0
) -> Tensor:
    """Return the mean absolute difference of what a Gaussian blur takes away.

    Args:
        made: ``(B, C, H, W)``; edges are mirrored.
        target: the same shape.
        kernel_size: odd width of the blur, less than twice the shorter side.
        sigma: its standard deviation in pixels.
    """
    if kernel_size % 2 == 0:
        raise ConfigError(f"kernel_size of a blur is {kernel_size}; give an odd number.")
    with no_autocast(made.device):
        difference = made.float() - target.float()  # the blur is linear
        place = torch.arange(kernel_size, device=made.device) - kernel_size // 2
        window = torch.exp(-place.square() / (2.0 * sigma**2))
        window = window / window.sum()
        channels, pad = difference.shape[1], kernel_size // 2
        blurred = F.pad(difference, (pad, pad, pad, pad), mode="reflect")
        for shape in ((1, 1, -1, 1), (1, 1, 1, -1)):
            kernel = window.view(shape).repeat(channels, 1, 1, 1)
            blurred = F.conv2d(blurred, kernel, groups=channels)
        return (difference - blurred).abs().mean()


def eagle_loss(
    made: Tensor,
    target: Tensor,
    patch_size: int = 3,
    cutoff: float = 0.5,
    highpass: HighPass = "paper",
) -> Tensor:
    """Return EAGLE: how much the texture of edges differs above a frequency.

    Luminance -> Scharr gradients in x and y -> their variance in every patch -> magnitude of the
    spectrum of that map -> times a weight -> mean absolute difference, added over x and y. It
    grows with the square of the values' range.

    Args:
        made: ``(B, 1 or 3, H, W)``.
        target: the same shape.
        patch_size: side of the patches; rows and columns that fill none are left out.
        cutoff: where the weight rises, in cycles a patch.
        highpass: see :func:`eagle_weight`.
    """
    with no_autocast(made.device):
        loss = made.new_zeros((), dtype=torch.float32)
        pairs = zip(edge_gradients(made), edge_gradients(target), strict=True)
        for own, wanted in pairs:
            maps = [_patch_variance(gradient, patch_size) for gradient in (own, wanted)]
            rows, columns = maps[0].shape[2:]
            weight = eagle_weight(rows, columns, cutoff, highpass).to(made.device)
            first, second = (torch.fft.fft2(variance).abs() * weight for variance in maps)
            loss = loss + (first - second).abs().mean()
        return loss


def eagle_weight(rows: int, columns: int, cutoff: float, highpass: HighPass) -> Tensor:
    """Return the weight of every frequency, float32 ``(rows, columns)``.

    Args:
        rows: frequencies along the height.
        columns: frequencies along the width.
        cutoff: in cycles a sample.
        highpass: ``paper``: 1 - exp(-f^2 / (2 cutoff^2)), zero at f = 0 and growing;
            ``eagle_code``: 1 - exp(-(f - cutoff)^2 / 2) as the authors' program has it, which is
            zero at the cutoff and not at f = 0.
    """
    _check_choice("highpass", highpass, get_args(HighPass))
    frequency = torch.hypot(torch.fft.fftfreq(rows)[:, None], torch.fft.fftfreq(columns)[None])
    if highpass == "paper":
        return 1.0 - torch.exp(-frequency.square() / (2.0 * cutoff**2))
    return 1.0 - torch.exp(-0.5 * (frequency - cutoff).square())  # parity: not a high-pass


def edge_gradients(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return Scharr's gradients of the luminance in x and in y, each float32 ``(B, 1, H, W)``.

    Beyond the edges pictures are zero.

    Args:
        images: ``(B, 1 or 3, H, W)``.
    """
    if images.shape[1] not in (1, 3):
        raise ConfigError(
            f"EAGLE compares grey or RGB pictures, but got {images.shape[1]} channels; use it on "
            "decoded pictures, not on latents."
        )
    images = images.float()
    if images.shape[1] == 3:
        images = (images * images.new_tensor(_LUMINANCE).view(3, 1, 1)).sum(1, keepdim=True)
    kernel = images.new_tensor([[-3.0, 0.0, 3.0], [-10.0, 0.0, 10.0], [-3.0, 0.0, 3.0]])
    both = F.conv2d(images, torch.stack((kernel, kernel.T))[:, None], padding=1)
    return both[:, :1], both[:, 1:]


def _patch_variance(x: Tensor, size: int) -> Tensor:
    """Return the unbiased variance of every patch: ``(B, 1, H // size, W // size)``."""
    rows, columns = x.shape[2] // size, x.shape[3] // size
    if size < 2 or min(rows, columns) < 1:
        raise ConfigError(
            f"EAGLE was given patches of {size} pixels for pictures of "
            f"{x.shape[2]}x{x.shape[3]}; give a patch_size from 2 to their shorter side."
        )
    patches = x[..., : rows * size, : columns * size].unflatten(2, (rows, size))
    return patches.unflatten(4, (columns, size)).var(dim=(3, 5))


def _check_choice(name: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise ConfigError(
            f"{name} is '{given}', expected one of {', '.join(known)}.{did_you_mean(given, known)}"
        )
