"""Two routes from pictures to what CLIP reads: Pillow's, and one with a gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.autograd import gradcheck

from genscale.errors import DataError
from genscale.rewards.preprocessing import (
    CLIP_MEAN,
    CLIP_STD,
    Preprocessing,
    as_unit_rgb,
    resize_bicubic,
    to_pictures,
)
from tests.rewards.small_clip import pictures

UNCHANGED = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def test_the_exact_route_is_pillow_on_8_bits() -> None:
    image = pictures(1, side=40)
    picture = Image.fromarray((image[0].permute(1, 2, 0) * 255).add(0.5).floor().byte().numpy())
    expected = np.asarray(picture.resize((16, 16), Image.Resampling.BICUBIC), dtype=np.float32)
    found = Preprocessing(16, exact=True)(image)[0].permute(1, 2, 0)
    wanted = (torch.from_numpy(expected) / 255 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("side", [40, 12])
def test_the_routes_differ_by_the_rounding_alone(side: int) -> None:
    images = 0.2 + 0.6 * pictures(3, side=side)  # bicubic overshoots, and 8 bits would clip it
    exact = Preprocessing(16, exact=True, **UNCHANGED)(images)
    free = Preprocessing(16, **UNCHANGED)(images)
    # half a level going in and after each of Pillow's two passes, raised by negative weights
    assert 0 < (exact - free).abs().max() < 1.9 / 255
    assert (Preprocessing(exact=True).label, Preprocessing().label) == ("pil", "tensor")


def test_the_shorter_side_fits_and_the_centre_is_kept() -> None:
    ramp = torch.linspace(0, 1, 40).expand(1, 3, 20, 40)
    found = Preprocessing(20, **UNCHANGED)(ramp)
    torch.testing.assert_close(found, ramp[..., 10:30], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("rounding", "first"), [("even", 2), ("down", 1)])
def test_half_pixels_of_a_crop_are_rounded_as_each_library_does(rounding: str, first: int) -> None:
    ramp = (torch.arange(23) / 23).expand(1, 3, 20, 23)
    found = Preprocessing(20, rounding=rounding, **UNCHANGED)(ramp)  # type: ignore[arg-type]
    assert found[0, 0, 0, 0] == pytest.approx(first / 23, abs=1e-6)


@pytest.mark.parametrize("exact", [False, True])
def test_padding_keeps_everything_and_is_black(exact: bool) -> None:
    found = Preprocessing(16, exact=exact, fit="pad", **UNCHANGED)(torch.ones(1, 3, 20, 40))
    assert found.shape == (1, 3, 16, 16)
    torch.testing.assert_close(found[:, :, 4:12], torch.ones(1, 3, 8, 16))
    assert found[:, :, :4].eq(0).all()
    assert found[:, :, 12:].eq(0).all()


def test_the_tensor_route_has_the_gradient_of_what_it_computes() -> None:
    images = pictures(1, side=6).double().requires_grad_()
    assert gradcheck(lambda x: resize_bicubic(x, 4, 4), (images,))
    assert torch.autograd.grad(Preprocessing(4)(images).sum(), images)[0].ne(0).any()
    assert not Preprocessing(4, exact=True)(images).requires_grad


def test_grey_pictures_have_three_channels_and_others_are_refused() -> None:
    assert as_unit_rgb(torch.zeros(2, 1, 4, 4)).shape == (2, 3, 4, 4)
    assert to_pictures(torch.full((1, 3, 2, 2), 0.5)).tolist() == [[[[128] * 3] * 2] * 2]
    with pytest.raises(DataError, match=r"\(B, 1 or 3, H, W\), but got \(1, 4, 8, 8\)"):
        Preprocessing()(torch.zeros(1, 4, 8, 8))
