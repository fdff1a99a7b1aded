"""Official DiMR state dicts load exactly, come back exactly, and say what is wrong otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genscale.backbones.dimr import DiMR
from genscale.conditioning.base import Conditioning
from genscale.errors import CheckpointError, ConfigError
from genscale.io.converters.dimr import (
    config_from_official,
    config_from_state_dict,
    from_official,
    to_official,
)
from scripts.parity import Case

GOLDEN = Path(__file__).parents[1] / "golden" / "data" / "dimr"
MODEL_CASES = sorted(path for path in GOLDEN.glob("*.json") if "loss_coeffs" in Case(path).config)
UNUSED = ("stages.0.pos_emb.freqs_h", "stages.0.pos_emb.freqs_w")


def official_settings(stages: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    return {
        "channels": 4,
        "num_classes": 1001,
        "block_grad_to_lowres": False,
        "norm_type": "TDRMSN",
        "stage_configs": stages,
        **changes,
    }


def stage(kind: str, dim: int, blocks: int, grid: int, patch: int) -> dict[str, Any]:
    extra = {"num_attention_heads": 16} if kind == "TransformerBlock" else {"kernel_size": 7}
    return {
        "block_type": kind,
        "dim": dim,
        "hidden_dim": 2 * dim,
        "num_blocks": blocks,
        "max_height": grid,
        "max_width": grid,
        "image_input_ratio": 1,
        "input_feature_ratio": patch,
        "final_kernel_size": 3,
        "dropout_prob": 0,
        **extra,
    }


XL = official_settings(
    [stage("TransformerBlock", 960, 39, 16, 2), stage("ConvNeXtBlock", 480, 20, 32, 1)]
)
G = official_settings(
    [stage("TransformerBlock", 1152, 57, 16, 2), stage("ConvNeXtBlock", 576, 29, 32, 1)]
)


def on_meta(**settings: Any) -> DiMR:
    with torch.device("meta"):
        return DiMR(**settings)


def tiny(**changes: Any) -> DiMR:
    settings: dict[str, Any] = {
        "input_size": 8,
        "num_classes": 5,
        "hidden_sizes": [16, 8],
        "depths": [3, 1],
        "patch_sizes": [2, 1],
        "num_heads": 2,
    }
    return DiMR(**{**settings, **changes})


def without_private(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name[0] != "_"}


@pytest.mark.parametrize("path", MODEL_CASES, ids=lambda path: path.stem)
def test_there_and_back_is_exact(path: Path) -> None:
    case = Case(path)
    official = case.group("state")
    model = DiMR(**config_from_official(case.config["model"]))
    ours = from_official(official, model)
    model.load_state_dict(ours, strict=True)
    back = to_official(ours, model.config)
    assert sorted(back) == sorted(official)
    for name, tensor in official.items():
        if name not in UNUSED:
            assert torch.equal(back[name], tensor), name
    again = from_official(back, model)
    assert all(torch.equal(again[name], ours[name]) for name in ours)


@pytest.mark.parametrize("path", MODEL_CASES, ids=lambda path: path.stem)
def test_shapes_alone_tell_the_settings(path: Path) -> None:
    case = Case(path)
    stated = config_from_official(case.config["model"])
    found = config_from_state_dict(case.group("state"), num_heads=stated["num_heads"][0])
    # what leaves no trace in a state dict: switches, drop-out, heads of convolutional branches
    blind = {"detach_lowres", "dropout", "position_resize", "num_heads"}
    for name in set(stated) - blind:
        wanted = stated[name]
        if name == "kernel_sizes":  # of transformers: without meaning
            wanted = [k if b == "convnext" else 1
                      for k, b in zip(wanted, stated["block_types"], strict=True)]  # fmt: skip
        assert found[name] == wanted, name
    DiMR(**found).load_state_dict(from_official(case.group("state"), DiMR(**found)))


@pytest.mark.parametrize(
    ("settings", "parameters", "probes"),
    [
        (
            XL,
            505_046_408,
            {
                "stages.0.input_layer.3.position_embeddings.weight": (256, 960),
                "stages.0.class_embeds.weight": (1001, 960),
                "stages.1.upsample.0.weight.nodecay_bias": (38400,),
                "stages.1.upsample.1.kernel.weight": (1920, 38400),
                "stages.1.blocks.20.block1.1.weight": (480, 1, 7, 7),
                "stages.0.skip_denses.18.weight": (960, 1920),
            },
        ),
        (
            G,
            1_056_352_904,
            {
                "stages.1.upsample.1.kernel.weight": (2304, 66816),
                "stages.0.blocks.56.block2.w1.weight": (2304, 1152),
            },
        ),
    ],
    ids=["XL/2R", "G/2R"],
)
def test_the_released_checkpoints_have_these_keys_and_shapes(
    settings: dict[str, Any], parameters: int, probes: dict[str, tuple[int, ...]]
) -> None:
    model = on_meta(**config_from_official(settings))
    official = to_official(model.state_dict(), model.config)
    assert sum(tensor.numel() for tensor in official.values()) == parameters
    for name, shape in probes.items():
        assert tuple(official[name].shape) == shape
    found = config_from_state_dict(official)  # 16 heads, the default
    assert found["depths"] == [
        stage["num_blocks"] // 2 * 2 + 1 for stage in settings["stage_configs"]
    ]
    twin = on_meta(**found)
    loaded = from_official(official, twin)
    assert {n: t.shape for n, t in loaded.items()} == {
        n: t.shape for n, t in model.state_dict().items()
    }


def test_packed_and_stacked_parts_land_in_their_places() -> None:
    model = tiny()
    official = to_official(model.state_dict(), model.config)
    official["stages.0.blocks.1.block2.norm.scale.nodecay_bias"].fill_(7.0)
    official["stages.1.blocks.0.block2.w1.weight"].fill_(3.0)
    ours = from_official(official, model)
    part = model.time.slices()["stages.0.blocks.1.mlp_norm.scale"]
    assert torch.equal(ours["time.gate_bias"][part], torch.full((16,), 7.0))
    assert ours["time.gate_bias"].count_nonzero() == 16
    gate, up = ours["stages.1.blocks.0.mlp.gate_up.weight"].chunk(2)
    assert (up == 3.0).all()
    assert not (gate == 3.0).any()


def test_adaptive_norms_convert() -> None:
    model = tiny(norm="ada_rms")
    official = to_official(model.state_dict(), model.config)
    assert official["stages.0.blocks.0.block1.norm.linear.weight"].shape == (16, 16)
    assert config_from_state_dict(official)["norm"] == "ada_rms"
    ours = from_official(official, model)
    assert all(torch.equal(ours[name], value) for name, value in model.state_dict().items())


def test_rotary_models_write_the_official_unused_tables_at_their_start() -> None:
    model = tiny(position="axial_rope")
    official = to_official(model.state_dict(), model.config)
    assert official[UNUSED[0]].shape == (2, 16 // 4)
    # linspace(log pi, log 5 pi, 4)
    expected = torch.tensor([1.14473, 1.68121, 2.21769, 2.75417])
    torch.testing.assert_close(official[UNUSED[1]][1], expected, rtol=1e-5, atol=0)
    assert not any(name.startswith("stages.1.pos_emb") for name in official)


def test_rotary_models_with_classes_run_though_the_official_program_crashes() -> None:
    y = tiny(position="axial_rope")(torch.zeros(1, 4, 8, 8), torch.zeros(1), Conditioning()).sample
    assert torch.isfinite(y).all()


def test_settings_translate() -> None:
    found = config_from_official(XL)
    assert found["num_classes"] == 1000  # the null class is not counted
    assert found["depths"] == [39, 21]  # 20 builds 21
    assert found["input_size"] == 32
    assert found["norm"] == "td_rms"
    assert found["position_resize"] == "interpolate"
    assert config_from_official(XL, parity=True)["position_resize"] == "crop"


def test_official_defaults_are_layer_norm_and_learned_positions() -> None:
    settings = {k: v for k, v in XL.items() if k not in ("norm_type", "num_classes")}
    found = config_from_official(settings)
    assert (found["norm"], found["position"], found["num_classes"]) == ("td_ln", "learned", 0)


# mistakes


def damaged(change: str) -> tuple[dict[str, Tensor], DiMR]:
    model = tiny()
    state = to_official(model.state_dict(), model.config)
    if change == "missing":
        del state["stages.0.class_embeds.weight"], state["stages.1.output_layer.2.bias"]
    elif change == "unexpected":
        state["stages.0.extra"] = torch.zeros(1)
    elif change == "deeper":
        model = tiny(depths=[5, 1])
    elif change == "wider":
        model = tiny(hidden_sizes=[32, 8])
    elif change == "wrapped":
        state = {"model." + name: tensor for name, tensor in state.items()}
    return state, model


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("missing", "2 missing, 0 unexpected keys for DiMR .first: stages.*num_classes 0, the con"),
        ("unexpected", r"0 missing, 1 unexpected keys for DiMR \(first: stages.0.extra\)"),
        (
            "deeper",
            r"looks like depths \[3, 1\], the config says \[5, 1\]. Build the model with depths",
        ),
        ("wider", r"another shape than DiMR's \(first: .*looks like hidden_sizes \[16, 8\]"),
        ("wrapped", "The file does not look like a DiMR. Check its path."),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused(change: str, sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        from_official(*damaged(change))


def test_our_state_dict_must_be_whole_too() -> None:
    model = tiny()
    state = model.state_dict()
    del state["time.value_0"]
    with pytest.raises(CheckpointError, match=r"1 missing, 0 unexpected .*first: time.value_0"):
        to_official(state, model.config)


def test_a_foreign_state_dict_is_refused() -> None:
    with pytest.raises(
        CheckpointError, match=r"must begin with 'stages\.0\.', the first is 'a\.b'"
    ):
        config_from_state_dict({"a.b": torch.zeros(1)})


def test_without_position_tables_the_input_size_must_be_told() -> None:
    model = tiny(position="axial_rope", hidden_sizes=[16], depths=[1], patch_sizes=[2])
    state = to_official(model.state_dict(), model.config)
    with pytest.raises(CheckpointError, match=r"its input size is unknown\. Give it"):
        config_from_state_dict(state)
    assert config_from_state_dict(state, input_size=8)["input_size"] == 8


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"condition_dim": 768},
            r"settings of the model hold \['condition_dim'\], which DiMR does",
        ),
        ({"norm_type": "GN"}, "norm_type must be one of TDRMSN, LN, RMSN, ADARMSN, but is 'GN'"),
        (
            {"stage_configs": [*XL["stage_configs"][:1], stage("ConvNeXtBlock", 480, 20, 16, 1)]},
            r"different sizes \[\(16, 16\), \(32, 32\)\]",
        ),
        (
            {"stage_configs": [{**XL["stage_configs"][0], "depth": 3}]},
            r"stage_configs\[0\] hold \['depth'\]",
        ),
    ],
)
def test_settings_without_counterpart_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        config_from_official({**XL, **changes})


def test_settings_of_a_converted_model_round_trip() -> None:
    settings = config_from_official(XL)
    stored = without_private(on_meta(**settings).config)
    assert {name: stored[name] for name in settings} == settings
