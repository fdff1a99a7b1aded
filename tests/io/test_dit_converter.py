"""DiT and SiT state dicts, official and of diffusers, load exactly and come back exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from genscale.backbones.dit import DiT
from genscale.conditioning.base import Conditioning
from genscale.errors import CheckpointError, ConfigError
from genscale.io.converters.dit import (
    config_from_diffusers,
    config_from_official,
    config_from_state_dict,
    diffusers_config,
    from_diffusers,
    from_official,
    position_table,
    to_diffusers,
    to_official,
)

XL: dict[str, Any] = {
    "input_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 1152,
    "depth": 28,
    "num_heads": 16,
    "mlp_ratio": 4.0,
    "class_dropout_prob": 0.1,
    "num_classes": 1000,
    "learn_sigma": True,
}


def on_meta(**settings: Any) -> DiT:
    with torch.device("meta"):
        return DiT(**settings)


def tiny(**changes: Any) -> DiT:
    """A model whose weights are all random; a fresh one predicts zero whatever they are."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "input_size": 8,
        "num_classes": 5,
        "hidden_size": 32,
        "depth": 2,
        "num_heads": 2,
        "learn_sigma": True,
    }
    model: DiT = DiT(**{**settings, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("changes", [{}, {"num_classes": 0}, {"learn_sigma": False}])
def test_there_and_back_is_exact(changes: dict[str, Any]) -> None:
    model = tiny(**changes)
    official = to_official(model.state_dict(), model.config)
    ours = from_official(official, on_meta(**config_from_state_dict(official, num_heads=2)))
    assert same(ours, dict(model.state_dict()))
    assert same(to_official(ours, model.config), official)


def test_the_released_checkpoints_have_these_keys_and_shapes() -> None:
    model = on_meta(**config_from_official(XL))
    official = to_official(model.state_dict(), model.config)
    # the published count, and the position table, which is stored with the weights
    assert sum(tensor.numel() for tensor in official.values()) == 674_834_720 + 256 * 1152
    probes = {
        "x_embedder.proj.weight": (1152, 4, 2, 2),
        "t_embedder.mlp.0.weight": (1152, 256),
        "t_embedder.mlp.2.bias": (1152,),
        "y_embedder.embedding_table.weight": (1001, 1152),
        "pos_embed": (1, 256, 1152),
        "blocks.27.attn.qkv.bias": (3456,),
        "blocks.27.attn.proj.weight": (1152, 1152),
        "blocks.0.mlp.fc1.weight": (4608, 1152),
        "blocks.0.mlp.fc2.weight": (1152, 4608),
        "blocks.0.adaLN_modulation.1.weight": (6912, 1152),
        "final_layer.adaLN_modulation.1.bias": (2304,),
        "final_layer.linear.weight": (32, 1152),
    }
    for name, shape in probes.items():
        assert tuple(official[name].shape) == shape
    assert len(official) == 28 * 10 + 12
    found = config_from_state_dict(official)
    assert found == {k: v for k, v in config_from_official(XL).items() if k != "position_resize"}


def test_the_position_table_is_rebuilt() -> None:
    table = position_table(tiny().config)
    assert table.shape == (1, 16, 32)
    # the cell in row 1, column 2 of a 4 x 4 grid; the first of 8 frequencies is 1, columns first
    wanted = torch.tensor([2.0, 2.0, 1.0, 1.0])
    found = table[0, 1 * 4 + 2, [0, 8, 16, 24]]
    waves = torch.stack((wanted[0].sin(), wanted[1].cos(), wanted[2].sin(), wanted[3].cos()))
    torch.testing.assert_close(found, waves)


def test_settings_translate() -> None:
    assert config_from_official({}) == config_from_official(XL)  # the official defaults
    assert config_from_official(XL)["position_resize"] == "interpolate"
    assert config_from_official(XL, parity=True)["position_resize"] == "extend"
    # without drop-out of classes the table has no null row
    bare = config_from_official({**XL, "class_dropout_prob": 0.0})
    assert on_meta(**bare).class_table.num_embeddings == 1000


# diffusers


def test_diffusers_has_the_keys_that_are_written() -> None:
    from diffusers import DiTTransformer2DModel

    model = tiny()
    theirs = DiTTransformer2DModel(**diffusers_config(model.config))
    written = to_diffusers(model.state_dict(), model.config)
    own = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == own
    assert config_from_diffusers(theirs.config) == {
        name: model.config[name] for name in config_from_diffusers(theirs.config)
    }


def test_diffusers_computes_the_same_once_its_two_differences_are_set() -> None:
    from diffusers import DiTTransformer2DModel

    model = tiny()
    theirs = DiTTransformer2DModel(**diffusers_config(model.config)).eval()
    theirs.load_state_dict(to_diffusers(model.state_dict(), model.config))
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    t, labels = torch.tensor([0, 500, 999]), torch.tensor([0, 4, 5])
    output = model(x, t.float(), Conditioning(labels=labels))
    whole = torch.cat((output.sample, output.aux["variance"]), dim=1)
    with torch.no_grad():
        assert not torch.allclose(theirs(x, t, labels).sample, whole, atol=1e-3)
        for block in theirs.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
            block.norm3.eps = 1e-6
        torch.testing.assert_close(theirs(x, t, labels).sample, whole, rtol=1e-4, atol=1e-5)


def test_there_and_back_through_diffusers_is_exact() -> None:
    model = tiny()
    theirs = to_diffusers(model.state_dict(), model.config)
    twin = on_meta(**config_from_diffusers(diffusers_config(model.config)))
    assert same(from_diffusers(theirs, twin), dict(model.state_dict()))


def test_embedders_that_differ_between_blocks_are_refused() -> None:
    model = tiny()
    theirs = to_diffusers(model.state_dict(), model.config)
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
    theirs[name] = theirs[name] + 1
    with pytest.raises(CheckpointError, match=r"linear_1.bias' differs from .* share one embedder"):
        from_diffusers(theirs, model)


@pytest.mark.parametrize("changes", [{"num_classes": 0}, {"mlp_ratio": 2.0}])
def test_settings_that_diffusers_cannot_hold_are_refused(changes: dict[str, Any]) -> None:
    model = tiny(**changes)
    with pytest.raises(ConfigError, match="Save it in the official layout instead"):
        to_diffusers(model.state_dict(), model.config)


# mistakes


def damage(state: dict[str, Tensor], change: str) -> dict[str, Tensor]:
    if change == "missing":
        del state["final_layer.linear.bias"], state["blocks.1.attn.qkv.bias"]
    elif change == "unexpected":
        state["extra"] = torch.zeros(1)
    elif change == "wider":
        state["blocks.0.mlp.fc1.weight"] = torch.zeros(130, 32)
    elif change == "trained positions":
        state["pos_embed"] = state["pos_embed"] + 0.1
    return state


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("missing", r"2 missing, 0 unexpected keys for DiT \(first: "),
        ("unexpected", r"0 missing, 1 unexpected keys for DiT \(first: extra\)"),
        ("wider", r"fc1.weight is \(130, 32\), expected \(128, 32\)"),
        ("trained positions", "is up to 0.1 away from the fixed sines and cosines"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused(change: str, sentence: str) -> None:
    model = tiny()
    state = damage(to_official(model.state_dict(), model.config), change)
    with pytest.raises(CheckpointError, match=sentence):
        from_official(state, model)


def test_half_precision_positions_are_no_trained_ones() -> None:
    model = tiny()
    state = to_official(model.state_dict(), model.config)
    half = {name: tensor.bfloat16() for name, tensor in state.items()}
    assert from_official(half, model)["head.bias"].dtype == torch.bfloat16


def test_a_foreign_state_dict_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"'x_embedder.proj.weight' is missing.* key is 'a'"):
        config_from_state_dict({"a": torch.zeros(1)})


def test_our_state_dict_must_be_whole_too() -> None:
    model = tiny()
    state = model.state_dict()
    del state["head.bias"]
    with pytest.raises(CheckpointError, match=r"1 missing, 0 unexpected .*first: head.bias"):
        to_official(state, model.config)


@pytest.mark.parametrize("function", [to_official, to_diffusers])
def test_linear_attention_has_no_official_layout(function: Callable[..., Any]) -> None:
    model = tiny(attention="nala")
    with pytest.raises(ConfigError, match=r"softmax attention only, .* attention=nala"):
        function(model.state_dict(), model.config)


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"settings hold \['qk_norm'\], which DiT does not know"):
        config_from_official({**XL, "qk_norm": True})
