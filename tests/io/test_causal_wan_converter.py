"""Causal Wan checkpoints: their keys and containers, and those of diffusers, both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genscale.backbones.causal_video import CausalVideo
from genscale.conditioning.base import Conditioning
from genscale.errors import CheckpointError, ConfigError
from genscale.io.converters.causal_wan import (
    CONTAINERS,
    DIFFUSERS,
    WRAPPERS,
    config_from_diffusers,
    config_from_official,
    config_from_state_dict,
    diffusers_config,
    from_diffusers,
    from_official,
    plain_names,
    to_diffusers,
    to_official,
)
from genscale.io.layouts import write_diffusers
from genscale.io.published import read_diffusers, read_state_dict

SETTINGS: dict[str, Any] = {
    "input_size": [4, 8, 8],
    "in_channels": 4,
    "patch_size": 2,
    "hidden_size": 24,
    "depth": 2,
    "num_heads": 2,
    "mlp_size": 40,
    "frequency_size": 16,
    "text_size": 6,
    "num_text_tokens": 5,
    "attend_padding": True,
    "block_size": 4,
}
# of the official class with these settings, as its released files have them
KEYS = {
    "patch_embedding.weight": (24, 4, 1, 2, 2),
    "text_embedding.0.weight": (24, 6),
    "text_embedding.2.bias": (24,),
    "time_embedding.0.weight": (24, 16),
    "time_embedding.2.weight": (24, 24),
    "time_projection.1.weight": (144, 24),
    "blocks.1.modulation": (1, 6, 24),
    "blocks.1.self_attn.q.weight": (24, 24),
    "blocks.1.self_attn.norm_k.weight": (24,),
    "blocks.0.cross_attn.v.bias": (24,),
    "blocks.0.cross_attn.o.weight": (24, 24),
    "blocks.0.norm3.weight": (24,),
    "blocks.0.ffn.0.weight": (40, 24),
    "blocks.0.ffn.2.bias": (24,),
    "head.head.weight": (16, 24),
    "head.modulation": (1, 2, 24),
}


def build(**changes: Any) -> CausalVideo:
    torch.manual_seed(0)
    model: CausalVideo = CausalVideo(**{**SETTINGS, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def official(model: CausalVideo) -> dict[str, Tensor]:
    return to_official(model.state_dict(), model.config)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_official_keys_and_back() -> None:
    model = build()
    state = official(model)
    assert {key: tuple(state[key].shape) for key in KEYS} == KEYS
    assert len(state) == 15 + 2 * 27
    assert same(from_official(state, model), model.state_dict())
    qkv = model.state_dict()["blocks.0.attention.qkv.weight"]
    assert torch.equal(state["blocks.0.self_attn.k.weight"], qkv[24:48])


def test_wrappers_leave_their_names_behind() -> None:
    model = build()
    state = official(model)
    wrapped = {
        "model."
        + key.replace("blocks.1.", f"{WRAPPERS[0]}blocks.1.{WRAPPERS[1]}").replace(
            "blocks.0.", f"blocks.0.{WRAPPERS[2]}"
        ): tensor
        for key, tensor in state.items()
    }
    assert set(plain_names(wrapped)) == set(state)
    assert same(from_official(wrapped, model), model.state_dict())
    assert config_from_state_dict(wrapped) == config_from_state_dict(state)
    with pytest.raises(CheckpointError, match=r"both become 'head\.modulation' without"):
        plain_names({**state, "model.head.modulation": state["head.modulation"]})


@pytest.mark.parametrize("name", CONTAINERS)
def test_training_files_are_read(name: str, tmp_path: Path) -> None:
    model = build()
    torch.save({name: official(model), "critic": {"w": torch.zeros(1)}}, tmp_path / "last.pt")
    weights = CONTAINERS[name]
    state = read_state_dict(tmp_path / "last.pt", weights, containers=CONTAINERS)
    assert same(from_official(state, model), model.state_dict())


def test_settings_are_read_off_shapes() -> None:
    model = build()
    found = config_from_state_dict(official(model), num_heads=2, input_size=8)
    told = {name: found[name] for name in SETTINGS if name in found and name != "input_size"}
    assert told == {name: SETTINGS[name] for name in told}
    assert len(told) == 9
    assert found["input_size"] == [21, 8, 8]
    assert config_from_state_dict(official(model))["num_heads"] == 1  # of 128 channels, or fewer
    plain = build(qk_norm=False, text_norm=False)
    found = config_from_state_dict(official(plain))
    assert (found["qk_norm"], found["text_norm"]) == (False, False)


def test_official_settings() -> None:
    window = {"local_attn_size": 12, "sink_size": 3, "num_frame_per_block": 3}
    found = config_from_official({"dim": 1536, "num_heads": 12, **window}, parity=True)
    assert (found["window"], found["sink"], found["cache"]) == (12, 3, "rolling")
    assert (found["attend_padding"], found["positions"]) == (True, "absolute")
    assert found["input_size"] == [21, 60, 104]
    open_end = config_from_official({"local_attn_size": -1, "sink_size": 3})
    assert (open_end["window"], open_end["sink"], open_end["cache"]) == (0, 0, "full")
    alone = config_from_official({"num_frame_per_block": 4, "independent_first_frame": True})
    assert alone["input_size"][0] == 21
    with pytest.raises(ConfigError, match=r"hold \['dimm'\], which CausalVideo does not know"):
        config_from_official({"dimm": 1})
    with pytest.raises(ConfigError, match="model_type must be t2v, but is i2v"):
        config_from_official({"model_type": "i2v"})
    with pytest.raises(ConfigError, match=r"square patches of one frame .* patch_size=\[2, 2, 2\]"):
        config_from_official({"patch_size": [2, 2, 2]})


def test_files_that_do_not_fit_are_refused() -> None:
    model = build()
    state = official(model)
    with pytest.raises(CheckpointError, match="The file looks like depth 2, the config"):
        from_official(state, build(depth=3))
    with pytest.raises(CheckpointError, match="no state dict of a causal Wan: 'patch_emb"):
        config_from_state_dict({"x": torch.zeros(1)})
    with pytest.raises(ConfigError, match="text and no classes, but this model has num_classes=3"):
        to_official({}, {**SETTINGS, "num_classes": 3})


def test_diffusers_has_the_same_network_without_causality(tmp_path: Path) -> None:
    model = build()  # the whole clip is one block
    write_diffusers(model, tmp_path)
    state, config = read_diffusers(tmp_path, (DIFFUSERS,))
    assert same(from_diffusers(state, model), model.state_dict())
    assert same(to_diffusers(model.state_dict(), model.config), state)
    found = config_from_diffusers(config)
    widths = ("hidden_size", "depth", "num_heads", "mlp_size", "frequency_size", "text_size")
    assert {name: found[name] for name in widths} == {name: SETTINGS[name] for name in widths}
    assert diffusers_config(model.config)["attention_head_dim"] == 12
    from diffusers import WanTransformer3DModel

    theirs = WanTransformer3DModel.from_pretrained(tmp_path).eval()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 4, 8, 8, generator=generator)
    text, t = torch.randn(2, 5, 6, generator=generator), torch.tensor([30.0, 700.0])
    with torch.no_grad():
        expected = theirs(x, t, text, return_dict=False)[0]
        ours = model(x, t, Conditioning(text=text)).sample
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


def test_pictures_are_not_read() -> None:
    config = diffusers_config(SETTINGS) | {"eps": 1e-6, "image_dim": 1280}
    with pytest.raises(ConfigError, match="reads no pictures, but the file has image_dim=1280"):
        config_from_diffusers(config)
