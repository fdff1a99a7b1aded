"""U-ViT: published sizes, the backbone contract, and each switch against its meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor

from genscale.backbones.base import parameter_count
from genscale.backbones.uvit import UViT
from genscale.cli.resolvers import register_resolvers
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError

CONF = Path(__file__).resolve().parents[2] / "conf"
TINY: dict[str, Any] = {
    "input_size": 8,
    "in_channels": 2,
    "num_classes": 5,
    "patch_size": 2,
    "hidden_size": 16,
    "depth": 5,
    "num_heads": 2,
    "mlp_ratio": 2.0,
}
TEXT: dict[str, Any] = {"num_classes": 0, "text_size": 6, "num_text_tokens": 3}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "biases": {"qkv_bias": True},
    "time layers": {"time_mlp": True},
    "sharp head": {"head_conv": False},
    "unconditional": {"num_classes": 0},
    "text": TEXT,
    "text and classes": {**TEXT, "num_classes": 5},
    "without skips": {"long_skips": False},
    "constant": {"skip_scale": "constant"},
    "geometric": {"skip_scale": "geometric"},
    "gates": {"skip_scale": "gate"},
    "shared gate": {"skip_scale": "gate_shared"},
    "channels": {"skip_scale": "channel"},
    "recomputed": {"checkpoint_blocks": True},
}


def build(seed: int = 0, **changes: Any) -> UViT:
    """A tiny model whose weights are all random, so that nothing is at its neutral start."""
    torch.manual_seed(seed)
    model: UViT = UViT(**{**TINY, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def batch(
    size: int = 3, height: int = 8, width: int = 8, text: bool = False
) -> tuple[Tensor, Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 2, height, width, generator=generator)
    tokens = torch.randn(size, 3, 6, generator=generator) if text else None
    cond = Conditioning(labels=torch.tensor([0, 4, -1])[:size], text=tokens)
    return x, torch.linspace(1, 1000, size), cond


def on_meta(**arguments: Any) -> UViT:
    with torch.device("meta"):
        return UViT(**arguments)


# published sizes


def published(name: str, resolution: int, channels: int, num_classes: int) -> dict[str, Any]:
    """Arguments in conf/model/<name>.yaml for some data, whose pixels stand for latents."""
    register_resolvers()
    data = [f"resolution={resolution}", f"channels={channels}", f"num_classes={num_classes}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides=[f"model={name}", *(f"data.{word}" for word in data)])
    arguments: dict[str, Any] = OmegaConf.to_container(cfg.model, resolve=True)  # type: ignore
    assert arguments.pop("_target_") == "genscale.backbones.uvit.UViT"
    return arguments


# parameters and multiply-accumulates of the official class; those of the ImageNet 64 models are
# without a null class, which adds one row of the table
@pytest.mark.parametrize(
    ("name", "data", "parameters", "gigamacs"),
    [
        ("uvit_s_2", (32, 3, 0), 44_255_328, 12.2),
        ("uvit_s_4", (64, 3, 0), 44_292_228, 12.2),
        ("uvit_m_4", (64, 3, 1000), 130_940_292 + 768, 35.2),
        ("uvit_l_4", (64, 3, 1000), 286_827_652 + 1024, 76.5),
        ("uvit_l_2", (32, 4, 1000), 286_763_172, 76.5),
        ("uvit_l_4", (64, 4, 1000), 286_861_524, 76.5),
        ("uvit_h_2", (32, 4, 1000), 500_832_016, 133.2),
        ("uvit_h_4", (64, 4, 1000), 500_942_656, 133.2),
    ],
)
def test_published_sizes(
    name: str, data: tuple[int, int, int], parameters: int, gigamacs: float
) -> None:
    model = on_meta(**published(name, *data))
    assert parameter_count(model) == parameters
    assert model.flops() / 2e9 == pytest.approx(gigamacs, rel=0.005)


def test_published_sizes_are_fed_the_noise_step() -> None:
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        objective = compose("train", ["model=uvit_h_4"]).objective
    assert objective._target_.endswith(".DDPM")
    assert (objective.time_input, objective.betas) == ("index", "sd_scaled_linear")


# U-ViT-S/2 and S/2-Deep for captions: 77 tokens of width 768; counts of the official class
@pytest.mark.parametrize(
    ("depth", "parameters", "gigamacs"), [(13, 44_692_644, 16.2), (17, 58_345_636, 21.2)]
)
def test_published_sizes_with_text(depth: int, parameters: int, gigamacs: float) -> None:
    model = on_meta(num_classes=0, hidden_size=512, depth=depth, num_heads=8, text_size=768)
    assert parameter_count(model) == parameters
    assert model.flops() / 2e9 == pytest.approx(gigamacs, rel=0.005)


def test_the_default_model_is_small() -> None:
    model = on_meta(**published("uvit", 16, 1, 10))
    assert model.sample_shape == (1, 16, 16)
    assert parameter_count(model) == 1_063_440  # 1 M: no outside reference, pinned here


# the contract


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_predicts_and_differentiates(name: str) -> None:
    model = build(**VARIANTS[name]).train()
    x, t, cond = batch(text="text" in name)
    output = model(x, t, cond)
    assert output.sample.shape == x.shape
    output.sample.square().mean().backward()
    # every parameter takes part, or data-parallel training would wait for its gradient
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    model, (x, t, cond) = build(skip_scale="gate"), batch()
    together = model(x, t, cond).sample
    alone = model(x[1:2], t[1:2], cond.select(torch.tensor([1]))).sample
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("time_mlp", [False, True])
def test_a_shared_time_equals_the_same_time_for_every_sample(time_mlp: bool) -> None:
    model, (x, _, cond) = build(time_mlp=time_mlp), batch()
    shared = model(x, torch.tensor([700.5]), cond).sample
    torch.testing.assert_close(shared, model(x, torch.full((3,), 700.5), cond).sample)
    assert not torch.allclose(shared, model(x, torch.tensor([100.0]), cond).sample)


def test_the_null_label_and_missing_labels_are_the_last_row_of_the_table() -> None:
    model, (x, t, _) = build(), batch()
    null = model(x, t, Conditioning(labels=torch.full((3,), -1))).sample
    assert torch.equal(model(x, t, Conditioning()).sample, null)
    assert not torch.allclose(model(x, t, Conditioning(labels=torch.zeros(3).long())).sample, null)
    with torch.no_grad():
        model.get_parameter("class_table.weight")[5] += 1
    assert not torch.allclose(model(x, t, Conditioning()).sample, null)


def test_missing_text_is_null_text() -> None:
    model, (x, t, cond) = build(**TEXT), batch(text=True)
    null = model(x, t, cond.null()).sample
    assert torch.equal(model(x, t, Conditioning()).sample, null)
    assert not torch.allclose(model(x, t, cond).sample, null)


def test_other_sizes_than_trained_including_oblong_ones() -> None:
    for changes in ({}, {"skip_scale": "channel"}, TEXT):
        x, t, cond = batch(height=12, width=16, text=bool(changes.get("text_size")))
        y = build(**changes)(x, t, cond).sample
        assert y.shape == x.shape
        assert torch.isfinite(y).all()


def test_cropped_positions_see_a_corner_of_the_trained_picture() -> None:
    model = build(position_resize="crop")
    table = model.get_parameter("position.table").view(4, 4, 16)
    assert torch.equal(model.position(2, 3), table[:2, :3])


def test_an_oblong_trained_size() -> None:
    model = build(input_size=(4, 8))
    assert model.sample_shape == (2, 4, 8)
    assert type(model.config["input_size"]) is list
    x, t, cond = batch(height=4)
    assert model(x, t, cond).sample.shape == x.shape


def test_skips_join_the_halves_last_in_first_out() -> None:
    model, seen = build(), {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(
            lambda module, args, output, i=i: seen.__setitem__(i, (args, output))
        )
    model(*batch())
    for inner, outer in ((1, 3), (0, 4)):
        assert seen[outer][0][1] is seen[inner][1]
    assert all(seen[i][0][1] is None for i in (0, 1, 2))


@pytest.mark.parametrize(
    ("changes", "factors"),
    [
        ({"skip_scale": "constant"}, (0.5**0.5, 0.5**0.5)),
        ({"skip_scale": "geometric", "skip_kappa": 0.25}, (0.25, 1.0)),
    ],
)
def test_scaled_skips_are_those_of_smaller_weights(
    changes: dict[str, Any], factors: tuple[float, float]
) -> None:
    scaled, folded = build(**changes), build()
    with torch.no_grad():  # the innermost skip is the first one joined
        for block, factor in zip(folded.blocks[3:], factors, strict=True):
            block.join.weight[:, 16:] *= factor
    torch.testing.assert_close(scaled(*batch()).sample, folded(*batch()).sample)


# switches that must not change numbers


@pytest.mark.parametrize("switch", ["argument", "diffusers"])
def test_recomputed_blocks_give_the_same_gradients(switch: str) -> None:
    grads = []
    for recompute in (False, True):
        model = build(checkpoint_blocks=recompute and switch == "argument")
        if recompute and switch == "diffusers":
            model.enable_gradient_checkpointing()
        assert model.gradient_checkpointing == recompute
        loss = model.train()(*batch()).sample.square().mean()
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    for kept, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(kept, recomputed)


@pytest.mark.parametrize("kind", ["none", "gate", "channel"])
def test_bfloat16_stays_close(kind: str) -> None:
    model, inputs = build(skip_scale=kind), batch()
    exact = model(*inputs).sample
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(*inputs).sample
    # about twenty layers, each rounding at 2^-9
    assert (rounded.float() - exact).norm() / exact.norm() < 0.03
    x, t, cond = inputs
    whole = model.to(torch.bfloat16)(x.bfloat16(), t, cond).sample
    assert whole.dtype == torch.bfloat16
    assert (whole.float() - exact).norm() / exact.norm() < 0.06


def test_the_whole_model_compiles_into_one_graph() -> None:
    model, (x, t, cond) = build(depth=3, skip_scale="gate"), batch()

    def predict(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return model(x, t, Conditioning(labels=labels)).sample

    torch._dynamo.reset()
    compiled = torch.compile(predict, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, t, cond.labels), predict(x, t, cond.labels))


# weights


def test_initial_laws() -> None:
    torch.manual_seed(0)
    state = UViT(**{**TINY, "hidden_size": 128, "skip_scale": "gate"}).state_dict()
    # 0.02 within four standard errors of the smallest of them (256 numbers of extra positions)
    for name in ("blocks.0.attention.qkv.weight", "blocks.3.join.weight", "position.table",
                 "head.weight", "extra_positions"):  # fmt: skip
        assert state[name].std().item() == pytest.approx(0.02, rel=0.18)
    assert not state["blocks.0.mlp.up.bias"].any()
    # torch's own laws: normal tables; uniform gates within 1 / sqrt(18 tokens)
    assert state["class_table.weight"].std().item() == pytest.approx(1.0, rel=0.11)
    assert 0.02 * 3 < state["skip_factors.gates.0.linear_1.weight"].abs().max() <= 18**-0.5


def test_a_model_built_on_the_meta_device_can_be_started_later() -> None:
    model = on_meta(**TINY, skip_scale="channel").to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    model.reset_parameters()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["default", "text", "gates", "channels"])
def test_saving_and_loading_keep_settings_and_numbers(name: str, tmp_path: Path) -> None:
    model = build(**VARIANTS[name])
    model.save_pretrained(tmp_path)
    loaded = UViT.from_pretrained(tmp_path)
    assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
        k: v for k, v in model.config.items() if k[0] != "_"
    }
    inputs = batch(text=name == "text")
    assert torch.equal(loaded.eval()(*inputs).sample, model(*inputs).sample)


def test_block_classes_name_the_blocks() -> None:
    names = [type(module).__name__ for module in build().modules()]
    assert [name for name in names if name in UViT.block_classes] == ["UViTBlock"] * 5


# mistakes


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"depth": 4}, "model.depth must be odd, but is 4.* Give 5"),
        ({"num_heads": 3}, "model.hidden_size is 16, which model.num_heads=3 heads do not divide"),
        ({"position_resize": "extend"}, "model.position_resize must be one of interpolate, crop"),
        ({"text_size": 6, "num_text_tokens": 0}, "model.num_text_tokens=0 must be positive"),
        ({"skip_scale": "geo"}, "model.skip_scale must be one of none, .* is 'geo'"),
        ({"skip_kappa": 0.0}, r"model.skip_kappa must lie in \(0, 1\], but is 0.0"),
        ({"skip_scale": "gate", "patch_size": 4}, "gate needs 16 tokens at least, .* has 6"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        UViT(**{**TINY, **changes})


def test_inputs_that_do_not_fit_are_refused() -> None:
    x, t, cond = batch(text=True)
    with pytest.raises(ValueError, match=r"cond.text must have shape \(3, 4, 6\), but has \(3, 3"):
        build(**{**TEXT, "num_text_tokens": 4})(x, t, cond)
    with pytest.raises(ValueError, match="UViT takes x of shape"):
        build()(x[:, :1], t, cond)
    with pytest.raises(ValueError, match=r"gate of the skips was built for 18 tokens, .* are 50"):
        build(skip_scale="gate")(*batch(height=12, width=16))
