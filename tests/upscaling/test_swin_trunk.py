"""The trunk of SwinIR and LUA: published sizes, and the quirks that published weights rely on."""

import pytest
import torch

from genscale.backbones.base import parameter_count
from genscale.errors import ConfigError
from genscale.layers.window_attention import window_mask
from genscale.upscaling.lua import LUA, adapt_channels
from genscale.upscaling.swin import (
    FixedWindowAttention,
    SwinBlock,
    SwinGroup,
    SwinTrunk,
    pixel_shuffle_layers,
    residual_conv,
    soft_mask,
)
from genscale.upscaling.swinir import DirectHead, NearestHead, PlainHead, ShuffleHead, SwinIR

LIGHT = {
    "hidden_size": 60,
    "depths": [6] * 4,
    "num_heads": [6] * 4,
    "upsampler": "pixelshuffledirect",
}
LARGE = {
    "hidden_size": 240,
    "depths": [6] * 9,
    "num_heads": [8] * 9,
    "residual": "3conv",
    "upsampler": "nearest+conv",
}
TRUNK = {
    "channels": 3,
    "input_size": 16,
    "window_size": 4,
    "depths": [2, 3],
    "hidden_size": 8,
    "num_heads": [2, 4],
    "mlp_ratio": 2.0,
    "residual": "1conv",
    "img_range": 1.0,
    "drop_path": 0.0,
}


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"scale": 2}, 11_752_487),
        ({"scale": 3}, 11_937_127),
        ({"scale": 4}, 11_900_199),
        ({"scale": 8}, 12_047_911),
        ({"scale": 2, **LIGHT}, 910_152),
        ({"scale": 4, **LIGHT}, 929_628),
        ({"scale": 4, "upsampler": "nearest+conv"}, 11_715_559),
        ({"scale": 4, **LARGE}, 28_013_059),
        ({"scale": 1, "upsampler": ""}, 11_504_163),
    ],
)
def test_swinir_has_the_published_number_of_parameters(settings, count):
    with torch.device("meta"):
        assert parameter_count(SwinIR(**settings)) == count


def test_lua_for_flux_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = LUA()
    assert parameter_count(model) == 54_917_584
    assert parameter_count(model.trunk) == 46_103_472
    assert [parameter_count(model.heads[name]) for name in ("x2", "x4")] == [3_226_896, 5_587_216]


def test_the_mask_keeps_regions_apart_by_a_hundred_and_not_by_infinity():
    arguments = ((8, 8), (4, 4), (2, 2), torch.device("cpu"))
    hard, soft = window_mask(*arguments), soft_mask(*arguments)
    assert torch.equal(soft == -100.0, hard == -torch.inf)
    assert torch.equal(soft == 0.0, hard == 0.0)
    assert soft_mask(*arguments) is soft  # kept by size
    assert soft_mask((8, 8), (4, 4), (0, 0), torch.device("cpu")) is None


def test_attention_is_what_the_formula_says():
    """Window by window: softmax(q k / sqrt(d) + bias + mask) v, on a rolled grid."""
    torch.manual_seed(0)
    w, heads, width = 4, 2, 6
    attention = FixedWindowAttention(width, heads, w, shifted=True).double()
    torch.nn.init.normal_(attention.bias_table)
    x = torch.randn(1, 8, 4, width, dtype=torch.float64)
    rolled = torch.roll(x, (-2, -2), (1, 2))
    expected = torch.empty_like(x)
    region = [0] * 4 + [1] * 2 + [2] * 2  # of rows; all four columns are one window: 1, 1, 2, 2
    for top in (0, 4):
        cells = [(i, j) for i in range(w) for j in range(w)]
        tokens = torch.stack([rolled[0, top + i, j] for i, j in cells])
        q, k, v = (t.unflatten(-1, (heads, -1)) for t in attention.qkv(tokens).chunk(3, -1))
        logits = torch.einsum("nhd,mhd->hnm", q, k) / (width / heads) ** 0.5
        for n, (i, j) in enumerate(cells):
            for m, (a, b) in enumerate(cells):
                row = (i - a + w - 1) * (2 * w - 1) + (j - b + w - 1)
                logits[:, n, m] += attention.bias_table[row]
                if region[top + i] != region[top + a] or (j < 2) != (b < 2):
                    logits[:, n, m] -= 100.0
        mixed = torch.einsum("hnm,mhd->nhd", logits.softmax(-1), v).flatten(1)
        for (i, j), value in zip(cells, attention.out(mixed), strict=True):
            expected[0, top + i, j] = value
    torch.testing.assert_close(attention(x), torch.roll(expected, (2, 2), (1, 2)))


def test_a_trunk_made_for_its_window_never_shifts():
    """Whatever it is given: official programs decide it when they are built."""
    small = SwinTrunk(**TRUNK | {"input_size": 4})
    blocks = [m for m in small.modules() if isinstance(m, SwinBlock)]
    assert not any(block.attention.shifted for block in blocks)
    large = SwinTrunk(**TRUNK)
    large.load_state_dict(small.state_dict())
    shifted = [m.attention.shifted for m in large.modules() if isinstance(m, SwinBlock)]
    assert shifted == [False, True, False, True, False]
    x = torch.rand(1, 3, 8, 8)
    assert not torch.allclose(small(x), large(x))


def test_windows_are_no_larger_than_the_side_a_trunk_is_made_for():
    trunk = SwinTrunk(**TRUNK | {"input_size": 6, "window_size": 8})
    attention = next(m for m in trunk.modules() if isinstance(m, FixedWindowAttention))
    assert attention.window_size == 6
    assert len(attention.bias_table) == 11**2
    assert trunk.multiple == 24  # inputs are filled up to what both divide
    assert trunk(trunk.enter(torch.rand(1, 3, 10, 10))).shape == (1, 8, 24, 24)


def test_three_channels_are_centred_and_others_are_not():
    for channels, mean in ((3, (0.4488, 0.4371, 0.4040)), (4, (0.0,) * 4)):
        trunk = SwinTrunk(**TRUNK | {"channels": channels, "img_range": 255.0})
        x = torch.rand(1, channels, 4, 8)
        inner = trunk.enter(x)
        torch.testing.assert_close(inner, (x - torch.tensor(mean).view(1, -1, 1, 1)) * 255.0)
        torch.testing.assert_close(trunk.leave(inner, (4, 8)), x)


def test_stochastic_depth_grows_to_the_last_block_and_is_for_training_alone():
    trunk = SwinTrunk(**TRUNK | {"drop_path": 0.4})
    rates = [m.drop_path for m in trunk.modules() if isinstance(m, SwinBlock)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    block = SwinBlock(8, 2, 4, shifted=False, mlp_ratio=2, qkv_bias=True, drop_path=0.5)
    x = torch.rand(64, 4, 4, 8)
    kept = [(y != i).any() for y, i in zip(block.train()(x), x, strict=True)]
    assert 0.5 < sum(kept) / 64 < 0.95  # both residuals are dropped in a quarter
    assert torch.equal(block.eval()(x), block.eval()(x))


def test_checkpointing_changes_no_gradient():
    model = LUA(channels=4, head_size=4, scales=(2,), drop_path=0.0, **_tiny())
    x = torch.rand(1, 4, 8, 8)

    def gradient():
        model.zero_grad()
        model(x, 2).square().mean().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradient()
    model.enable_gradient_checkpointing()
    assert all(g.gradient_checkpointing for g in model.modules() if isinstance(g, SwinGroup))
    for one, other in zip(plain, gradient(), strict=True):
        torch.testing.assert_close(one, other)


def test_heads_have_the_slopes_of_the_published_networks():
    """A negative input shows them: 0.01 before pixel shuffles, 0.2 behind nearest neighbours."""
    shuffle, nearest = ShuffleHead(1, 1, 1, width=1), NearestHead(1, 1, 2)
    for conv in (shuffle.before, shuffle.last):
        _as_identity(conv)
    x = torch.full((1, 1, 3, 3), -1.0)
    torch.testing.assert_close(shuffle(x), 0.01 * x)
    for conv in (nearest.before, *nearest.up, nearest.conv, nearest.last):
        _as_identity(conv)
    torch.testing.assert_close(nearest(x), torch.full((1, 1, 6, 6), -0.01 * 0.2 * 0.2))
    assert residual_conv(8, "3conv")(-torch.ones(1, 8, 4, 4)).shape == (1, 8, 4, 4)
    assert [m.negative_slope for m in residual_conv(8, "3conv")[1::2]] == [0.2, 0.2]


def test_the_small_heads_are_one_convolution():
    assert DirectHead(8, 3, 4)(torch.rand(1, 8, 2, 2)).shape == (1, 3, 8, 8)
    assert PlainHead(8, 3, 1)(torch.rand(1, 8, 2, 2)).shape == (1, 3, 2, 2)
    model = SwinIR(scale=1, upsampler="", **_tiny())
    torch.nn.init.zeros_(model.head.last.weight)
    torch.nn.init.zeros_(model.head.last.bias)
    x = torch.rand(1, 3, 7, 5)
    torch.testing.assert_close(model(x, 1), x)  # what it predicts is added to the picture


def test_pixel_shuffles_come_in_steps_of_two_or_one_of_three():
    assert [len(pixel_shuffle_layers(4, s)) for s in (1, 2, 3, 4, 8)] == [0, 2, 2, 4, 6]
    with pytest.raises(ConfigError, match="scale 6"):
        pixel_shuffle_layers(4, 6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_heads": [2]}, "of one length"),
        ({"num_heads": [2, 3]}, "must divide hidden_size=8, but 3"),
        ({"residual": "2conv"}, "1conv or 3conv, but '2conv'"),
    ],
)
def test_a_trunk_of_contradictions_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        SwinTrunk(**TRUNK | settings)


def test_a_table_of_positions_fits_one_size():
    trunk = SwinTrunk(**TRUNK | {"positions": True})
    assert trunk(torch.rand(1, 3, 16, 16)).shape == (1, 8, 16, 16)
    with pytest.raises(ConfigError, match="inputs of 16 x 16, but 8 x 8"):
        trunk(torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize(
    "settings",
    [
        {"scale": 3, "upsampler": "nearest+conv"},
        {"scale": 2, "upsampler": ""},
        {"upsampler": "pixelshufle"},
    ],
)
def test_upsamplers_offer_their_scales(settings):
    with pytest.raises(ConfigError, match=r"model\.upsampler"):
        SwinIR(**_tiny() | settings)


def test_adapting_channels_keeps_all_but_the_ends():
    model = LUA(channels=16, head_size=4, **_tiny())
    state = torch.random.get_rng_state()
    new = adapt_channels(model, 4, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert new(torch.rand(1, 4, 8, 8), 4).shape == (1, 4, 32, 32)
    again, own = adapt_channels(model, 4, seed=3).state_dict(), model.state_dict()
    for name, value in new.state_dict().items():
        assert torch.equal(value, again[name])
        end = name.startswith("trunk.stem.") or ".last." in name
        assert end != torch.equal(value, own[name])
    # for other latents of as many channels, the first convolution alone starts anew
    same = adapt_channels(model, 16).state_dict()
    changed = {name for name, value in same.items() if not torch.equal(value, own[name])}
    assert changed == {"trunk.stem.weight", "trunk.stem.bias"}


def test_freezing_leaves_what_touches_the_latents():
    model = LUA(channels=4, head_size=4, **_tiny())
    model.freeze_trunk()
    trained = {name.rsplit(".", 1)[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"trunk.stem", "heads.x2.last", "heads.x4.last"}
    model.freeze_trunk(False)
    assert all(p.requires_grad for p in model.parameters())


def test_a_lua_has_scales_and_each_once():
    for scales in ((), (2, 2)):
        with pytest.raises(ConfigError, match=r"model\.scales"):
            LUA(channels=4, scales=scales, **_tiny())


def _tiny():
    return {"input_size": 8, "window_size": 4, "depths": [2], "hidden_size": 8, "num_heads": [2]}


def _as_identity(conv):
    with torch.no_grad():
        conv.bias.zero_()
        conv.weight.zero_()
        conv.weight[:, 0, conv.weight.shape[2] // 2, conv.weight.shape[3] // 2] = 1.0
