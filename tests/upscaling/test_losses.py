"""Losses between pictures: closed forms, and which differences each of them sees."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.errors import ConfigError
from genscale.upscaling.irn import IRN
from genscale.upscaling.losses import (
    downscaled_loss,
    eagle_loss,
    eagle_weight,
    edge_gradients,
    fourier_loss,
    high_frequency_loss,
    l1_loss,
)
from genscale.upscaling.rescaling_losses import RescalingLoss, quantise, rescaling_loss

ALL = (l1_loss, fourier_loss, downscaled_loss, high_frequency_loss, eagle_loss)


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(shape, generator=generator), torch.rand(shape, generator=generator)


@pytest.mark.parametrize("loss", ALL)
def test_equal_pictures_lose_nothing_and_others_have_a_gradient(loss) -> None:
    made, target = pair(2, 3, 13, 16)
    assert loss(target, target) == 0
    made.requires_grad_()
    value = loss(made, target)
    assert value.shape == ()
    (grad,) = torch.autograd.grad(value, made)
    assert value > 0
    assert grad.isfinite().all()
    assert grad.abs().sum() > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(loss(made, target), value)


@pytest.mark.parametrize("width", [6, 7])
@pytest.mark.parametrize("norm", ["ortho", "backward"])
def test_half_a_spectrum_stands_for_the_whole(width: int, norm: str) -> None:
    made, target = pair(2, 4, 5, width)
    first, second = (torch.fft.fft2(x, norm=norm).abs() for x in (made, target))
    torch.testing.assert_close(fourier_loss(made, target, norm), (first - second).abs().mean())


def test_magnitudes_do_not_see_a_shift() -> None:
    made, _ = pair(1, 4, 8, 8)
    assert fourier_loss(made, made.roll(3, dims=-1)) < 1e-6
    assert l1_loss(made, made.roll(3, dims=-1)) > 0.1


def test_small_pictures_do_not_see_a_checkerboard_and_blurs_see_it_alone() -> None:
    x = torch.full((1, 1, 32, 32), 0.5)
    signs = (-1.0) ** (torch.arange(32)[:, None] + torch.arange(32))
    board = x + 0.1 * signs
    assert downscaled_loss(board, x) < 0.01
    # a blur takes nearly all of a checkerboard away
    assert high_frequency_loss(board, x).item() == pytest.approx(0.1, rel=0.05)
    brighter = x + 0.1
    assert downscaled_loss(brighter, x, factor=4).item() == pytest.approx(0.1)
    assert high_frequency_loss(brighter, x) < 1e-6


def test_the_blur_is_a_5x5_gaussian() -> None:
    impulse = torch.zeros(1, 1, 15, 15)
    impulse[0, 0, 7, 7] = 1.0
    row = torch.tensor([math.exp(-(i**2) / 2) for i in (-2, -1, 0, 1, 2)])
    row = row / row.sum()
    kernel = row[:, None] * row
    left = 1.0 - kernel[2, 2] + (kernel.sum() - kernel[2, 2])  # |delta - kernel|
    got = high_frequency_loss(impulse, torch.zeros_like(impulse)) * 225
    torch.testing.assert_close(got, left)


def test_edges_of_a_ramp() -> None:
    ramp = torch.arange(6.0).expand(1, 1, 6, 6)
    in_x, in_y = edge_gradients(ramp)
    assert (in_x[..., 1:-1, 1:-1] == 32.0).all()  # 2 (3 + 10 + 3)
    assert (in_y[..., 1:-1, 1:-1] == 0.0).all()
    colour = torch.stack([ramp[0, 0] * share for share in (1.0, 2.0, 3.0)])[None]
    luma = 0.2989 + 2 * 0.5870 + 3 * 0.1140
    torch.testing.assert_close(edge_gradients(colour)[0], luma * in_x)


def test_which_weight_of_eagle_is_a_highpass() -> None:
    paper, code = (eagle_weight(8, 10, 0.5, kind) for kind in ("paper", "eagle_code"))
    assert paper[0, 0] == 0
    assert paper[4, 0].item() == pytest.approx(1 - math.exp(-0.5))  # f = 0.5
    assert (paper[0, 1:6].diff() > 0).all()
    assert code[4, 0] == 0
    assert code[0, 0].item() == pytest.approx(1 - math.exp(-0.125))


def test_eagle_grows_with_the_square_of_the_range_and_leaves_trailing_rows_out() -> None:
    made, target = pair(1, 3, 13, 17)
    value = eagle_loss(made, target)
    torch.testing.assert_close(eagle_loss(2 * made, 2 * target), 4 * value)
    changed = made.clone()
    changed[..., 16] += 1.0  # columns 15 and 16 fill no patch; the gradient reaches column 15
    torch.testing.assert_close(eagle_loss(changed, target), value)


def test_what_cannot_be_is_told() -> None:
    made, target = pair(1, 4, 8, 8)
    with pytest.raises(ConfigError, match="grey or RGB pictures, but got 4 channels"):
        eagle_loss(made, target)
    with pytest.raises(ConfigError, match=r"norm is 'orto'.* Did you mean 'ortho'"):
        fourier_loss(made, target, "orto")
    with pytest.raises(ConfigError, match="highpass is 'code'"):
        eagle_loss(made[:, :3], target[:, :3], highpass="code")
    with pytest.raises(ConfigError, match="patches of 9 pixels for pictures of 8x8"):
        eagle_loss(made[:, :3], target[:, :3], patch_size=9)
    with pytest.raises(ConfigError, match="cannot be made 9 times smaller"):
        downscaled_loss(made, target, factor=9)
    with pytest.raises(ConfigError, match="kernel_size of a blur is 4"):
        high_frequency_loss(made, target, kernel_size=4)


def test_rounding_lets_the_gradient_pass() -> None:
    x = torch.tensor([-0.3, 0.0, 0.5, 100.4 / 255, 100.6 / 255, 1.7], requires_grad=True)
    y = quantise(x)
    assert torch.equal(y * 255, torch.tensor([0.0, 0, 128, 100, 101, 255]))
    weights = torch.arange(6.0)
    (grad,) = torch.autograd.grad((y * weights).sum(), x)
    assert torch.equal(grad, weights)  # outside the range too


def test_rescaling_terms_are_sums_of_a_picture() -> None:
    ones = torch.ones(2, 3, 4, 4)
    loss = rescaling_loss(
        small=3 * ones,
        reference=ones,
        rebuilt=torch.zeros(2, 3, 16, 16),
        original=torch.ones(2, 3, 16, 16),
        latent=0.5 * torch.ones(2, 45, 4, 4),
        scale=4,
    )
    assert isinstance(loss, RescalingLoss)
    assert loss.fit == 16 * 48 * 4  # scale^2 times 48 values, each 2 away
    torch.testing.assert_close(loss.reconstruction, torch.tensor(768.0 * math.sqrt(1 + 1e-6)))
    assert loss.latent == 45 * 16 * 0.25
    torch.testing.assert_close(loss.total, loss.fit + loss.reconstruction + loss.latent)
    assert loss.extra == 0
    dual = rescaling_loss(
        small=ones,
        reference=ones,
        rebuilt=ones,
        original=ones,
        latent=0 * ones,
        scale=1,
        extra=0.5 * ones,
        extra_weight=3.0,
    )
    assert dual.extra == 3.0 * 48 * 0.25
    torch.testing.assert_close(dual.total, dual.reconstruction + dual.extra)


def test_a_rescaler_learns_to_rebuild_what_8_bits_keep() -> None:
    model = IRN(scale=2, num_blocks=[1], growth=8)
    place = torch.linspace(0, 6, 16)
    waves = torch.stack([torch.sin(f * place[:, None] + place) for f in (1.0, 2.0, 3.0, 4.0)])
    x = (0.4 * waves[:, None] + 0.5).expand(-1, 3, -1, -1)
    reference = F.interpolate(x, scale_factor=0.5, mode="bicubic", antialias=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    errors = []
    for _ in range(20):
        y, z = model.downscale(x)
        fresh = torch.randn(z.shape, generator=generator)
        rebuilt = model.restore(quantise(y), fresh)
        loss = rescaling_loss(
            small=y, reference=reference, rebuilt=rebuilt, original=x, latent=z, scale=2
        )
        optimizer.zero_grad()
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        errors.append(loss.reconstruction.item())
    assert sum(errors[-5:]) < 0.5 * sum(errors[:5])
    y, _ = model.downscale(x)
    assert (y - reference).abs().mean() < 0.05
