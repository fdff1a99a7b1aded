"""State dicts of lucidrains' RIN load exactly, come back exactly, or are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from genscale.backbones.rin import RIN
from genscale.errors import CheckpointError, ConfigError
from genscale.io.converters.fit import check_betas, layer_name, with_betas
from genscale.io.converters.rin import (
    config_from_official,
    config_from_state_dict,
    from_official,
    to_official,
)

OFFICIAL: dict[str, Any] = {
    "dim": 12,
    "image_size": 8,
    "patch_size": 2,
    "depth": 2,
    "latent_self_attn_depth": 2,
    "dim_latent": 16,
    "num_latents": 5,
    "heads": 2,
    "dim_head": 4,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "a token of time": {"latent_token_time_cond": True, "patches_self_attn": False},
    "without norms of patches": {"dual_patchnorm": False},
    "norms of heads": {"qk_norm": True},
}


def tiny(**changes: Any) -> RIN:
    torch.manual_seed(0)
    return RIN(**config_from_official({**OFFICIAL, **changes}))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", VARIANTS)
def test_there_and_back_is_exact_and_shapes_tell_the_settings(name: str) -> None:
    model = tiny(**VARIANTS[name])
    official = to_official(model.state_dict(), model.config)
    found = config_from_state_dict(official, num_heads=2, input_size=8)
    assert found == {key: model.config[key] for key in found}
    with torch.device("meta"):
        other = RIN(**found)
    ours = from_official(official, other)
    assert same(ours, dict(model.state_dict()))
    assert same(to_official(ours, model.config), official)


def test_the_names_are_those_of_the_program() -> None:
    official = to_official(tiny(qk_norm=True).state_dict(), tiny(qk_norm=True).config)
    probes = {
        "latents": (5, 16),
        "to_patches.1.weight": (24,),
        "to_patches.2.weight": (12, 24),
        "to_patches.3.bias": (12,),
        "to_pixels.1.bias": (12,),
        "axial_pos_emb_height_mlp.5.weight": (12, 6),
        "axial_pos_emb_width_mlp.1.weight": (6, 1),
        "init_self_cond_latents.1.beta": (16,),
        "blocks.0.latent_final_norm.gamma": (16,),
        "blocks.0.latent_self_attns.1.0.time_cond.1.weight": (32, 48),
        "blocks.0.latent_self_attns.1.1.net.2.weight": (16, 64),
        "blocks.1.patches_peg.ds_conv.weight": (12, 1, 3, 3),
        "blocks.1.patches_self_attn.to_qkv.weight": (24, 12),
        "blocks.1.patches_self_attn.to_out.1.gamma": (12,),
        "blocks.1.patches_attend_to_latents.q_norm.gamma": (2, 1, 4),
    }
    for name, shape in probes.items():
        assert tuple(official[name].shape) == shape
    assert "blocks.1.patches_attend_to_latents.q_norm.beta" not in official


def test_names_within_layers_and_zeros_beside_gains() -> None:
    assert layer_name("blocks.0.read.context_norm.weight") == "blocks.0.read.norm_context.gamma"
    assert layer_name("mlp.down.bias") == "mlp.net.2.bias"
    both = with_betas({"a.gamma": torch.ones(2), "b": torch.ones(1)})
    assert both["a.beta"].tolist() == [0.0, 0.0]
    with pytest.raises(CheckpointError, match=r"'a\.beta' must be zero, since X's norms have no"):
        check_betas({**both, "a.beta": torch.ones(2)}, owner="X")


def test_a_state_dict_that_does_not_fit_is_refused() -> None:
    model = tiny()
    state = to_official(model.state_dict(), model.config)
    deeper = tiny(depth=3)
    with pytest.raises(CheckpointError, match="The file looks like depth 2, the config says 3"):
        from_official(state, deeper)
    with pytest.raises(CheckpointError, match=r"no RIN state dict: 'latents' is missing"):
        config_from_state_dict({"a": torch.zeros(1)})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dims": 3}, r"settings hold \['dims'\] that RIN does not know"),
        ({"learned_sinusoidal_dim": 8}, "learned_sinusoidal_dim must be 16, but is 8"),
    ],
)
def test_settings_without_counterpart_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        config_from_official({**OFFICIAL, **changes})


def test_what_the_program_cannot_build_is_refused() -> None:
    with torch.device("meta"):
        model = RIN(input_size=8, patch_size=2, num_classes=3)
    with pytest.raises(ConfigError, match=r"cannot build model\.num_classes=3"):
        to_official(model.state_dict(), model.config)
