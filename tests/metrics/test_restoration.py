"""Scores of restored pictures against closed forms and torchmetrics."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from genscale.errors import ConfigError, DataError
from genscale.metrics.reconstruction import picture_psnr, picture_ssim, structural_similarity
from genscale.metrics.restoration import restoration_ms_ssim, restoration_psnr, restoration_ssim


def pair(side: int, channels: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (2, channels, side, side), generator=generator)
    noise = torch.randint(-30, 31, x.shape, generator=generator)
    return x.to(torch.uint8), (x + noise).clamp(0, 255).to(torch.uint8)


def test_rgb_scores_without_border_are_those_of_reconstructions() -> None:
    x, made = pair(24)
    torch.testing.assert_close(restoration_psnr(x, made, channel="rgb"), picture_psnr(x, made))
    torch.testing.assert_close(restoration_ssim(x, made, channel="rgb"), picture_ssim(x, made))
    full, structure = structural_similarity(x.double(), made.double())
    assert torch.equal(full, picture_ssim(x, made))
    assert (structure > full).all()


def test_luma_weighs_colours_and_spans_219_levels() -> None:
    x = torch.full((1, 3, 8, 8), 100, dtype=torch.uint8)
    made = x.clone()
    made[:, 1] += 10  # green alone
    expected = 20 * math.log10(255 / (10 * 128.553 / 255))
    assert restoration_psnr(x, made).item() == pytest.approx(expected)
    brighter = x + 10
    expected = 20 * math.log10(255 / (10 * 219 / 255))
    assert restoration_psnr(x, brighter).item() == pytest.approx(expected)
    grey = restoration_psnr(x[:, :1], brighter[:, :1]).item()  # its own values
    assert grey == pytest.approx(20 * math.log10(255 / 10))
    assert restoration_psnr(x, x).item() == math.inf


def test_borders_are_left_out() -> None:
    x, made = pair(24)
    inside = (..., slice(4, 20), slice(4, 20))
    for score in (restoration_psnr, restoration_ssim):
        torch.testing.assert_close(score(x, made, border=4), score(x[inside], made[inside]))
        assert not torch.allclose(score(x, made, border=4), score(x, made))


def inside_ssim(made: Tensor, images: Tensor) -> Tensor:
    """Return torchmetrics' SSIM of places where the window lies inside; its mean is of all."""
    _, places = structural_similarity_index_measure(
        made, images, data_range=255.0, reduction="none", return_full_image=True
    )
    return places[..., 5:-5, 5:-5].flatten(1).mean(1)


def test_ssim_and_ms_ssim_are_torchmetrics_inside_the_picture() -> None:
    x, made = pair(180, channels=1)
    first, second = made.double(), x.double()
    torch.testing.assert_close(
        restoration_ssim(x, made), inside_ssim(first, second), rtol=1e-6, atol=0
    )
    product = torch.ones(2, dtype=torch.float64)
    for weight in (0.0448, 0.2856, 0.3001, 0.2363):
        _, structure = structural_similarity_index_measure(
            first, second, data_range=255.0, reduction="none", return_contrast_sensitivity=True
        )
        product *= structure**weight
        first, second = F.avg_pool2d(first, 2), F.avg_pool2d(second, 2)
    product *= inside_ssim(first, second) ** 0.1333
    torch.testing.assert_close(restoration_ms_ssim(x, made), product, rtol=1e-6, atol=0)
    assert torch.equal(restoration_ms_ssim(x, x), torch.ones(2, dtype=torch.float64))


def test_what_cannot_be_is_told() -> None:
    x, made = pair(16)
    with pytest.raises(DataError, match="MS-SSIM needs pictures of 176x176"):
        restoration_ms_ssim(x, made)
    with pytest.raises(ConfigError, match="channel is 'luma', expected y or rgb"):
        restoration_psnr(x, made, channel="luma")
    with pytest.raises(DataError, match="border of 8 leaves nothing"):
        restoration_psnr(x, made, border=8)
    with pytest.raises(DataError, match="Give one for each"):
        restoration_psnr(x, made[:1])
