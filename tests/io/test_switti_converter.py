"""Switti state dicts load exactly and come back exactly; settings are read as far as files tell."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from genscale.backbones.switti import Switti
from genscale.errors import CheckpointError, ConfigError
from genscale.io.converters.scale_wise import check_levels, read_scales, token_levels
from genscale.io.converters.switti import (
    UNTOLD,
    config_from_official,
    config_from_state_dict,
    config_to_official,
    from_official,
    to_official,
)

PUBLISHED = {
    "depth": 30, "rope": True, "rope_theta": 10000, "rope_size": 128, "use_swiglu_ffn": True,
    "use_ar": False, "use_crop_cond": True, "reso": 512,
}  # fmt: skip
TINY: dict[str, Any] = {
    "scales": [1, 2, 4],
    "latent_channels": 3,
    "vocab_size": 11,
    "text_size": 12,
    "pooled_text_size": 10,
    "hidden_size": 128,
    "depth": 2,
    "num_heads": 2,
}


def on_meta(**settings: Any) -> Switti:
    with torch.device("meta"):
        model: Switti = Switti(**settings)
    return model


def tiny(**changes: Any) -> Switti:
    """A model none of whose tensors is like another one."""
    torch.manual_seed(0)
    model: Switti = Switti(**{**TINY, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope": False},
        {"mlp": "gelu", "mlp_ratio": 2.0},
        {"crop_condition": False},
        {"use_ar": True},
        {"scales": [2, 3]},
    ],
)
def test_there_and_back_is_exact(changes: dict[str, Any]) -> None:
    model = tiny(**changes)
    official = to_official(model.state_dict(), model.config)
    found = config_from_state_dict(official)
    told = {name: model.config[name] for name in found}
    assert found == told  # all that a file tells is told rightly
    other = on_meta(**{**found, "use_ar": model.use_ar})
    ours = from_official(official, other)
    assert same(ours, dict(model.state_dict()))
    assert same(to_official(ours, other.config), official)


def test_the_published_files_have_these_keys() -> None:
    model = on_meta(**config_from_official(PUBLISHED))
    official = to_official(model.state_dict(), model.config)
    # 2,470.5 M with the frozen frequencies of crops, and the scale of each of 2240 tokens
    count = sum(tensor.numel() for name, tensor in official.items() if name != "lvl_1L")
    assert count / 1e6 == pytest.approx(2470.5, abs=0.05)
    assert official["lvl_1L"].shape == (1, 2240)
    block = {name.removeprefix("blocks.7.") for name in official if name.startswith("blocks.7.")}
    assert block == {
        "ada_lin.1.weight", "ada_lin.1.bias", "crop_cond_scales", "attention_y_norm.weight",
        *(f"attn.{layer}.{leaf}" for layer in ("to_qkv", "proj") for leaf in ("weight", "bias")),
        *(
            f"cross_attn.{layer}.{leaf}"
            for layer in ("to_q", "to_kv", "proj")
            for leaf in ("weight", "bias")
        ),
        *(f"ffn.{layer}.weight" for layer in ("gate_proj", "up_proj", "down_proj")),
        *(
            f"{norm}{place}.weight"
            for norm in ("self_attention_norm", "cross_attention_norm", "ffn_norm")
            for place in (1, 2)
        ),
    }  # fmt: skip
    assert {name for name in official if not name.startswith("blocks.")} == {
        "pos_start", "lvl_1L", "lvl_embed.weight", "crop_embed.weight",
        *(
            f"{layer}.{leaf}"
            for layer in ("text_pooler", "word_embed", "crop_proj", "head_nm.ada_lin.1", "head")
            for leaf in ("weight", "bias")
        ),
    }  # fmt: skip


def test_buffers_of_the_official_program_are_no_weights() -> None:
    model = tiny()
    official = to_official(model.state_dict(), model.config)
    mask = torch.zeros(1, 1, 21, 21)
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in official.items()}
    for state in (
        {**official, "attn_bias_for_masking": mask},
        {name: tensor for name, tensor in official.items() if name != "lvl_1L"},
        compiled,
    ):
        assert same(from_official(state, model), dict(model.state_dict()))


def test_frequencies_of_crops_are_not_lost() -> None:
    model = tiny()
    official = to_official(model.state_dict(), model.config)
    assert model.crop_frequencies is not None
    assert torch.equal(official["crop_embed.weight"], model.crop_frequencies)
    del official["crop_embed.weight"]
    with pytest.raises(CheckpointError, match=r"1 missing, 0 unexpected .*crop_embed.weight"):
        from_official(official, model)


def test_halves_of_the_gated_layer() -> None:
    model = tiny()
    official = to_official(model.state_dict(), model.config)
    gate, up = (official[f"blocks.1.ffn.{half}_proj.weight"] for half in ("gate", "up"))
    assert torch.equal(torch.cat((gate, up)), model.state_dict()["blocks.1.mlp.gate_up.weight"])


# settings


def test_config_json_of_the_published_models() -> None:
    settings = config_from_official(PUBLISHED)
    assert settings == {**settings_of_the_class(), "float32_crop": False}
    assert config_from_official(PUBLISHED, parity=True)["float32_crop"] is True
    large = {**PUBLISHED, "reso": 1024, "use_ar": True, "rope_theta": 10000.0, "rope_size": 128.0}
    assert config_to_official(on_meta(**config_from_official(large)).config) == large


def settings_of_the_class() -> dict[str, Any]:
    """What is published is the default, where a file tells it."""
    config, told = on_meta().config, config_from_official({})
    return {name: config[name] for name in told}


def test_what_no_tensor_tells() -> None:
    causal = tiny(use_ar=True)
    found = config_from_state_dict(to_official(causal.state_dict(), causal.config))
    assert not set(UNTOLD) & set(found)
    assert set(UNTOLD) < set(causal.config)


def test_the_levels_of_tokens_tell_the_scales() -> None:
    model = tiny(scales=[1, 3])
    levels = token_levels(model)
    assert levels.tolist() == [0] + [1] * 9
    state = {"lvl_1L": levels[None], "lvl_embed.weight": torch.zeros(2, 1)}
    assert read_scales(state) == [1, 3]
    check_levels(state, model, "Switti")  # says nothing
    with pytest.raises(CheckpointError, match=r"scales of \[1, 9\] tokens, but the Switti has"):
        check_levels(state, tiny(), "Switti")


def test_scales_without_levels_are_the_published_ones() -> None:
    for reso in (512, 1024):
        model = on_meta(**config_from_official({**PUBLISHED, "reso": reso}))
        official = to_official(model.state_dict(), model.config)
        del official["lvl_1L"]
        assert config_from_state_dict(official)["scales"] == model.config["scales"]
    few = to_official((model := tiny()).state_dict(), model.config)
    del few["lvl_1L"]
    with pytest.raises(CheckpointError, match="3 scales, and does not tell their sizes"):
        config_from_state_dict(few)
    assert config_from_state_dict(few, scales=[1, 2, 4])["scales"] == [1, 2, 4]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"dept": 3}, r"hold \['dept'\], which Switti does not know"),
        ({"attn_l2_norm": False}, "attn_l2_norm must be True"),
        ({"reso": 300}, r"reso must be one of \[256, 512, 1024\], but is 300"),
    ],
)
def test_official_settings_without_counterpart(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config_from_official(config)


def test_models_that_a_published_folder_cannot_state() -> None:
    assert config_to_official(tiny().config) is None


def test_files_of_other_models_are_refused() -> None:
    model = tiny()
    official = to_official(model.state_dict(), model.config)
    with pytest.raises(CheckpointError, match="looks like depth 2, the config says 3"):
        from_official(official, tiny(depth=3))
    with pytest.raises(CheckpointError, match=r"scales of \[1, 4, 16\] tokens.* has \[1, 4, 25\]"):
        from_official(official, tiny(scales=[1, 2, 5]))
    with pytest.raises(
        CheckpointError, match=r"no official Switti state dict: 'word_embed\.weight'"
    ):
        config_from_state_dict({"x": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="1 missing"):
        to_official({n: t for n, t in model.state_dict().items() if n != "crop.bias"}, model.config)
