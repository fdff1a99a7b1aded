"""How close a reconstruction is to its own picture: PSNR and SSIM, picture by picture."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.errors import DataError
from genscale.metrics.features import check_images

WINDOW, _SIGMA = 11, 1.5
_SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang, Simoncelli and Bovik 2003
_K1, _K2 = 0.01, 0.03


def squared_error(images: Tensor, made: Tensor) -> Tensor:
    """Return every picture's mean squared error in grey levels: float64 ``(n,)``.

    Args:
        images: uint8 ``(n, 1 or 3, H, W)``.
        made: the same shape.

    Raises:
        DataError: other types or shapes.
    """
    first, second = _pair(images, made)
    return (first - second).square().flatten(1).mean(1)


def picture_psnr(images: Tensor, made: Tensor) -> Tensor:
    """Return every picture's peak signal-to-noise ratio in dB: float64 ``(n,)``.

    10 log10(255^2 / mean squared error); equal pictures count as one level in one number wrong,
    so that means stay finite. The arguments are :func:`squared_error`'s.
    """
    least = 1.0 / images[0].numel()
    return 10.0 * torch.log10(255.0**2 / squared_error(images, made).clamp(min=least))


def picture_ssim(images: Tensor, made: Tensor) -> Tensor:
    """Return every picture's structural similarity: float64 ``(n,)``, 1 for equal pictures.

    Wang et al., IEEE TIP 13(4), 2004: a Gaussian window of 11 pixels and sigma 1.5, inside the
    picture only, averaged over places and channels. In pictures below 11 pixels the window is as
    wide as they are. The arguments are :func:`squared_error`'s.
    """
    return structural_similarity(*_pair(images, made))[0]


def structural_similarity(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return SSIM, and its part without the comparison of means; see :func:`picture_ssim`.

    Args:
        x: floating point ``(n, C, H, W)`` in grey levels 0..255.
        y: the same shape.
    """
    size = min(WINDOW, *x.shape[2:])
    place = torch.arange(size, dtype=x.dtype, device=x.device) - (size - 1) / 2
    window = torch.exp(-place.square() / (2 * _SIGMA**2))
    window = window / window.sum()
    mean_x, mean_y = _blur(x, window), _blur(y, window)
    variance_x = _blur(x * x, window) - mean_x.square()
    variance_y = _blur(y * y, window) - mean_y.square()
    covariance = _blur(x * y, window) - mean_x * mean_y
    c1, c2 = (_K1 * 255.0) ** 2, (_K2 * 255.0) ** 2
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    means = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    return (means * structure).flatten(1).mean(1), structure.flatten(1).mean(1)


def multiscale_similarity(
    x: Tensor, y: Tensor, *, num_scales: int = len(_SCALE_WEIGHTS), least: float = 0.0
) -> Tensor:
    """Return every picture's structural similarity over several scales: ``(n,)``.

    Wang, Simoncelli and Bovik, Asilomar 2003: the product of powers of the structure term at every
    scale, and of the full term at the last; pictures are halved by averaging 2x2 squares. The
    exponents of fewer than five scales are the first ones, brought to the sum of 1.

    Args:
        x: floating point ``(n, C, H, W)`` in grey levels 0..255.
        y: the same shape.
        num_scales: 1 to 5.
        least: what a term below it counts as; above 0 where gradients are taken, which no power
            below 1 has at 0.
    """
    weights = torch.tensor(_SCALE_WEIGHTS[:num_scales], dtype=torch.float64)
    if num_scales < len(_SCALE_WEIGHTS):
        weights = weights / weights.sum()
    result = x.new_ones(len(x))
    for number, weight in enumerate(weights.tolist(), start=1):
        full, structure = structural_similarity(x, y)
        term = full if number == num_scales else structure
        result = result * term.clamp(min=least) ** weight
        if number < num_scales:
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return result


def fitting_scales(height: int, width: int) -> int:
    """Return at how many scales, 1 to 5, the window of 11 pixels fits into a picture."""
    fitting = 1
    while fitting < len(_SCALE_WEIGHTS) and min(height, width) >= WINDOW * 2**fitting:
        fitting += 1
    return fitting


def _blur(x: Tensor, window: Tensor) -> Tensor:
    channels = x.shape[1]
    rows = window.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
    columns = window.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
    return F.conv2d(F.conv2d(x, rows, groups=channels), columns, groups=channels)


def check_pair(images: Tensor, made: Tensor) -> None:
    """Raise a ``DataError`` unless both are 8-bit pictures of one shape."""
    if check_images(images).shape != check_images(made).shape:
        raise DataError(
            f"Pictures of shape {tuple(images.shape)} were given reconstructions of shape "
            f"{tuple(made.shape)}. Give one for each, of the same size."
        )


def _pair(images: Tensor, made: Tensor) -> tuple[Tensor, Tensor]:
    check_pair(images, made)
    return images.double(), made.double()
