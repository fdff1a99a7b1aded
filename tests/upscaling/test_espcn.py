"""ESPCN: pixels in their places, outputs as asked for, colours by luma."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from genscale.errors import CheckpointError, ConfigError
from genscale.io.converters.espcn import config_from_official, from_official
from genscale.layers.ycbcr import rgb_to_ycbcr, ycbcr_to_rgb
from genscale.upscaling.espcn import ESPCN


def test_sizes_and_parameters() -> None:
    model = ESPCN()
    # 64 (25 + 1) + 32 (9 * 64 + 1) + 9 (9 * 32 + 1)
    assert sum(parameter.numel() for parameter in model.parameters()) == 22_729
    assert model(torch.rand(2, 1, 5, 7), 3).shape == (2, 1, 15, 21)
    assert ESPCN(channels=3, scale=4)(torch.rand(1, 3, 5, 7), 4).shape == (1, 3, 20, 28)


def test_channels_become_the_pixels_of_a_square_in_reading_order() -> None:
    model = ESPCN(scale=2)
    last = model.sub_pixel[0]
    torch.nn.init.zeros_(last.weight)
    with torch.no_grad():
        last.bias.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    out = model(torch.rand(1, 1, 1, 1), 2)
    torch.testing.assert_close(out[0, 0], torch.tensor([[0.1, 0.2], [0.3, 0.4]]))


def test_kinds_of_output() -> None:
    x = torch.rand(1, 1, 6, 6)
    outputs = {}
    for kind in ("linear", "clamp", "sigmoid", "auto"):
        torch.manual_seed(0)
        model = ESPCN(scale=2, output=kind)
        with torch.no_grad():
            model.sub_pixel[0].weight.mul_(20.0)
        outputs[kind] = model(x, 2)
        if kind == "auto":
            outputs["auto in evaluation"] = model.eval()(x, 2)
    linear = outputs["linear"]
    assert linear.min() < 0
    assert linear.max() > 1
    assert torch.equal(outputs["auto"], linear)
    assert torch.equal(outputs["clamp"], linear.clamp(0, 1))
    assert torch.equal(outputs["auto in evaluation"], outputs["clamp"])
    assert torch.equal(outputs["sigmoid"], torch.sigmoid(linear))


def test_icnr_starts_without_a_checkerboard() -> None:
    x = torch.rand(1, 3, 4, 5)
    with torch.no_grad():
        plain, even = (ESPCN(scale=3, channels=3, icnr=icnr)(x, 3) for icnr in (False, True))
        again = ESPCN(scale=3, channels=3, icnr=True)
        again.reset_parameters()
    for out in (even, again(x, 3)):
        first = out[..., ::3, ::3]
        torch.testing.assert_close(out, F.interpolate(first, scale_factor=3, mode="nearest"))
    assert not torch.allclose(plain, F.interpolate(plain[..., ::3, ::3], scale_factor=3))


def test_luma_alone_goes_through_the_network() -> None:
    model = ESPCN(scale=2, channels=3, luma=True, output="linear").eval()
    assert model.feature_maps[0].in_channels == 1
    grey = ESPCN(scale=2, output="linear").eval()
    grey.load_state_dict(model.state_dict())
    x = torch.rand(2, 3, 6, 8)
    out = rgb_to_ycbcr(model(x, 2))
    luma, chroma = rgb_to_ycbcr(x).split((1, 2), dim=1)
    torch.testing.assert_close(out[:, :1], grey(luma, 2), rtol=0, atol=1e-6)
    wanted = F.interpolate(chroma, scale_factor=2, mode="bicubic")
    torch.testing.assert_close(out[:, 1:], wanted, rtol=0, atol=1e-6)
    clamped = ESPCN(scale=2, channels=3, luma=True).eval()(x, 2)
    assert 0 <= clamped.min() <= clamped.max() <= 1


def test_luma_and_chroma_of_known_colours() -> None:
    white, red = torch.ones(1, 3, 1, 1), torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)
    # MATLAB's rgb2ycbcr of white and of pure red, over 255
    levels = torch.tensor([[235.0, 128.0, 128.0], [81.481, 90.203, 240.0]]) / 255
    got = torch.cat((rgb_to_ycbcr(white), rgb_to_ycbcr(red))).flatten(1)
    torch.testing.assert_close(got, levels)
    x = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(ycbcr_to_rgb(rgb_to_ycbcr(x)), x)


def test_settings_and_keys_of_both_ports() -> None:
    settings = config_from_official({"implementation": "leftthomas", "upscale_factor": 4})
    model = ESPCN(**settings)
    assert model.output == "sigmoid"
    theirs = {"conv1": "feature_maps.0", "conv2": "feature_maps.2", "conv3": "sub_pixel.0"}
    state = {
        f"{name}.{kind}": model.state_dict()[f"{own}.{kind}"].clone()
        for name, own in theirs.items()
        for kind in ("weight", "bias")
    }
    ESPCN(**settings).load_state_dict(from_official(state))
    other = {"implementation": "lornatang", "upscale_factor": 2, "channels": 16}
    assert config_from_official(other)["hidden_size"] == 16
    with pytest.raises(CheckpointError, match="1 channels in and 3 out"):
        config_from_official({**other, "out_channels": 3})


def test_a_saved_model_comes_back(tmp_path) -> None:
    model = ESPCN(scale=2, hidden_size=8, icnr=True)
    model.save_pretrained(tmp_path)
    x = torch.rand(1, 1, 5, 5)
    assert torch.equal(ESPCN.from_pretrained(tmp_path).eval()(x, 2), model.eval()(x, 2))


def test_what_cannot_be_is_told() -> None:
    with pytest.raises(ConfigError, match=r"output is 'sigmod'.* Did you mean 'sigmoid'"):
        ESPCN(output="sigmod")
    with pytest.raises(ConfigError, match="luma=true needs RGB pictures"):
        ESPCN(luma=True)
    with pytest.raises(ConfigError, match="hidden_size=1"):
        ESPCN(hidden_size=1)
    with pytest.raises(ConfigError, match="not offered"):
        ESPCN()(torch.rand(1, 1, 4, 4), 2)
