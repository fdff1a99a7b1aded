"""What every upscaler does: any size, tiles that blend, refusals in a sentence."""

import importlib

import pytest
import torch

from genscale import upscaling
from genscale.errors import ConfigError
from genscale.upscaling.base import Upscaler, pad_to_multiple
from genscale.upscaling.interpolation import Interpolation
from genscale.upscaling.lua import LUA
from genscale.upscaling.swinir import SwinIR
from genscale.upscaling.tiling import in_tiles, tile_starts

TINY = {
    "input_size": 8,
    "window_size": 4,
    "depths": [2],
    "hidden_size": 8,
    "num_heads": [2],
}


def build(name: str) -> Upscaler:
    torch.manual_seed(0)
    return {
        "lua": lambda: LUA(channels=4, head_size=4, scales=(2, 3), **TINY),
        "swinir": lambda: SwinIR(scale=2, **TINY),
        "bicubic": lambda: Interpolation(),
        "nearest": lambda: Interpolation(space="pixel", channels=3, mode="nearest"),
    }[name]().eval()


def picture(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["lua", "swinir", "bicubic", "nearest"])
@pytest.mark.parametrize("size", [(1, 3), (8, 8), (11, 6)])
def test_any_size_comes_out_enlarged(name, size):
    model = build(name)
    x = picture(2, model.channels, *size)
    for scale in model.scales:
        y = model(x, scale)
        assert y.shape == (2, model.channels, size[0] * scale, size[1] * scale)
        assert y.isfinite().all()
        assert torch.equal(model.upscale(x, scale), y)


@pytest.mark.parametrize("name", ["lua", "swinir", "bicubic"])
def test_samples_do_not_see_each_other(name):
    model = build(name)
    x = picture(3, model.channels, 7, 9)
    torch.testing.assert_close(model(x, 2)[1:2], model(x[1:2], 2), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["lua", "swinir", "bicubic"])
def test_other_channels_and_scales_are_refused_in_a_sentence(name):
    model = build(name)
    with pytest.raises(ConfigError, match=r"inputs \(B, \d, h, w\), but one of shape \(1, 7, 8, 8"):
        model(picture(1, 7, 8, 8), 2)
    with pytest.raises(
        ConfigError, match=r"upscaling\.scale=5 is not offered: .* has the scales 2"
    ):
        model.upscale(picture(1, model.channels, 8, 8), 5)


@pytest.mark.parametrize("name", ["lua", "swinir"])
def test_config_and_weights_come_back_from_a_folder(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    x = picture(1, model.channels, 8, 8)
    assert torch.equal(again(x, 2), model(x, 2))
    assert again.scales == model.scales
    assert again.space == model.space


def test_padding_reflects_where_it_can_and_repeats_the_last_cell_else():
    x = torch.arange(6.0).view(1, 1, 2, 3)
    padded = pad_to_multiple(x, 4)
    assert padded[0, 0].tolist() == [
        [0, 1, 2, 1],
        [3, 4, 5, 4],
        [3, 4, 5, 4],  # two rows cannot be reflected two rows far
        [3, 4, 5, 4],
    ]
    assert torch.equal(pad_to_multiple(padded, 4), padded)


@pytest.mark.parametrize(("tile", "overlap"), [(4, 0), (5, 2), (6, 5), (100, 16)])
@pytest.mark.parametrize("batch", [1, 3])
def test_tiles_change_nothing_where_cells_do_not_see_each_other(tile, overlap, batch):
    model = build("nearest")
    x = picture(2, 3, 13, 9)
    tiled = model.upscale(x, 3, tile=tile, overlap=overlap, batch=batch)
    torch.testing.assert_close(tiled, model(x, 3), atol=1e-6, rtol=0)


def test_tiles_blend_linearly():
    # each tile gives its own number: the seam runs from one to the other in equal steps
    numbers = iter((0.0, 1.0))
    y = in_tiles(
        lambda part: torch.full_like(part, next(numbers)),
        torch.zeros(1, 1, 1, 12),
        1,
        tile=8,
        overlap=4,
    )
    assert y.flatten().tolist() == pytest.approx([0] * 4 + [0.125, 0.375, 0.625, 0.875] + [1] * 4)


def test_tiles_cover_an_axis_and_end_with_it():
    assert tile_starts(10, 10, 3) == [0]
    assert tile_starts(11, 10, 3) == [0, 1]
    assert tile_starts(24, 10, 3) == [0, 7, 14]
    assert tile_starts(25, 10, 3) == [0, 7, 14, 15]


def test_tiles_of_a_network_agree_away_from_their_edges():
    """More overlap, smaller error; the network sees a few windows far."""
    model = build("swinir")
    x = picture(1, 3, 8, 40)
    whole = model(x, 2)
    errors = [
        (model.upscale(x, 2, tile=24, overlap=overlap) - whole).abs().mean() for overlap in (0, 16)
    ]
    assert 0 < errors[1] < errors[0]


@pytest.mark.parametrize(
    "settings", [{"tile": 0}, {"tile": 8, "overlap": 8}, {"tile": 8, "batch": 0}]
)
def test_tiles_that_do_not_move_are_refused(settings):
    with pytest.raises(ConfigError, match=r"tile=\d, overlap=\d and batch=\d were given"):
        build("bicubic").upscale(picture(1, 4, 8, 8), 2, **settings)


def test_interpolation_keeps_what_is_linear():
    ramp = torch.arange(16.0).expand(1, 4, 16, 16).contiguous()
    y = Interpolation(mode="bilinear")(ramp, 2)
    inner = torch.arange(32.0) / 2 - 0.25  # pixel centres are aligned
    torch.testing.assert_close(y[0, 0, 0, 2:-2], inner[2:-2])
    with pytest.raises(ConfigError, match="mode=lanczos"):
        Interpolation(mode="lanczos")


def test_public_names_are_imported_on_first_use():
    assert dir(upscaling) == sorted(dir(upscaling))
    for name in upscaling.__all__:
        assert getattr(importlib.import_module("genscale.upscaling"), name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'ESRGAN'"):
        upscaling.ESRGAN  # noqa: B018
