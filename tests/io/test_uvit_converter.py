"""Official U-ViT and ScaleLong state dicts load exactly, come back exactly, or are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from genscale.backbones.uvit import UViT
from genscale.errors import CheckpointError, ConfigError
from genscale.io.converters.uvit import (
    config_from_official,
    config_from_state_dict,
    from_official,
    to_official,
)

H2: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 2,
    "in_chans": 4,
    "embed_dim": 1152,
    "depth": 28,
    "num_heads": 16,
    "mlp_ratio": 4,
    "qkv_bias": False,
    "mlp_time_embed": False,
    "num_classes": 1001,
    "use_checkpoint": True,
    "conv": False,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "all biases": {"qkv_bias": True, "time_mlp": True},
    "sharp head": {"head_conv": False},
    "unconditional": {"num_classes": 0},
    "text": {"num_classes": 0, "text_size": 6, "num_text_tokens": 3},
    "without skips": {"long_skips": False},
    "gates": {"skip_scale": "gate"},
    "shared gate": {"skip_scale": "gate_shared"},
}


def on_meta(**settings: Any) -> UViT:
    with torch.device("meta"):
        return UViT(**settings)


def tiny(**changes: Any) -> UViT:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "input_size": 8,
        "num_classes": 5,
        "hidden_size": 32,
        "depth": 5,
        "num_heads": 2,
    }
    return UViT(**{**settings, **changes})


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", VARIANTS)
def test_there_and_back_is_exact_and_shapes_tell_the_settings(name: str) -> None:
    model = tiny(**VARIANTS[name])
    official = to_official(model.state_dict(), model.config)
    found = config_from_state_dict(official, num_heads=2)
    assert found == {key: model.config[key] for key in found}
    ours = from_official(official, on_meta(**found))
    assert same(ours, dict(model.state_dict()))
    assert same(to_official(ours, model.config), official)


def test_the_released_checkpoints_have_these_keys_and_shapes() -> None:
    model = on_meta(**config_from_official(H2))
    official = to_official(model.state_dict(), model.config)
    assert sum(tensor.numel() for tensor in official.values()) == 500_832_016
    probes = {
        "patch_embed.proj.weight": (1152, 4, 2, 2),
        "label_emb.weight": (1001, 1152),
        "pos_embed": (1, 258, 1152),
        "in_blocks.13.attn.qkv.weight": (3456, 1152),
        "mid_block.norm1.weight": (1152,),
        "out_blocks.13.skip_linear.weight": (1152, 2304),
        "out_blocks.0.mlp.fc2.bias": (1152,),
        "norm.bias": (1152,),
        "decoder_pred.weight": (16, 1152),
    }
    for name, shape in probes.items():
        assert tuple(official[name].shape) == shape
    assert not any(name.startswith("final_layer") for name in official)
    # what the file tells, 16 heads of width 1152 included; kappa means nothing without scaling
    found = config_from_state_dict(official)
    assert found == {k: v for k, v in config_from_official(H2).items() if k != "skip_kappa"}


def test_positions_of_extra_tokens_come_first() -> None:
    model = tiny()
    official = to_official(model.state_dict(), model.config)
    state = model.state_dict()
    assert torch.equal(official["pos_embed"][0, :2], state["extra_positions"])
    assert torch.equal(official["pos_embed"][0, 2:], state["position.table"])


def test_blocks_of_both_halves_land_in_their_places() -> None:
    model = tiny()
    official = to_official(model.state_dict(), model.config)
    official["out_blocks.0.skip_linear.bias"].fill_(3.0)
    official["mid_block.norm2.bias"].fill_(4.0)
    ours = from_official(official, model)
    assert (ours["blocks.3.join.bias"] == 3.0).all()
    assert (ours["blocks.2.mlp_norm.bias"] == 4.0).all()


def test_settings_translate() -> None:
    found = config_from_official(H2)
    assert found["num_classes"] == 1000  # the null class is not counted
    assert found["depth"] == 29  # 28 builds 29
    assert config_from_official({"num_classes": -1})["num_classes"] == 0
    scaled = config_from_official({**H2, "scalelong": 2, "kappa": 0.7})
    assert (scaled["skip_scale"], scaled["skip_kappa"]) == ("geometric", 0.7)
    text = config_from_official({"clip_dim": 768})
    assert (text["text_size"], text["num_text_tokens"]) == (768, 77)


# mistakes


def damage(state: dict[str, Tensor], change: str) -> dict[str, Tensor]:
    if change == "missing":
        del state["label_emb.weight"]
    elif change == "unexpected":
        state["se.layer1.bias"] = torch.zeros(1)
    elif change == "longer":
        state["pos_embed"] = torch.zeros(1, 20, 32)
    return state


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("missing", r"1 missing, 0 unexpected keys for UViT \(first: label_emb.weight\)"),
        ("unexpected", r"0 missing, 1 unexpected keys for UViT \(first: se.layer1.bias\)"),
        ("longer", r"pos_embed is \(1, 20, 32\), expected \(1, 18, 32\)"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused(change: str, sentence: str) -> None:
    model = tiny()
    state = damage(to_official(model.state_dict(), model.config), change)
    with pytest.raises(CheckpointError, match=sentence):
        from_official(state, model)


def test_a_foreign_state_dict_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"'patch_embed.proj.weight' is missing.* key is 'a'"):
        config_from_state_dict({"a": torch.zeros(1)})


def test_our_state_dict_must_be_whole_too() -> None:
    model = tiny()
    state = model.state_dict()
    del state["head.bias"]
    with pytest.raises(CheckpointError, match=r"1 missing, 0 unexpected .*first: head.bias"):
        to_official(state, model.config)


def test_factors_a_channel_have_no_official_layout() -> None:
    model = tiny(skip_scale="channel")
    with pytest.raises(ConfigError, match="knows no skip_scale=channel"):
        to_official(model.state_dict(), model.config)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"drop_path": 0.1}, r"settings hold \['drop_path'\], which UViT does not know"),
        ({"scalelong": 5}, "scalelong must be 0 to 4, but is 5"),
    ],
)
def test_settings_without_counterpart_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        config_from_official({**H2, **changes})
