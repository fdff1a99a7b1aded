"""Files of SwinIR and LUA: official keys both ways, settings told by shapes, refusals."""

import pytest
import torch

from genscale.errors import CheckpointError, ConfigError
from genscale.io.converters.swin import (
    config_from_official,
    config_from_state_dict,
    from_official,
    head_names,
    is_official,
    to_official,
    unwrapped,
)
from genscale.upscaling.lua import LUA
from genscale.upscaling.swinir import SwinIR

TINY = {
    "input_size": 16,
    "window_size": 4,
    "depths": [2, 1],
    "hidden_size": 8,
    "num_heads": [2, 4],
    "mlp_ratio": 2.0,
}
MODELS = {
    "lua": (LUA, {"channels": 4, "scales": [2, 3], "head_size": 6}),
    "classical": (SwinIR, {"scale": 4}),
    "light": (SwinIR, {"scale": 3, "upsampler": "pixelshuffledirect"}),
    "real": (SwinIR, {"scale": 4, "upsampler": "nearest+conv", "residual": "3conv"}),
    "denoise": (SwinIR, {"scale": 1, "upsampler": "", "channels": 1}),
    "bare": (SwinIR, {"qkv_bias": False, "patch_norm": False, "positions": True}),
}


def official_file(model):
    """Return a state dict as an official program writes it, its own tables included."""
    state = to_official(model.state_dict(), model.config)
    settings = model.config
    window, side = settings["window_size"], settings["input_size"]
    for name in [n for n in state if n.endswith("relative_position_bias_table")]:
        block = name.removesuffix(".relative_position_bias_table")
        state[f"{block}.relative_position_index"] = torch.zeros(window**2, window**2).long()
        if ".blocks.1." in name and side > window:
            mask = torch.zeros((side // window) ** 2, window**2, window**2)
            state[f"{block.removesuffix('.attn')}.attn_mask"] = mask
    return state


@pytest.mark.parametrize("name", MODELS)
def test_an_official_file_tells_its_settings_and_loads(name):
    kind, settings = MODELS[name]
    torch.manual_seed(0)
    model = kind(**TINY | settings)
    state = official_file(model)
    assert is_official(state)
    assert not is_official(model.state_dict())
    told = config_from_state_dict(state)
    again = kind(**told)
    differing = {k for k, v in model.config.items() if k[0] != "_" and again.config[k] != v}
    assert differing == set()
    again.load_state_dict(from_official(state, again))
    for one, other in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_keys_are_those_of_the_published_files():
    keys = set(to_official(LUA(**TINY | MODELS["lua"][1]).state_dict(), {}))
    assert {
        "conv_first.weight",
        "patch_embed.norm.bias",
        "layers.0.residual_group.blocks.1.norm1.weight",
        "layers.1.residual_group.blocks.0.attn.relative_position_bias_table",
        "layers.0.residual_group.blocks.0.attn.qkv.bias",
        "layers.0.residual_group.blocks.0.attn.proj.weight",
        "layers.0.residual_group.blocks.0.mlp.fc1.weight",
        "layers.1.conv.weight",
        "norm.weight",
        "conv_after_body.bias",
        "heads.x2.conv_before.0.weight",
        "heads.x3.upsample.0.bias",
        "heads.x2.conv_last.weight",
    } <= keys
    real = SwinIR(**TINY | MODELS["real"][1])
    keys = set(to_official(real.state_dict(), real.config))
    assert {"conv_before_upsample.0.bias", "conv_up1.bias", "conv_up2.bias"} <= keys
    assert {"conv_hr.bias", "conv_last.bias", "layers.0.conv.4.bias"} <= keys
    light = SwinIR(**TINY | MODELS["light"][1])
    assert "upsample.0.weight" in to_official(light.state_dict(), light.config)


def test_heads_are_told_by_their_layers_whatever_they_are_called():
    model = LUA(**TINY | MODELS["lua"][1])
    state = to_official(model.state_dict(), model.config, names={2: "double", 3: "treble"})
    assert head_names(state) == {"double": "x2", "treble": "x3"}
    assert config_from_state_dict(state)["scales"] == [2, 3]
    loaded = from_official(state, model)
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


def test_a_file_without_masks_is_of_windows_that_never_shift():
    model = SwinIR(**TINY | {"input_size": 4})
    assert config_from_state_dict(official_file(model))["input_size"] == 4
    # without any tables nobody knows: then windows shift, as in all published models
    bare = to_official(model.state_dict(), model.config)
    assert config_from_state_dict(bare)["input_size"] == 8
    assert config_from_state_dict(bare, input_size=4)["input_size"] == 4


def test_averaged_weights_are_preferred():
    one, other = {"a": torch.zeros(1)}, {"a": torch.ones(1)}
    assert unwrapped({"params": one, "params_ema": other})["a"] == 1
    assert unwrapped({"params": one})["a"] == 0
    assert unwrapped(other)["a"] == 1
    with pytest.raises(CheckpointError, match="its keys are epoch"):
        unwrapped({"epoch": 3})


def test_misfits_are_told_in_a_sentence():
    kind, settings = MODELS["lua"]
    model = kind(**TINY | settings)
    state = official_file(model)
    wider = kind(**TINY | settings | {"hidden_size": 16})
    with pytest.raises(CheckpointError, match="Build the model with hidden_size=8"):
        from_official(state, wider)
    del state["norm.bias"]
    with pytest.raises(CheckpointError, match=r"1 missing, 0 unexpected .*first: norm\.bias"):
        from_official(state, model)
    with pytest.raises(CheckpointError, match="no official SwinIR or LUA state dict"):
        config_from_state_dict({"weight": torch.zeros(1)})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"embed_dims": 8}, "hold \\['embed_dims'\\], which SwinIR does not know"),
        ({"patch_size": 2}, "patch_size=2, but only patch_size=1"),
        ({"heads": [{"scale": 2, "out_chans": 4}, {"scale": 4, "out_chans": 8}]}, r"\[4, 8\]"),
    ],
)
def test_settings_that_the_networks_do_not_have_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        config_from_official(settings)
