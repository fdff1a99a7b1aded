"""State dicts in the layout of FIT's program load exactly, come back exactly, or are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from genscale.backbones.fit import FIT
from genscale.errors import CheckpointError, ConfigError
from genscale.io.converters.fit import (
    config_from_official,
    config_from_state_dict,
    config_to_official,
    from_official,
    to_official,
)

OFFICIAL: dict[str, Any] = {
    "weight_initializer": {"target": "RINWeightScalerInitializer", "scale": 0.5},
    "fit_block_module": "FITBlockV5",
    "context_channels": 10,
    "summary_text_embeddings_channels": 5,
    "conditioning_in_context": True,
    "time_pe_type": "learned",
    "use_dataset_id_conditioning": False,
    "use_resolution_conditioning": True,
    "input_size": [2, 8, 12],
    "patch_size": [1, 2, 2],
    "group_size": [2, 2, 3],
    "input_channels": 3,
    "patch_channels": 12,
    "fit_blocks_count": 2,
    "local_layers_per_block": 1,
    "global_layers_per_block": 2,
    "latent_count": 8,
    "latent_channels": 16,
    "self_conditioning_ff_config": {},
    "fit_block_config": {
        "drop_units": 0.1,
        "drop_path": 0.0,
        "use_cross_attention_feedforward": True,
        "default_attention_config": {"heads": 2, "dim_head": 6},
        "global_attention_config": {"heads": 4, "dim_head": 4},
        "read_context_attention_config": {"heads": 3, "dim_head": 4},
    },
    "summary_text_embeddings_use_mask_token": True,
}
UNTOLD = {
    name: config_from_official(OFFICIAL)[name]
    for name in ("input_size", "patch_size", "group_size", "heads")
}


def tiny(**changes: Any) -> FIT:
    torch.manual_seed(0)
    return FIT(**{**config_from_official(OFFICIAL), **changes})


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"local_depth": 0, "text_null_token": False, "reads_size": False},
        {"cross_mlp": False, "double_residual_quirk": True},
        {"text_size": 0, "text_null_token": False},
    ],
)
def test_there_and_back_is_exact_and_shapes_tell_the_settings(changes: dict[str, Any]) -> None:
    model = tiny(**changes)
    official = to_official(model.state_dict(), model.config)
    found = config_from_state_dict(official)
    assert found == {key: model.config[key] for key in found}
    with torch.device("meta"):
        other = FIT(**found, **UNTOLD)
    ours = from_official(official, other)
    assert same(ours, dict(model.state_dict()))
    assert same(to_official(ours, model.config), official)


def test_settings_come_back_as_they_went() -> None:
    ours = config_from_official(OFFICIAL)
    assert ours["heads"] == {
        "read": [2, 6], "write": [2, 6], "context": [3, 4], "local": [2, 6], "global": [4, 4]
    }  # fmt: skip
    assert (ours["init_scale"], ours["dropout"], ours["cross_mlp"]) == (0.5, 0.1, True)
    theirs = config_to_official(tiny().config)
    assert theirs is not None
    assert config_from_official(theirs) == ours
    assert {**theirs, "fit_block_config": 0} == {**OFFICIAL, "fit_block_config": 0,
        "weight_initializer": theirs["weight_initializer"]}  # fmt: skip


def test_weights_of_a_program_that_doubles_mean_doubling() -> None:
    block = {**OFFICIAL["fit_block_config"], "use_cross_attention_feedforward": False}
    found = config_from_official({**OFFICIAL, "fit_block_config": block})
    assert (found["cross_mlp"], found["double_residual_quirk"]) == (False, True)
    # a model of ours that does not double cannot be built there
    assert config_to_official(tiny(cross_mlp=False).config) is None


def test_the_names_are_those_of_the_program() -> None:
    official = to_official(tiny().state_dict(), tiny().config)
    probes = {
        "latents": (8, 16),
        "patches_pe": (48, 12),
        "to_patches.1.bias": (12,),
        "patch_to_pixels.0.beta": (12,),
        "time_mlp.0.weights": (8,),
        "time_mlp.3.weight": (10, 48),
        "resolution_conditioning_mlp.2.bias": (10,),
        "context_projection_summary_text_embeddings.weight": (10, 5),
        "summary_text_embeddings_mask_token": (1, 10),
        "self_conditioning_latents_projection.0.net.2.bias": (16,),
        "self_conditioning_latents_projection.1.gamma": (16,),
        "blocks.0.latents_attend_to_context.norm_context.gamma": (10,),
        "blocks.1.latents_cross_attn_ff.net.0.weight": (64, 16),
        "blocks.1.global_layers.1.1.net.3.weight": (16, 64),  # behind the drop-out
        "blocks.2.local_layers.0.0.to_kv.weight": (24, 12),
    }
    for name, shape in probes.items():
        assert tuple(official[name].shape) == shape
    assert not official["blocks.0.patches_attend_to_latents.norm.beta"].any()


def test_drop_out_is_no_weight() -> None:
    model, without = tiny(), tiny(dropout=0.0)
    official = to_official(without.state_dict(), without.config)
    assert "blocks.0.global_layers.0.1.net.2.weight" in official
    assert same(from_official(official, model), dict(without.state_dict()))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("missing", r"1 missing, 0 unexpected keys for FIT \(first: latents\)"),
        ("unexpected", r"0 missing, 1 unexpected keys for FIT \(first: more\)"),
        ("longer", r"patches_pe is \(25, 12\), expected \(48, 12\)"),
        ("biased", r"'patch_to_pixels\.0\.beta' must be zero"),
        ("shallower", "The file looks like depth 1, the config says 2"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused(change: str, sentence: str) -> None:
    model = tiny()
    source = tiny(depth=1) if change == "shallower" else model
    state = to_official(source.state_dict(), source.config)
    if change == "missing":
        del state["latents"]
    elif change == "unexpected":
        state["more"] = torch.zeros(1)
    elif change == "longer":
        state["patches_pe"] = torch.zeros(25, 12)
    elif change == "biased":
        state["patch_to_pixels.0.beta"] = torch.ones(12)
    with pytest.raises(CheckpointError, match=sentence):
        from_official(state, model)


def test_a_foreign_state_dict_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"'latents' is missing, the first key is 'a'"):
        config_from_state_dict({"a": torch.zeros(1)})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"drop": 1}, r"official settings hold \['drop'\], which FIT does not know"),
        ({"fit_block_module": "FITBlockV2"}, "fit_block_module must be FITBlockV5"),
        ({"time_pe_type": "fixed"}, "time_pe_type must be learned, but is fixed"),
        ({"fit_block_config": {"drop_path": 0.2}}, "drop_path is 0.2, but FIT drops no paths"),
        ({"fit_block_config": {}}, "hold neither read_attention_config nor default"),
        ({"fit_block_config": {"gate": 1}}, r"settings of blocks hold \['gate'\]"),
    ],
)
def test_settings_without_counterpart_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        config_from_official({**OFFICIAL, **changes})


def test_whole_settings_are_needed() -> None:
    with pytest.raises(ConfigError, match=r"official settings lack \['input_channels'"):
        config_from_official({"fit_block_config": {}})


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        ({"reads_frame_rate": True}, "reads_frame_rate=True"),
        ({"local_depth": 1, "local_kind": "convolution"}, "local_kind=convolution"),
    ],
)
def test_what_is_ours_alone_has_no_official_layout(ours: dict[str, Any], said: str) -> None:
    model = tiny(**ours)
    with pytest.raises(ConfigError, match=rf"no place for model\.{said}"):
        to_official(model.state_dict(), model.config)
    assert config_to_official(model.config) is None
