"""PSNR and SSIM of reconstructions, against closed forms and an independent implementation."""

from __future__ import annotations

import pytest
import torch

from genscale.errors import DataError
from genscale.metrics.reconstruction import picture_psnr, picture_ssim, squared_error


def test_psnr_of_a_known_error() -> None:
    images = torch.full((2, 1, 4, 4), 100, dtype=torch.uint8)
    made = torch.stack([images[0] + 5, images[1]])
    assert squared_error(images, made).tolist() == [25.0, 0.0]
    # 10 log10(255^2 / 25); of equal pictures as if one of 16 numbers were off by 1
    expected = torch.tensor([34.1514, 60.1720], dtype=torch.float64)
    assert torch.allclose(picture_psnr(images, made), expected, atol=1e-4)


def test_ssim_of_equal_and_of_constant_pictures() -> None:
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    assert torch.allclose(picture_ssim(images, images), torch.ones(3, dtype=torch.float64))
    # without any variance, the ratio of the means alone is left
    dark, light = (torch.full((1, 1, 12, 12), v, dtype=torch.uint8) for v in (50, 100))
    c1 = (0.01 * 255) ** 2
    expected = (2 * 50 * 100 + c1) / (50**2 + 100**2 + c1)
    assert float(picture_ssim(dark, light)) == pytest.approx(expected)


def test_ssim_of_one_window_by_hand() -> None:
    images, made = (torch.randint(0, 256, (1, 1, 11, 11), dtype=torch.uint8) for _ in range(2))
    x, y = images[0, 0].double(), made[0, 0].double()
    place = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-(place**2) / (2 * 1.5**2))
    window = torch.outer(line, line)
    window = window / window.sum()
    mx, my = (window * x).sum(), (window * y).sum()
    vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
    cxy = (window * (x - mx) * (y - my)).sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = (2 * mx * my + c1) * (2 * cxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert float(picture_ssim(images, made)) == pytest.approx(float(expected), abs=1e-9)


def test_small_pictures_have_a_small_window() -> None:
    images = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    assert torch.allclose(picture_ssim(images, images), torch.ones(2, dtype=torch.float64))


def test_other_shapes_are_refused() -> None:
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(DataError, match="Give one for each, of the same size"):
        picture_psnr(images, images[:1])
