"""DiT and SiT: published sizes, the backbone contract, and each switch against its meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor

from genscale.backbones.base import parameter_count
from genscale.backbones.dit import DiT, modulated_norm
from genscale.cli.resolvers import register_resolvers
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.layers.linear_attention import NormAwareLinearAttention
from genscale.objectives.flow import FlowMatching

CONF = Path(__file__).resolve().parents[2] / "conf"
TINY: dict[str, Any] = {
    "input_size": 8,
    "in_channels": 2,
    "num_classes": 5,
    "patch_size": 2,
    "hidden_size": 16,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 2.0,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "learned sigma": {"learn_sigma": True},
    "linear attention": {"attention": "nala"},
    "unconditional": {"num_classes": 0},
    "oblong": {"input_size": [4, 8]},
    "recomputed": {"checkpoint_blocks": True},
}


def build(seed: int = 0, **changes: Any) -> DiT:
    """A tiny model whose weights are all random, so that nothing is at its silent start."""
    torch.manual_seed(seed)
    model: DiT = DiT(**{**TINY, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def batch(size: int = 3, height: int = 8, width: int = 8) -> tuple[Tensor, Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 2, height, width, generator=generator)
    return x, torch.linspace(0, 999, size), Conditioning(labels=torch.tensor([0, 4, -1])[:size])


def on_meta(**arguments: Any) -> DiT:
    with torch.device("meta"):
        return DiT(**arguments)


# published sizes


def published(name: str, resolution: int, channels: int, num_classes: int) -> dict[str, Any]:
    """Arguments in conf/model/<name>.yaml for some data, whose pixels stand for latents."""
    register_resolvers()
    data = [f"resolution={resolution}", f"channels={channels}", f"num_classes={num_classes}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides=[f"model={name}", *(f"data.{word}" for word in data)])
    arguments: dict[str, Any] = OmegaConf.to_container(cfg.model, resolve=True)  # type: ignore
    assert arguments.pop("_target_") == "genscale.backbones.dit.DiT"
    return arguments


# parameters (exact for /2, from the same formula for the others: a patch of side p adds
# 4 (p^2 - 4) D of input and 8 (p^2 - 4) (D + 1) of output weights) and multiply-accumulates of the
# official class at latents of 32
@pytest.mark.parametrize(
    ("size", "width", "parameters", "gigamacs"),
    [
        ("s", 384, 32_865_056, (6.06, 1.41, 0.36)),
        ("b", 768, 130_315_808, (23.0, 5.57, 1.42)),
        ("l", 1024, 457_840_672, (80.7, 19.7, 5.01)),
        ("xl", 1152, 674_834_720, (118.6, 29.0, 7.39)),
    ],
)
def test_published_sizes(
    size: str, width: int, parameters: int, gigamacs: tuple[float, ...]
) -> None:
    for patch, gmac in zip((2, 4, 8), gigamacs, strict=True):
        model = on_meta(**published(f"dit_{size}_{patch}", 32, 4, 1000))
        more = 4 * (patch**2 - 4) * width + 8 * (patch**2 - 4) * (width + 1)
        assert parameter_count(model) == parameters + more
        assert model.flops() / 2e9 == pytest.approx(gmac, rel=0.01)
    assert published(f"sit_{size}_2", 32, 4, 1000) == published(f"dit_{size}_2", 32, 4, 1000)


@pytest.mark.parametrize(
    ("words", "learned"),
    [(["model=dit_xl_8"], True), (["model=dit", "objective=ddpm_dit"], False)],
)
def test_the_objective_learns_the_variance_that_the_network_predicts(
    words: list[str], learned: bool
) -> None:
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides=words)
    assert cfg.objective.time_input == "timestep"
    assert cfg.objective.learn_sigma is learned
    assert cfg.model.get("learn_sigma", False) is learned


def test_sit_is_fed_the_time_from_noise_to_data() -> None:
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        objectives = [compose("train", [f"model={name}"]).objective for name in ("sit", "sit_l_2")]
    assert objectives[0] == objectives[1]
    assert objectives[0]._target_.endswith(".FlowMatching")
    assert (objectives[0].time_input, objectives[0].time_law) == ("one_minus", "uniform")


def test_operations_at_512_pixels() -> None:
    # 524.5 GMAC at latents of 64: the official class, counted
    assert on_meta(input_size=64, learn_sigma=True).flops() / 2e9 == pytest.approx(524.5, rel=1e-3)


@pytest.mark.parametrize("name", ["dit", "sit"])
def test_the_default_models_are_small(name: str) -> None:
    model = on_meta(**published(name, 16, 1, 10))
    assert model.sample_shape == (1, 16, 16)
    assert parameter_count(model) == 978_576  # 1 M: no outside reference, pinned here


def test_linear_attention_costs_as_much_for_every_patch() -> None:
    def growth(attention: str) -> float:
        model = on_meta(**{**TINY, "attention": attention})
        return model.flops((2, 64, 64)) / model.flops((2, 32, 32))

    assert growth("nala") == pytest.approx(4, rel=0.01)  # four times the patches
    assert growth("softmax") > 8  # the part that is quadratic rules


# the contract


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_predicts_and_differentiates(name: str) -> None:
    model = build(**VARIANTS[name]).train()
    x, t, cond = batch()
    output = model(x, t, cond)
    assert output.sample.shape == x.shape
    assert ("variance" in output.aux) == (name == "learned sigma")
    output.sample.square().mean().backward()
    # every parameter takes part, or data-parallel training would wait for its gradient
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_fresh_model_predicts_zero() -> None:
    assert not DiT(**TINY, learn_sigma=True)(*batch()).sample.any()


def test_learned_variances_are_the_second_half_of_the_channels() -> None:
    model, (x, t, cond) = build(learn_sigma=True), batch()
    before = model(x, t, cond)
    with torch.no_grad():  # of the pixel's (row, column, channel), channels 2 and 3 are variances
        model.head.bias.view(2, 2, 4)[..., 2:] += 1.0
    after = model(x, t, cond)
    assert torch.equal(after.sample, before.sample)
    torch.testing.assert_close(after.aux["variance"], before.aux["variance"] + 1.0)


def test_a_model_that_learns_variances_trains_by_flow_matching_too() -> None:
    # as in SiT's released weights
    view = FlowMatching(time_input="one_minus").view(build(learn_sigma=True))
    x, _, cond = batch()
    level = view.process.level(0.5)
    assert view(x, level, cond).clean.shape == x.shape


@pytest.mark.parametrize("attention", ["softmax", "nala"])
def test_a_sample_does_not_depend_on_its_batch(attention: str) -> None:
    model, (x, t, cond) = build(attention=attention), batch()
    together = model(x, t, cond).sample
    alone = model(x[1:2], t[1:2], cond.select(torch.tensor([1]))).sample
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_classes", [5, 0])
def test_a_shared_time_equals_the_same_time_for_every_sample(num_classes: int) -> None:
    model, (x, _, cond) = build(num_classes=num_classes), batch()
    shared = model(x, torch.tensor([700.0]), cond).sample
    torch.testing.assert_close(shared, model(x, torch.full((3,), 700.0), cond).sample)
    assert not torch.allclose(shared, model(x, torch.tensor([100.0]), cond).sample)


def test_the_null_label_and_missing_labels_are_the_last_row_of_the_table() -> None:
    model, (x, t, _) = build(), batch()
    null = model(x, t, Conditioning(labels=torch.full((3,), -1))).sample
    assert torch.equal(model(x, t, Conditioning()).sample, null)
    assert not torch.allclose(model(x, t, Conditioning(labels=torch.zeros(3).long())).sample, null)
    with torch.no_grad():
        model.get_parameter("class_table.weight")[5] += 1
    assert not torch.allclose(model(x, t, Conditioning()).sample, null)


def test_an_unconditional_model_has_no_table_and_ignores_labels() -> None:
    model, (x, t, cond) = build(num_classes=0), batch()
    assert model.class_table is None
    assert torch.equal(model(x, t, cond).sample, model(x, t, Conditioning()).sample)


@pytest.mark.parametrize("attention", ["softmax", "nala"])
@pytest.mark.parametrize("resize", ["interpolate", "extend"])
def test_other_sizes_than_trained(attention: str, resize: str) -> None:
    x, t, cond = batch(height=12, width=16)
    y = build(attention=attention, position_resize=resize)(x, t, cond).sample
    assert y.shape == x.shape
    assert torch.isfinite(y).all()


def test_resized_positions_differ_on_other_grids_only() -> None:
    stretched, extended = (build(position_resize=word) for word in ("interpolate", "extend"))
    assert torch.equal(stretched(*batch()).sample, extended(*batch()).sample)
    larger = batch(height=16, width=16)
    assert not torch.allclose(stretched(*larger).sample, extended(*larger).sample)


def test_the_network_is_not_blind_to_places() -> None:
    model, (x, t, cond) = build(), batch()
    turned = model(x.transpose(2, 3), t, cond).sample.transpose(2, 3)
    assert not torch.allclose(model(x, t, cond).sample, turned, atol=1e-3)


def test_modulation_shifts_and_scales_a_layer_norm() -> None:
    x = torch.arange(12.0).view(1, 3, 4)
    shift, scale = torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([[0.0, 1, 2, 3]])
    expected = F.layer_norm(x, (4,), eps=1e-6) * torch.tensor([1.0, 2, 3, 4]) + shift
    torch.testing.assert_close(modulated_norm(x, shift, scale), expected)
    half = modulated_norm(x.bfloat16(), shift, scale)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=2**-8, atol=0)


# switches that must not change numbers


@pytest.mark.parametrize("attention", ["softmax", "nala"])
@pytest.mark.parametrize("switch", ["argument", "diffusers"])
def test_recomputed_blocks_give_the_same_gradients(switch: str, attention: str) -> None:
    grads = []
    for recompute in (False, True):
        model = build(attention=attention, checkpoint_blocks=recompute and switch == "argument")
        if recompute and switch == "diffusers":
            model.enable_gradient_checkpointing()
        assert model.gradient_checkpointing == recompute
        loss = model.train()(*batch()).sample.square().mean()
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    for kept, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(kept, recomputed)


@pytest.mark.parametrize("attention", ["softmax", "nala"])
def test_bfloat16_stays_close(attention: str) -> None:
    model, inputs = build(attention=attention), batch()
    exact = model(*inputs).sample
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(*inputs).sample
    # about ten layers, each rounding at 2^-9
    assert (rounded.float() - exact).norm() / exact.norm() < 0.03
    x, t, cond = inputs
    whole = model.to(torch.bfloat16)(x.bfloat16(), t, cond).sample
    assert whole.dtype == torch.bfloat16
    assert (whole.float() - exact).norm() / exact.norm() < 0.06


@pytest.mark.parametrize("attention", ["softmax", "nala"])
def test_the_whole_model_compiles_into_one_graph(attention: str) -> None:
    model, (x, t, cond) = build(attention=attention, depth=1), batch()

    def predict(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return model(x, t, Conditioning(labels=labels)).sample

    torch._dynamo.reset()
    compiled = torch.compile(predict, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, t, cond.labels), predict(x, t, cond.labels))


# weights


def test_initial_laws() -> None:
    torch.manual_seed(0)
    state = DiT(**{**TINY, "hidden_size": 128}).state_dict()
    bound = (6 / (128 + 3 * 128)) ** 0.5  # Xavier: uniform within sqrt(6 / (in + out))
    weight = state["blocks.0.attention.qkv.weight"]
    assert bound * 0.99 < weight.abs().max() <= bound
    assert state["patch.weight"].abs().max() <= (6 / (8 + 128)) ** 0.5
    # 0.02 within four standard errors of the 768 numbers of the class table
    for name in ("class_table.weight", "time_embed.linear_1.weight"):
        assert state[name].std().item() == pytest.approx(0.02, rel=0.11)
    for name in ("blocks.1.modulation.weight", "head_modulation.weight", "head.weight"):
        assert not state[name].any()


def test_a_model_built_on_the_meta_device_can_be_started_later() -> None:
    model = on_meta(**TINY, attention="nala").to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    model.reset_parameters()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["default", "learned sigma", "linear attention", "oblong"])
def test_saving_and_loading_keep_settings_and_numbers(name: str, tmp_path: Path) -> None:
    model = build(**VARIANTS[name])
    model.save_pretrained(tmp_path)
    loaded = DiT.from_pretrained(tmp_path)
    assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
        k: v for k, v in model.config.items() if k[0] != "_"
    }
    assert torch.equal(loaded.eval()(*batch()).sample, model(*batch()).sample)


def test_a_size_from_a_config_library_is_kept_as_a_plain_list() -> None:
    assert type(build(input_size=OmegaConf.create([4, 8])).config["input_size"]) is list
    assert build(input_size=(4, 8)).sample_shape == (2, 4, 8)


def test_block_classes_name_the_blocks() -> None:
    names = [type(module).__name__ for module in build().modules()]
    assert [name for name in names if name in DiT.block_classes] == ["DiTBlock"] * 2
    blocks = build(attention="nala").blocks
    assert all(isinstance(block.attention, NormAwareLinearAttention) for block in blocks)


# mistakes


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_size": 15}, "model.hidden_size is 15, which model.num_heads=2 heads do not"),
        ({"hidden_size": 18}, r"model.hidden_size must be a multiple of 4, .* is 18. Give 20"),
        ({"attention": "nala", "num_heads": 8}, "heads of a multiple of 4 channels, .* give 2"),
        ({"attention": "nalla"}, "model.attention must be one of .* Did you mean 'nala'"),
        ({"position_resize": "crop"}, "model.position_resize must be one of interpolate, extend"),
        ({"depth": 0}, "model.depth must be an integer of at least 1, but is 0"),
        ({"num_classes": None}, "model.num_classes must be an integer of at least 0, but is None"),
        ({"mlp_ratio": 0}, "model.mlp_ratio must be positive, but is 0"),
        ({"input_size": 9}, "model.input_size is 9 x 9, which must be a multiple of model.patch"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        DiT(**{**TINY, **changes})


@pytest.mark.parametrize(
    ("shape", "times", "labels", "sentence"),
    [
        ((3, 1, 8, 8), 3, 3, r"DiT takes x of shape \(B, 2, H, W\), but \(3, 1, 8, 8\)"),
        ((3, 2, 9, 8), 3, 3, "must be multiples of 2, the patch, but x is 9 x 8"),
        ((3, 2, 8, 8), 2, 3, r"t must have shape \(3,\), or \(1,\) when shared, but has \(2,\)"),
        ((3, 2, 8, 8), 3, 2, r"cond.labels must have shape \(3,\), but has \(2,\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    shape: tuple[int, ...], times: int, labels: int, sentence: str
) -> None:
    cond = Conditioning(labels=torch.zeros(labels, dtype=torch.int64))
    with pytest.raises(ValueError, match=sentence):
        build()(torch.zeros(shape), torch.zeros(times), cond)
