"""IARN: a bijection at full size, any factor on either axis, and bicubic resizing to begin with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from genscale.errors import ConfigError, DataError
from genscale.upscaling.iarn import IARN, position_map, resized

SIZES = [(6, 6), (4, 8), (8, 5), (12, 12)]  # x2, x3 and x1.5, x1.5 and x2.4, x1


def stirred(**settings: object) -> IARN:
    """Return a tiny model away from its start, where every block is the identity."""
    model: IARN = IARN(num_blocks=2, growth=4, **settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def pictures(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("small", SIZES)
def test_couplings_are_undone_at_every_scale(small: tuple[int, int]) -> None:
    model = stirred()
    parts = pictures(2, 6, 12, 12) - 0.5
    with torch.no_grad():
        there = model.couple(parts, small)
        back = model.couple(there, small, inverse=True)
    assert (there - parts).abs().max() > 0.01
    assert (back - parts).abs().max() < 1e-5


def test_what_is_lost_is_lost_in_the_resize_alone() -> None:
    model = stirred().double()
    x = pictures(1, 3, 12, 12, dtype=torch.float64)
    y = model.downscale(x, (12, 12))  # no resize: only the second half is gone
    low = torch.cat((x, torch.zeros_like(x)), dim=1)
    assert torch.equal(y, model.couple(low, (12, 12))[:, :3])


@pytest.mark.parametrize("small", SIZES)
def test_a_new_model_is_bicubic_resizing(small: tuple[int, int]) -> None:
    model = IARN(num_blocks=1, growth=4)
    x = pictures(1, 3, 12, 12)
    y = model.downscale(x, small)
    assert y.shape == (1, 3, *small)
    torch.testing.assert_close(y, resized(resized(resized(x, small), (12, 12)), small))
    torch.testing.assert_close(model.enlarge(y, (12, 12)), resized(y, (12, 12)))


def test_whole_factors_are_an_upscalers() -> None:
    model = stirred()
    y = pictures(2, 3, 5, 7)
    assert torch.equal(model(y, 3), model.enlarge(y, (15, 21)))
    assert model.upscale(y, 2, tile=4, overlap=2).shape == (2, 3, 10, 14)


def test_rebuilt_activations_give_the_same_gradients() -> None:
    model = stirred().double()
    x = pictures(2, 3, 8, 12, dtype=torch.float64)
    results = []
    for reversible in (True, False):
        model.operations.reversible = reversible
        leaf = x.clone().requires_grad_()
        y = model.downscale(leaf, (5, 4))
        made = model.enlarge(y, (8, 12))
        loss = (made - x).abs().mean() + y.square().mean()
        results.append((loss, *torch.autograd.grad(loss, (leaf, *model.parameters()))))
    for rebuilt, kept in zip(*results, strict=True):
        torch.testing.assert_close(rebuilt, kept, rtol=1e-8, atol=1e-12)


def test_couplings_know_the_scale_and_the_place() -> None:
    model = stirred()
    parts = pictures(1, 6, 12, 12)
    with torch.no_grad():
        assert not torch.equal(model.couple(parts, (6, 6)), model.couple(parts, (6, 4)))


def test_positions() -> None:
    map_ = position_map((4, 6), (2, 4), like=torch.zeros(()))[0]
    # two rows a small row: a quarter before and behind its centre
    assert map_[0, :, 0].tolist() == [-0.25, 0.25, -0.25, 0.25]
    # three columns on two small ones: 1/3 - 1/2 = -1/6, 1/2 is a border (the next one's), 7/6
    torch.testing.assert_close(map_[1, 0, :3], torch.tensor([-1 / 6, -0.5, 1 / 6]))
    assert map_[2].unique().tolist() == [0.5]
    torch.testing.assert_close(map_[3], torch.full((4, 6), 2 / 3))
    ramp = position_map((7, 1), (3, 1), like=torch.zeros(()))[0, 0, :, 0]
    assert (ramp >= -0.5).all()
    assert (ramp < 0.5).all()


def test_a_saved_model_comes_back(tmp_path) -> None:
    model = stirred(scales=[2])
    model.save_pretrained(tmp_path)
    again = IARN.from_pretrained(tmp_path)
    x = pictures(1, 3, 6, 6)
    assert torch.equal(again.downscale(x, (4, 3)), model.downscale(x, (4, 3)))
    again.reset_parameters()
    torch.testing.assert_close(again(x, 2), resized(x, (12, 12)))


def test_what_cannot_be_is_told() -> None:
    with pytest.raises(ConfigError, match="num_blocks=0"):
        IARN(num_blocks=0)
    model = stirred()
    with pytest.raises(DataError, match="Pictures of 6x6 do not belong to smaller ones of 7x3"):
        model.downscale(pictures(1, 3, 6, 6), (7, 3))
    with pytest.raises(DataError, match="Pictures of 4x9"):
        model.enlarge(pictures(1, 3, 6, 6), (4, 9))
    with pytest.raises(ConfigError, match="keep it in float32"):
        model.to(torch.bfloat16).downscale(pictures(1, 3, 8, 8), (4, 4))
