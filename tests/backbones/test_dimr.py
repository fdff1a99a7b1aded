"""DiMR: published sizes, the backbone contract, and each switch against its plain meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from genscale.backbones.base import parameter_count
from genscale.backbones.dimr import DiMR
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.flops import count_flops, count_flops_by_module, meta_twin

TINY: dict[str, Any] = {
    "input_size": 8,
    "in_channels": 2,
    "num_classes": 5,
    "hidden_sizes": [16, 8],
    "depths": [3, 3],
    "patch_sizes": [2, 1],
    "num_heads": 2,
    "kernel_sizes": 3,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "layer norm": {"norm": "td_ln"},
    "plain norm": {"norm": "rms"},
    "adaptive norm": {"norm": "ada_rms"},
    "rotary": {"position": "axial_rope"},
    "unconditional": {"num_classes": 0},
    "three branches": {
        "hidden_sizes": [16, 8, 8],
        "depths": [3, 1, 1],
        "patch_sizes": [2, 2, 1],
        "image_ratios": [2, 1, 1],
    },
    "two transformers": {"block_types": ["transformer", "transformer"]},
    "patches of four": {"patch_sizes": [4, 2]},
    "factor four": {"patch_sizes": [4, 1]},
    "one branch": {"hidden_sizes": [16], "depths": [3], "patch_sizes": [2]},
    "detached": {"detach_lowres": True},
    "plain upsampler": {"fused_upsample": False},
}


def build(seed: int = 0, **changes: Any) -> DiMR:
    """A tiny model whose weights are all random, so that nothing is at its neutral start."""
    torch.manual_seed(seed)
    model = DiMR(**{**TINY, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def sample(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch(size: int = 3, side: int = 8) -> tuple[Tensor, Tensor, Conditioning]:
    labels = torch.tensor([0, 4, -1, 2])[:size]
    return sample(size, 2, side, side), torch.linspace(-4, 4, size), Conditioning(labels=labels)


# published sizes


def published(name: str, resolution: int, channels: int, downsample: int) -> dict[str, Any]:
    """Arguments in conf/model/<name>.yaml for some data, without composing a whole run."""
    folder = Path(__file__).parents[2] / "conf" / "model"

    def load(file: str) -> DictConfig:
        config = OmegaConf.load(folder / f"{file}.yaml")
        assert isinstance(config, DictConfig)
        bases = [entry for entry in config.pop("defaults") if isinstance(entry, str)]
        merged = OmegaConf.merge(*[load(base) for base in bases if base != "_self_"], config)
        assert isinstance(merged, DictConfig)
        return merged

    if not OmegaConf.has_resolver("latent_size"):
        OmegaConf.register_new_resolver("latent_size", lambda size, factor: size // factor)
    tree = OmegaConf.create(
        {
            "data": {"resolution": resolution, "num_classes": 1000},
            "autoencoder": {"latent_channels": channels, "downsample": downsample},
            "model": load(name),
        }
    )
    arguments: dict[str, Any] = OmegaConf.to_container(tree.model, resolve=True)  # type: ignore
    assert arguments.pop("_target_") == "genscale.backbones.dimr.DiMR"
    return arguments


def on_meta(**arguments: Any) -> DiMR:
    with torch.device("meta"):
        return DiMR(**arguments)


# parameters and multiply-accumulates of the official class; those of the ImageNet 64 models are
# without a null class, which adds one row of the coarsest width
@pytest.mark.parametrize(
    ("name", "data", "parameters", "gigamacs"),
    [
        ("dimr_xl_2r", (256, 4, 8), 505_046_408, 160.2),
        ("dimr_g_2r", (256, 4, 8), 1_056_352_904, 331.1),
        ("dimr_xl_3r", (512, 4, 8), 525_027_372, 206.1),
        ("dimr_m_3r_64", (64, 3, 1), 132_827_913 + 768, 53.5),
        ("dimr_l_3r_64_a", (64, 3, 1), 284_137_737 + 768, 110.6),
        ("dimr_l_3r_64_b", (64, 3, 1), 283_715_769 + 960, 109.9),
    ],
)
def test_published_sizes(
    name: str, data: tuple[int, int, int], parameters: int, gigamacs: float
) -> None:
    model = on_meta(**published(name, *data))
    assert parameter_count(model) == parameters
    assert model.flops() / 2e9 == pytest.approx(gigamacs, rel=0.005)


def test_the_default_model_is_small() -> None:
    model = on_meta(**{**published("dimr", 16, 1, 1), "num_classes": 10})
    assert model.sample_shape == (1, 16, 16)
    assert parameter_count(model) == 602_120  # 0.6 M: no outside reference, pinned here


def test_flops_are_listed_by_module() -> None:
    table = count_flops_by_module(build(), (2, 8, 8))
    # 16 cells and the class token, 4 maps of width 16 -> 4 cells of width 8; 2 FLOPs a product
    assert table["stages.1.upsample"] == 2 * 17 * 64 * 32
    assert table["stages.0"] + table["stages.1"] == table[""]


def test_counting_copies_no_weights_and_leaves_the_model_alone() -> None:
    model = build().train()
    twin = meta_twin(model)
    assert all(parameter.is_meta for parameter in twin.parameters())
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert model.training
    # four times the cells: everything but attention (quadratic) and the class token (constant)
    assert 4 < count_flops(model, (2, 16, 16)) / count_flops(model, (2, 8, 8)) < 5


def test_parameters_are_listed_by_block() -> None:
    table = build().num_parameters_by_block()
    assert table["time"] == 4 * sum(build().time.sizes)
    assert sum(table.values()) == parameter_count(build())


# the contract


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_predicts_the_pyramid_and_differentiates(name: str) -> None:
    model = build(**VARIANTS[name]).train()
    x, t, cond = batch()
    output = model(x, t, cond)
    pyramid = output.aux["pyramid"]
    factors = [branch.cell_size for branch in model.stages]
    count = len(model.config["hidden_sizes"])
    assert output.sample is pyramid[-1]
    assert output.sample.shape == x.shape
    assert len(pyramid) == count == len(model.pyramid_weights) == len(factors)
    torch.stack([prediction.square().mean() for prediction in pyramid]).sum().backward()
    # every parameter takes part, or data-parallel training would wait for its gradient
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_predictions_halve_in_size_towards_the_coarse() -> None:
    for changes in ({}, {"patch_sizes": [4, 2]}):
        pyramid = build(**changes)(*batch()).aux["pyramid"]
        assert [tuple(p.shape) for p in pyramid] == [(3, 2, 4, 4), (3, 2, 8, 8)]


def test_a_sample_does_not_depend_on_its_batch() -> None:
    model, (x, t, cond) = build(), batch()
    together = model(x, t, cond).sample
    alone = model(x[1:2], t[1:2], cond.select(torch.tensor([1]))).sample
    torch.testing.assert_close(together[1:2], alone, rtol=1e-5, atol=1e-6)


def test_a_shared_time_equals_the_same_time_for_every_sample() -> None:
    model, (x, _, cond) = build(), batch()
    shared = model(x, torch.tensor([1.5]), cond).sample
    torch.testing.assert_close(shared, model(x, torch.full((3,), 1.5), cond).sample)


def test_time_changes_the_prediction_and_a_fresh_model_ignores_it() -> None:
    x, _, cond = batch()
    early, late = torch.tensor([-4.0]), torch.tensor([4.0])
    trained, fresh = build(), DiMR(**TINY).eval()
    assert not torch.allclose(trained(x, early, cond).sample, trained(x, late, cond).sample)
    assert torch.equal(fresh(x, early, cond).sample, fresh(x, late, cond).sample)


def test_the_null_label_and_missing_labels_are_the_last_row_of_the_table() -> None:
    model, (x, t, _) = build(), batch()
    null = model(x, t, Conditioning(labels=torch.full((3,), -1))).sample
    assert torch.equal(model(x, t, Conditioning()).sample, null)
    assert not torch.allclose(model(x, t, Conditioning(labels=torch.zeros(3).long())).sample, null)
    with torch.no_grad():
        model.get_parameter("stages.0.class_table.weight")[5] += 1
    assert not torch.allclose(model(x, t, Conditioning()).sample, null)


def test_an_unconditional_model_has_no_table_and_ignores_labels() -> None:
    model, (x, t, cond) = build(num_classes=0), batch()
    assert not any("class_table" in name for name, _ in model.named_parameters())
    assert torch.equal(model(x, t, cond).sample, model(x, t, Conditioning()).sample)


@pytest.mark.parametrize("position", ["learned", "axial_rope"])
def test_other_sizes_than_trained_including_oblong_ones(position: str) -> None:
    model = build(position=position)
    x = sample(1, 2, 12, 16)
    pyramid = model(x, torch.zeros(1), Conditioning()).aux["pyramid"]
    assert [tuple(p.shape[2:]) for p in pyramid] == [(6, 8), (12, 16)]


def test_cropped_positions_see_a_corner_of_the_trained_picture() -> None:
    model = build(position_resize="crop")
    table = model.get_parameter("stages.1.position.table").view(8, 8, 8)
    assert torch.equal(model.stages[1].position(4, 4), table[:4, :4])


def test_an_oblong_trained_size() -> None:
    model = build(input_size=[4, 8])
    assert model.sample_shape == (2, 4, 8)
    assert model.get_parameter("stages.1.position.table").shape == (4 * 8, 8)


def test_image_ratio_averages_the_picture() -> None:
    model = build(hidden_sizes=[16], depths=[1], patch_sizes=[1], image_ratios=[2])
    x, t, cond = batch()
    blocks = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(4, 4)  # averages to zero
    torch.testing.assert_close(model(x, t, cond).sample, model(x + blocks, t, cond).sample)


# switches that must not change numbers


def test_fused_and_plain_upsamplers_agree_in_values_and_gradients() -> None:
    fused, plain = build(), build(fused_upsample=False)
    assert torch.equal(
        fused.stages[1].upsample.project.weight, plain.stages[1].upsample.project.weight
    )
    grads = []
    for model in (fused, plain):
        y = model(*batch()).sample
        grads.append([y, *torch.autograd.grad(y.square().mean(), list(model.parameters()),
                                              materialize_grads=True)])  # fmt: skip
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("switch", ["argument", "diffusers"])
def test_recomputed_blocks_give_the_same_gradients(switch: str) -> None:
    grads = []
    for recompute in (False, True):
        model = build(dropout=0.2, checkpoint_stages=[0, 1] if recompute else []).train()
        if recompute and switch == "diffusers":
            model = build(dropout=0.2).train()
            model.enable_gradient_checkpointing()
        assert all(branch.gradient_checkpointing == recompute for branch in model.stages)
        torch.manual_seed(3)  # drop-out draws from torch's generator
        loss = model(*batch()).sample.square().mean()
        grads.append(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True))
    for kept, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(kept, recomputed)


def test_detached_features_keep_the_finest_loss_out_of_the_coarse_branch() -> None:
    model = build(detach_lowres=True)
    x, t, cond = batch()
    finest = torch.autograd.grad(
        model(x, t, cond).sample.sum(), list(model.stages[0].parameters()), allow_unused=True
    )
    assert all(grad is None for grad in finest)
    assert torch.equal(model(x, t, cond).sample, build()(x, t, cond).sample)


@pytest.mark.parametrize("fused", [True, False])
def test_bfloat16_autocast_stays_close(fused: bool) -> None:
    model, inputs = build(fused_upsample=fused), batch()
    exact = model(*inputs).sample
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(*inputs).sample
    # about twenty layers, each rounding at 2^-9
    assert (rounded.float() - exact).norm() / exact.norm() < 0.03


@pytest.mark.parametrize("name", ["default", "rotary", "layer norm"])
def test_blocks_compile_without_graph_breaks(name: str) -> None:
    model, inputs = build(**VARIANTS[name]), batch()
    expected = model(*inputs).sample
    torch._dynamo.reset()
    compiled = torch.compile(model.stages[0].blocks[0], fullgraph=True, backend="eager")
    model.stages[0].blocks[0] = compiled
    torch.testing.assert_close(model(*inputs).sample, expected)


def test_the_whole_model_compiles_into_one_graph() -> None:
    model, (x, t, cond) = build(depths=[1, 1]), batch()

    def predict(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return model(x, t, Conditioning(labels=labels)).sample

    torch._dynamo.reset()
    results = []
    for function in (predict, torch.compile(predict, fullgraph=True, backend="eager")):
        y = function(x, t, cond.labels)
        results.append([y, *torch.autograd.grad(y.sum(), model.time.value_0)])
    for expected, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, expected)


# weights


def test_initialisation_is_a_function_of_torchs_seed() -> None:
    states = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        states.append(DiMR(**TINY).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["stages.0.head.weight"], states[2]["stages.0.head.weight"])


def test_initial_laws() -> None:
    torch.manual_seed(0)
    model = DiMR(**{**TINY, "hidden_sizes": [128, 64], "norm": "ada_rms"})
    state = model.state_dict()
    # 0.02 within four standard errors of the smallest matrix (25 x ...: 768 numbers and more)
    for name in ("stages.0.blocks.0.attention.qkv.weight", "stages.0.class_table.weight",
                 "stages.1.position.table", "stages.1.upsample.project.weight"):  # fmt: skip
        assert state[name].std().item() == pytest.approx(0.02, rel=0.11)
    assert not state["stages.0.blocks.0.mlp.gate_up.bias"].any()
    assert not state["stages.0.blocks.0.mlp_norm.linear.weight"].any()
    # torch's own law: uniform within 1 / sqrt(fan-in), fan-in 2 channels x 2 x 2
    assert state["stages.0.patch.weight"].abs().max() <= 8**-0.5
    assert state["stages.0.patch.weight"].std().item() == pytest.approx(8**-0.5 / 3**0.5, rel=0.1)


def test_a_model_built_on_the_meta_device_can_be_started_later() -> None:
    model = on_meta(**TINY).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    model.reset_parameters()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_decay_spares_the_gates_alone() -> None:
    model = build()
    assert model.no_weight_decay() == {"time.gate_weight", "time.gate_bias"}
    assert model.no_weight_decay() <= set(dict(model.named_parameters()))


@pytest.mark.parametrize("name", ["default", "three branches", "rotary"])
def test_saving_and_loading_keep_settings_and_numbers(name: str, tmp_path: Path) -> None:
    model = build(**VARIANTS[name])
    model.save_pretrained(tmp_path)
    loaded = DiMR.from_pretrained(tmp_path)
    assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
        k: v for k, v in model.config.items() if k[0] != "_"
    }
    assert torch.equal(loaded.eval()(*batch()).sample, model(*batch()).sample)


def test_settings_from_a_config_library_are_kept_as_plain_lists() -> None:
    model = build(depths=OmegaConf.create([1, 1]), patch_sizes=(2, 1))
    assert type(model.config["depths"]) is list
    assert model.config["patch_sizes"] == [2, 1]


def test_pyramid_weights_are_the_published_ones_unless_given() -> None:
    assert build().pyramid_weights == [0.25, 1.0]
    assert build(**VARIANTS["three branches"]).pyramid_weights == [0.25, 0.5, 1.0]
    assert build(**VARIANTS["one branch"]).pyramid_weights == [1.0]
    assert build(pyramid_weights=[0.5, 2]).pyramid_weights == [0.5, 2.0]


def test_block_classes_name_the_blocks() -> None:
    names = [type(module).__name__ for module in build().modules()]
    assert sorted(name for name in names if name in DiMR.block_classes) == [
        *["ConvNeXtBlock"] * 3,
        *["TransformerBlock"] * 3,
    ]


# mistakes


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"depths": [3, 3, 3]}, "model.depths has 3 entries but model.hidden_sizes has 2"),
        ({"depths": [3, 2]}, "model.depths must be odd, but its entry 1 is 2. Give 1 or 3"),
        ({"hidden_sizes": []}, "model.hidden_sizes is empty"),
        ({"hidden_sizes": [15, 8]}, r"hidden_sizes\[0\] is 15, which 2 heads do not divide"),
        ({"kernel_sizes": 4}, "model.kernel_sizes must be odd, but its entry 1 is 4"),
        ({"patch_sizes": [2, 0]}, "model.patch_sizes must be positive, but its entry 1 is 0"),
        ({"patch_sizes": [3, 2]}, "cells of 3 pixels and branch 1 of 2, which must divide it"),
        ({"input_size": 9}, "model.input_size is 9 x 9, which must be a multiple of 2"),
        ({"block_types": ["transfomer", "convnext"]}, "Did you mean 'transformer'"),
        ({"block_types": ["convnext"] * 2}, "no branch is a transformer"),
        ({"norm": "td_rmsn"}, "model.norm must be one of .* Did you mean 'td_rms'"),
        ({"position": "rope"}, "model.position must be one of learned, axial_rope"),
        ({"position": "axial_rope", "num_heads": 8}, "needs 4 channels a head, but branch 0 has 2"),
        ({"dropout": 1.0}, r"model.dropout must lie in \[0, 1\), but its entry 0 is 1.0"),
        ({"num_classes": None}, "model.num_classes must be an integer of at least 0, but is None"),
        ({"in_channels": 0}, "model.in_channels must be an integer of at least 1, but is 0"),
        ({"checkpoint_stages": [2]}, r"checkpoint_stages is \[2\] but the branches are 0 to 1"),
        ({"pyramid_weights": [1.0]}, "pyramid_weights has 1 entries but there are 2 branches"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        DiMR(**{**TINY, **changes})


@pytest.mark.parametrize(
    ("x", "t", "labels", "sentence"),
    [
        ((1, 3, 8, 8), (1,), None, r"takes x of shape \(B, 2, H, W\), but \(1, 3, 8, 8\)"),
        ((1, 2, 8, 7), (1,), None, "multiples of 2, the coarsest cell, but x is 8 x 7"),
        ((3, 2, 8, 8), (2,), None, r"t must have shape \(3,\), or \(1,\) when shared"),
        ((3, 2, 8, 8), (3,), (1,), r"cond.labels must have shape \(3,\), but has \(1,\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    x: tuple[int, ...], t: tuple[int, ...], labels: tuple[int, ...] | None, sentence: str
) -> None:
    cond = Conditioning(labels=None if labels is None else torch.zeros(labels).long())
    with pytest.raises(ValueError, match=sentence):
        build()(torch.zeros(x), torch.zeros(t), cond)
