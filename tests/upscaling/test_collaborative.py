"""Collaborative downscaling: no sample gets worse, every sample that can get better does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.errors import ConfigError
from genscale.upscaling.collaborative import Collaborative, collaborative_downscale
from genscale.upscaling.irn import IRN
from genscale.upscaling.rescaling_losses import quantise


def down(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


def up(y: Tensor) -> Tensor:
    return F.interpolate(y, scale_factor=2, mode="bicubic", align_corners=False)


def pictures(count: int = 4, side: int = 16) -> Tensor:
    """Return waves of several directions and lengths, with an edge, in [0, 1]."""
    place = torch.arange(side) / side
    turns = torch.arange(1, count + 1).view(-1, 1, 1)
    wave = torch.sin(9.0 * turns * place[:, None] + 5.0 * place) * 0.3 + 0.5
    wave[:, side // 2 :, side // 3 :] *= 0.4
    return torch.stack((wave, 1.0 - wave, wave.flip(1)), dim=1)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("straight_through", [True, False])
def test_every_picture_is_rebuilt_better_from_8_bits(norm: str, straight_through: bool) -> None:
    x = pictures()
    result = collaborative_downscale(down, up, x, norm=norm, straight_through=straight_through)
    assert isinstance(result, Collaborative)
    assert (result.after < result.before).all()
    # what is told can be had: from the stored levels, by the plain upscaler
    assert torch.equal(torch.round(result.small * 255) / 255, result.small)
    own = (up(result.small) - x).square().flatten(1).mean(1)
    torch.testing.assert_close(own, result.after)
    plain = (up(quantise(down(x))) - x).square().flatten(1).mean(1)
    torch.testing.assert_close(plain, result.before)


def test_moves_below_half_a_level_count_where_the_rounding_is_in_place() -> None:
    x = pictures()
    small = {"norm": "linf", "eps": 0.4 / 255, "alpha": 0.1 / 255, "steps_hr": 0}
    aware = collaborative_downscale(down, up, x, **small)
    assert (aware.after < aware.before).all()
    # as published, the search starts on a level and such moves round back to it
    published = collaborative_downscale(down, up, x, straight_through=False, **small)
    assert torch.equal(published.after, published.before)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_small_pictures_stay_in_the_ball(norm: str) -> None:
    x = pictures()
    settings = {"steps_hr": 0, "quantise": False, "norm": norm}
    result = collaborative_downscale(down, up, x, eps=0.02, alpha=0.05, **settings)
    moved = (result.small - down(x)).flatten(1)
    length = moved.norm(dim=1) if norm == "l2" else moved.abs().amax(1)
    assert (length <= 0.02 * (1 + 1e-5)).all()
    assert (length > 0).all()


def test_the_best_iterate_is_kept_even_where_steps_overshoot() -> None:
    x = pictures()
    result = collaborative_downscale(down, up, x, eps=50.0, alpha=40.0, steps_hr=2, steps_lr=2)
    assert (result.after <= result.before).all()
    worse = result.after == result.before
    assert torch.equal(result.small[worse], quantise(down(x))[worse])


def test_a_sample_does_not_depend_on_its_batch() -> None:
    x, seeds = pictures(), torch.arange(10, 14)
    whole = collaborative_downscale(down, up, x, steps_hr=3, steps_lr=3, seeds=seeds)
    part = collaborative_downscale(down, up, x[2:], steps_hr=3, steps_lr=3, seeds=seeds[2:])
    assert torch.equal(whole.small[2:], part.small)
    other = collaborative_downscale(down, up, x[2:], steps_hr=3, steps_lr=3, seeds=seeds[:2])
    assert not torch.equal(other.small, part.small)


def test_evaluations_are_counted() -> None:
    calls = 0

    def counted(y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return up(y)

    for settings in ({}, {"straight_through": False}, {"restarts": 2, "lr_target": "original"}):
        calls = 0
        result = collaborative_downscale(
            down, counted, pictures(1), steps_hr=2, steps_lr=3, **settings
        )
        assert result.evaluations == calls
    assert collaborative_downscale(down, up, pictures(1), steps_hr=0, steps_lr=0).evaluations == 2


def test_latents_of_any_range_are_improved_too() -> None:
    x = 6.0 * pictures() - 3.0
    result = collaborative_downscale(down, up, x, quantise=False, value_range=None)
    assert (result.after < result.before).all()
    assert result.small.min() < 0.0


def test_it_works_on_a_bijection() -> None:
    model = IRN(scale=2, num_blocks=[1], growth=4).requires_grad_(False)
    x = pictures(2)
    result = collaborative_downscale(
        lambda picture: model.downscale(picture)[0],
        lambda small: model(small, 2),
        x,
        steps_hr=4,
        steps_lr=4,
        norm="linf",
    )
    assert (result.after <= result.before).all()


def test_settings_that_make_no_sense_are_told() -> None:
    x = pictures(1)
    with pytest.raises(ConfigError, match="norm is 'l3', expected one of l2, linf"):
        collaborative_downscale(down, up, x, norm="l3")
    with pytest.raises(ConfigError, match=r"lr_target is 'adjust'.* Did you mean 'adjusted'"):
        collaborative_downscale(down, up, x, lr_target="adjust")
    with pytest.raises(ConfigError, match="or quantise=false for latents"):
        collaborative_downscale(down, up, x, value_range=None)
    with pytest.raises(ConfigError, match="eps=-1"):
        collaborative_downscale(down, up, x, eps=-1)
