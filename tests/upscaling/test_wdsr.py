"""WDSR: the published sizes, filters of a given length, and a start that interpolates."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from genscale.errors import ConfigError
from genscale.upscaling.wdsr import WDSR, NormalizedConv, WideBlock

TINY = {"hidden_size": 4, "num_blocks": 2, "expansion": 2}


def test_sizes_are_those_of_its_convolutions() -> None:
    with torch.device("meta"):
        model = WDSR(scale=2)

    def conv(inputs: int, outputs: int, side: int) -> int:
        return inputs * outputs * side**2 + 2 * outputs  # a length and a bias each

    expected = 16 * (conv(32, 128, 3) + conv(128, 32, 3))
    expected += conv(3, 32, 3) + conv(32, 12, 3) + conv(3, 12, 5)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_filters_have_the_length_they_are_given() -> None:
    torch.manual_seed(0)
    conv = NormalizedConv(3, 5, 3, length=2.0)
    impulse = torch.zeros(3, 3, 5, 5)
    impulse[torch.arange(3), torch.arange(3), 2, 2] = 1.0
    weight = conv(impulse)[:, :, 1:4, 1:4]  # (inputs, outputs, 3, 3), turned
    torch.testing.assert_close(weight.square().sum(dim=(0, 2, 3)), torch.full((5,), 4.0))
    with torch.no_grad():
        conv.weight_v *= 7.0
    torch.testing.assert_close(conv(impulse)[:, :, 1:4, 1:4], weight)
    block = WideBlock(4, 2, 3, length=0.0)
    x = torch.rand(1, 4, 5, 5)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("scale", [2, 3])
def test_it_can_begin_as_bicubic_interpolation(scale: int) -> None:
    torch.manual_seed(0)
    model = WDSR(scale=scale, start="bicubic", **TINY)
    x = torch.rand(2, 3, 9, 8)
    inside = (..., slice(2 * scale, -2 * scale), slice(2 * scale, -2 * scale))
    expected = F.interpolate(x, scale_factor=scale, mode="bicubic", align_corners=False)[inside]
    torch.testing.assert_close(model(x, scale)[inside], expected)
    torch.nn.init.normal_(model.skip.weight_v)
    model.reset_parameters()
    torch.testing.assert_close(model(x, scale)[inside], expected)
    grads = torch.autograd.grad(model(x, scale).square().sum(), model.tail.weight_g)
    assert grads[0].abs().min() > 0  # the deep path learns from the first step on
    random = WDSR(scale=scale, **TINY)
    assert not torch.allclose(random(x, scale)[inside], expected, atol=0.1)


def test_what_cannot_be_is_told() -> None:
    with pytest.raises(ConfigError, match="mean has 1 numbers, but channels=3"):
        WDSR(mean=[0.5])
    with pytest.raises(ConfigError, match=r"start is 'bicubc'.* Did you mean 'bicubic'"):
        WDSR(start="bicubc")
    with pytest.raises(ConfigError, match="must be at least 1, but 2, 32, 0 and 4"):
        WDSR(num_blocks=0)
