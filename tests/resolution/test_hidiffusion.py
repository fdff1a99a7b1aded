"""Attention in moving windows, and a UNet whose inner stages work smaller."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from genscale.backbones.uvit import UViT
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.layers.attention import SelfAttention
from genscale.resolution import WindowedAttention, apply_resolution
from genscale.resolution.base import extra_tokens
from genscale.resolution.hidiffusion import HiDiffusion, SmallerUNet, attend_in_quarters


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_what_works_on_single_tokens_does_not_see_the_windows() -> None:
    x = noise(2, 3 + 64, 5)
    for shift in range(4):
        torch.testing.assert_close(attend_in_quarters(torch.tanh, x, (8, 8), shift, 3), x.tanh())


def test_a_window_is_a_quarter_of_the_moved_grid() -> None:
    layer, x = SelfAttention(8, 2), noise(1, 64, 8)
    got = attend_in_quarters(layer, x, (8, 8), 1).view(8, 8, 8)
    grid = x.view(8, 8, 8).roll((-1, -1), (0, 1))  # a quarter of 4 cells
    quarter = layer(grid[:4, 4:].reshape(1, 16, 8)).view(4, 4, 8)
    torch.testing.assert_close(got.roll((-1, -1), (0, 1))[:4, 4:], quarter)
    odd = attend_in_quarters(layer, noise(1, 35, 8), (5, 7), 2)
    assert odd.shape == (1, 35, 8)


@torch.no_grad()
def test_every_second_layer_is_windowed_and_comes_back() -> None:
    torch.manual_seed(0)
    model = UViT(input_size=8, in_channels=2, num_classes=3, hidden_size=16, depth=3, num_heads=2)
    model.eval()
    args = noise(1, 2, 16, 16), torch.zeros(1), Conditioning(labels=torch.tensor([1]))
    assert extra_tokens(model) == 2  # class and time
    plain = model(*args).sample
    op = WindowedAttention(seed=3)
    with apply_resolution(model, [op], target=(16, 16)):
        replaced = ["forward" in vars(block.attention) for block in model.blocks]
        got = model(*args).sample
    assert replaced == [True, False, True]
    assert not torch.allclose(got, plain)
    assert torch.equal(model(*args).sample, plain)
    shifts = []
    for step in range(40):
        op.pre_step(args[0], 0.5, step)
        shifts.append(op.shift(0))
    assert set(shifts) == {0, 1, 2, 3}
    with pytest.raises(ConfigError, match="windows could be put on"):
        WindowedAttention(["nothing"]).prepare(model, (8, 8), (16, 16))


class Stages(nn.Module):
    """The second stages of a UNet: two blocks down, a skip each, two up."""

    def __init__(self) -> None:
        super().__init__()
        conv = nn.Conv2d(1, 1, 3, stride=2, padding=1)
        down = SimpleNamespace(
            attentions=[nn.Identity(), nn.Identity()], downsamplers=[SimpleNamespace(conv=conv)]
        )
        up = SimpleNamespace(attentions=[nn.Identity(), nn.Identity()])
        self.down_blocks, self.up_blocks = [None, down], [None, up]
        self.first, self.second, self.conv = down.attentions[0], up.attentions[1], conv
        self.num_upsamplers = 2

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inner = self.first(x)
        return inner, self.second(inner)


def test_inner_stages_work_smaller_in_the_first_steps() -> None:
    model, x = Stages(), noise(1, 1, 8, 8)
    op = SmallerUNet(until=0.4, steps=10)
    with apply_resolution(model, [op], native=(4, 4), target=(8, 8)):
        for step, side in ((0, 4), (3, 4), (4, 8)):
            op.pre_step(x, 0.5, step)
            inner, outer = model(x)
            assert (inner.shape[-1], outer.shape[-1]) == (side, 8)
    assert torch.equal(model(x)[0], x)
    op = SmallerUNet(until=0.7, early=0.3, steps=10, aggressive=True)
    plain = model.conv(x)
    with apply_resolution(model, [op], native=(2, 2), target=(8, 8)):
        assert model.num_upsamplers == 14  # the UNet then tells up-samplers the skips' sizes
        assert (op.pools, op.strides) == (False, True)
        assert model.conv(x).shape[-2:] == (2, 2)
        op.pre_step(x, 0.5, 3)
        assert (op.pools, op.strides) == (True, False)
        assert torch.equal(model.conv(x), plain)
    assert model.num_upsamplers == 2
    with pytest.raises(ConfigError, match="no second stages"):
        SmallerUNet().prepare(nn.Identity(), (4, 4), (8, 8))


def test_the_preset_of_a_unet_has_both() -> None:
    assert [type(op) for op in HiDiffusion().operators(Stages(), (4, 4), (8, 8))] == [
        WindowedAttention, SmallerUNet
    ]  # fmt: skip
    assert len(HiDiffusion(smaller=False).operators(Stages(), (4, 4), (8, 8))) == 1
