"""LaMamba: published sizes, the backbone contract, windows, other grids, the converter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from genscale.backbones.base import parameter_count
from genscale.backbones.lamamba import Downsample, LaMamba, LaMambaBlock, Stage, Upsample
from genscale.backbones.lamamba_settings import Layout, StageSettings, resolve_layout
from genscale.conditioning.base import Conditioning
from genscale.errors import CheckpointError, ConfigError
from genscale.flops import count_flops
from genscale.io.converters.lamamba import (
    config_from_official,
    config_from_state_dict,
    from_official,
    official_name,
    to_official,
)
from genscale.layers.window_attention import (
    WindowAttention,
    join_windows,
    relative_index,
    split_windows,
    window_mask,
)

TINY: dict[str, Any] = {
    "input_size": 8,
    "in_channels": 2,
    "num_classes": 5,
    "hidden_sizes": [8, 16, 32, 32],
    "depths": [2, 1, 1, 0],
    "bottleneck_depth": 1,
    "num_heads": 2,
    "window_size": 4,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "cross scan, four states": {"scan": "cross", "state_size": 4, "conv_bias": True},
    "strided convolutions": {"downsample": "conv2"},
    "overlapping convolutions": {"downsample": "conv3"},
    "patches of two": {"patch_size": 2},
    "variance": {"learn_sigma": True},
    "unconditional": {"num_classes": 0},
    "narrow modulation": {"modulation_rank": 3},
    "no norm after patches": {"patch_norm": False},
    "own decoder": {"decoder_depths": [1, 1, 1, 1], "step_rank": 2, "kernel_size": 5},
}


def build(seed: int = 0, **changes: Any) -> LaMamba:
    """A tiny model whose weights are all random, so that nothing is at its neutral start."""
    torch.manual_seed(seed)
    model = LaMamba(**{**TINY, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def sample(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch(size: int = 3, side: int = 8) -> tuple[Tensor, Tensor, Conditioning]:
    labels = torch.tensor([0, 4, -1, 2])[:size]
    return sample(size, 2, side, side), torch.linspace(0, 999, size), Conditioning(labels=labels)


def on_meta(**arguments: Any) -> LaMamba:
    with torch.device("meta"):
        return LaMamba(**arguments)


# published sizes


def published(name: str, latent_size: int) -> dict[str, Any]:
    """Arguments in conf/model/<name>.yaml for ImageNet latents, without composing a whole run."""
    folder = Path(__file__).parents[2] / "conf" / "model"

    def load(file: str) -> DictConfig:
        config = OmegaConf.load(folder / f"{file}.yaml")
        assert isinstance(config, DictConfig)
        bases = [entry for entry in config.pop("defaults") if isinstance(entry, str)]
        merged = OmegaConf.merge(*[load(base) for base in bases if base != "_self_"], config)
        assert isinstance(merged, DictConfig)
        return merged

    arguments: dict[str, Any] = OmegaConf.to_container(load(name), resolve=False)  # type: ignore
    assert arguments.pop("_target_") == "genscale.backbones.lamamba.LaMamba"
    return arguments | {"input_size": latent_size, "in_channels": 4, "num_classes": 1000}


# XL: parameters and multiply-accumulates of the official class, built without weights; the other
# widths are ours, and so are their numbers. The scan itself, 0.6 % of XL, is not counted.
@pytest.mark.parametrize(
    ("name", "latent_size", "parameters", "gigamacs"),
    [
        ("lamamba_xl", 32, 652_484_648, 45.6),
        ("lamamba_xl", 64, 653_467_688, 181.6),
        ("lamamba_l", 32, 471_914_072, 33.0),
        ("lamamba_b", 32, 133_107_416, 9.4),
        ("lamamba_s", 32, 33_715_952, 2.4),
    ],
)
def test_published_sizes(name: str, latent_size: int, parameters: int, gigamacs: float) -> None:
    model = on_meta(**published(name, latent_size))
    assert parameter_count(model) == parameters
    flops = count_flops(model, (4, latent_size, latent_size))
    assert flops / 2e9 == pytest.approx(gigamacs, abs=0.05)


def test_constructor_defaults_are_the_published_model() -> None:
    assert parameter_count(on_meta(learn_sigma=True)) == 652_484_648


# the contract


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_predicts_and_differentiates(name: str) -> None:
    model = build(**VARIANTS[name]).train()
    x, t, cond = batch()
    output = model(x, t, cond)
    assert output.sample.shape == x.shape
    loss = output.sample.square().mean()
    if name == "variance":
        assert output.aux["variance"].shape == x.shape
        loss = loss + output.aux["variance"].square().mean()
    else:
        assert output.aux == {}
    loss.backward()
    # every parameter takes part, or data-parallel training would wait for its gradient
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    model, (x, t, cond) = build(), batch()
    together = model(x, t, cond).sample
    alone = model(x[1:2], t[1:2], cond.select(torch.tensor([1]))).sample
    torch.testing.assert_close(together[1:2], alone, rtol=1e-5, atol=1e-5)


def test_a_shared_time_equals_the_same_time_for_every_sample() -> None:
    model, (x, _, cond) = build(), batch()
    for condition in (cond, Conditioning()):
        shared = model(x, torch.tensor([150.0]), condition).sample
        each = model(x, torch.full((3,), 150.0), condition).sample
        torch.testing.assert_close(shared, each, rtol=1e-5, atol=1e-5)


def test_time_and_class_change_the_prediction() -> None:
    model, (x, t, cond) = build(), batch()
    base = model(x, t, cond).sample
    assert not torch.allclose(model(x, t + 100, cond).sample, base)
    others = Conditioning(labels=torch.tensor([1, 3, -1]))
    changed = (model(x, t, others).sample - base).abs().amax((1, 2, 3)) > 1e-4
    assert changed.tolist() == [True, True, False]


def test_the_null_label_and_missing_labels_are_the_last_row_of_the_table() -> None:
    model, (x, t, _) = build(), batch()
    null = model(x, t, Conditioning(labels=torch.full((3,), -1))).sample
    torch.testing.assert_close(model(x, t, Conditioning()).sample, null, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        model.class_table.weight[5] += 1
    assert not torch.allclose(model(x, t, Conditioning()).sample, null)


def test_an_unconditional_model_ignores_labels() -> None:
    model, (x, t, cond) = build(num_classes=0), batch()
    assert model.class_table.weight.shape == (1, 32)
    assert torch.equal(model(x, t, cond).sample, model(x, t, Conditioning()).sample)


@pytest.mark.parametrize("downsample", ["merge", "conv2", "conv3"])
@pytest.mark.parametrize("size", [(12, 16), (7, 9), (5, 2), (1, 1)])
def test_other_sizes_than_trained_odd_and_oblong(downsample: str, size: tuple[int, int]) -> None:
    model = build(downsample=downsample)
    x = sample(1, 2, *size).requires_grad_()
    y = model(x, torch.zeros(1), Conditioning()).sample
    assert y.shape == x.shape
    (grad,) = torch.autograd.grad(y[..., 0, 0].sum(), x)
    assert bool((grad.abs().amax(1) > 0).all())  # a corner sees the whole picture


def test_an_oblong_trained_size_of_patches() -> None:
    model = build(input_size=[8, 12], patch_size=2)
    assert model.sample_shape == (2, 8, 12)
    assert model.position.table.shape == (4 * 6, 8)


def test_recomputed_blocks_give_the_same_gradients() -> None:
    grads = []
    for stages in ([], [0, 3]):
        model = build(checkpoint_stages=stages).train()
        assert [stage.gradient_checkpointing for stage in model.encoder] == [
            i in stages for i in range(4)
        ]
        loss = model(*batch()).sample.square().mean()
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    for kept, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(kept, recomputed)


def test_diffusers_switches_recomputation_on_everywhere() -> None:
    model = build()
    model.enable_gradient_checkpointing()
    stages = [module for module in model.modules() if isinstance(module, Stage)]
    assert len(stages) == 9  # four down, the middle, four up
    assert all(stage.gradient_checkpointing for stage in stages)


def test_bfloat16_autocast_stays_close() -> None:
    model, inputs = build(), batch()
    exact = model(*inputs).sample
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(*inputs).sample
    # about forty layers, each rounding at 2^-9
    assert (rounded.float() - exact).norm() / exact.norm() < 0.05


@pytest.mark.filterwarnings("ignore:Dynamo detected a call")  # tables become part of the graph
def test_blocks_compile_without_graph_breaks() -> None:
    model, inputs = build(), batch()
    expected = model(*inputs).sample
    torch._dynamo.reset()
    for block in model.encoder[0].blocks:  # whole and shifted windows
        block.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(model(*inputs).sample, expected)


# parts


def test_windows_are_cut_and_joined() -> None:
    x = sample(2, 4, 6, 3)
    windows = split_windows(x, (2, 3))
    assert windows.shape == (2, 4, 6, 3)
    assert torch.equal(windows[1, 1], x[1, 0:2, 3:6].flatten(0, 1))
    assert torch.equal(join_windows(windows, (2, 3), 4), x)


def test_relative_positions_index_the_table_of_the_largest_window() -> None:
    cells, index = relative_index(3, 1, 2, torch.device("cpu"))
    assert cells == 2
    # (2 w - 1)^2 = 25 rows, the middle one, 12, for no offset; a key to the right comes before it
    assert index.view(2, 2).tolist() == [[12, 11], [13, 12]]


def test_masks_are_made_only_where_cells_must_be_kept_apart() -> None:
    cpu = torch.device("cpu")
    assert window_mask((4, 4), (2, 2), (0, 0), cpu) is None
    mask = window_mask((1, 3), (1, 2), (0, 0), cpu)  # the second window holds one real cell
    assert mask is not None
    kept_apart = (mask == -torch.inf).tolist()
    assert kept_apart == [[[False, False], [False, False]], [[False, True], [True, False]]]


def reach(module: WindowAttention, height: int, width: int, row: int, column: int) -> list[str]:
    """Draw which cells a cell's output depends on."""
    x = sample(1, height, width, 8).requires_grad_()
    (grad,) = torch.autograd.grad(module(x)[0, row, column].sum(), x)
    seen = grad[0].abs().amax(-1) > 0
    return ["".join("#" if cell else "." for cell in line) for line in seen.tolist()]


def test_attention_stays_in_its_window() -> None:
    torch.manual_seed(0)
    plain, shifted = (WindowAttention(8, 2, 2, shifted=s) for s in (False, True))
    assert reach(plain, 4, 4, 1, 1) == ["##..", "##..", "....", "...."]
    assert reach(shifted, 4, 4, 1, 1) == ["....", ".##.", ".##.", "...."]
    # a corner is rolled beside the three others, which it must not see
    assert reach(shifted, 4, 4, 0, 0) == ["#...", "....", "....", "...."]
    # sides that are no multiple: the last window is cut off
    assert reach(plain, 3, 5, 2, 4) == [".....", ".....", "....#"]
    assert reach(shifted, 3, 5, 2, 4) == [".....", "...##", "...##"]
    # a window as large as the grid is not shifted
    assert reach(WindowAttention(8, 2, 4, shifted=True), 3, 4, 0, 0) == ["####"] * 3


def test_attention_knows_relative_positions() -> None:
    """One pair of logits by hand: queries and keys silent, the bias alone decides."""
    module = WindowAttention(2, 1, 2)
    with torch.no_grad():
        module.qkv.weight.zero_()
        module.qkv.weight[4:].copy_(torch.eye(2))  # values are the inputs
        module.qkv.bias.zero_()
        module.out.weight.copy_(torch.eye(2))
        module.out.bias.zero_()
        module.bias_table.fill_(-1e4)
        # row (down + 1) * 3 + right + 1 is a query that lies below and right of its key by these
        module.bias_table[(1 + 1) * 3 + (0 + 1)] = 0.0
    x = sample(1, 2, 2, 2)
    y = module(x)
    torch.testing.assert_close(y[0, 1], x[0, 0])  # the lower row reads the cell above
    torch.testing.assert_close(y[0, 0], x.mean((1, 2)).expand(2, 2))  # the upper finds nothing


def test_merging_orders_neighbours_columns_last() -> None:
    layer = Downsample(1, 4, "merge")
    with torch.no_grad():
        layer.reduce.weight.copy_(torch.eye(4))
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[None, :, :, None]
    # (even row, even column), (odd, even), (even, odd), (odd, odd)
    assert layer(x).flatten().argsort().tolist() == [0, 2, 1, 3]
    assert layer(sample(1, 5, 3, 1)).shape == (1, 3, 2, 4)


def test_expanding_orders_cells_row_column_channel() -> None:
    layer = Upsample(4, 2, 2)
    with torch.no_grad():
        layer.expand.weight.copy_(torch.arange(8.0)[:, None] * torch.tensor([1.0, 0, 0, 0]))
        layer.norm.weight.fill_(1.0)
    layer.norm = torch.nn.Identity()  # type: ignore[assignment]
    y = layer(torch.ones(1, 1, 1, 4))
    assert y[0].tolist() == [[[0.0, 1.0], [2.0, 3.0]], [[4.0, 5.0], [6.0, 7.0]]]


def test_settings_are_resolved_stage_by_stage() -> None:
    layout = resolve_layout(on_meta(**TINY, patch_size=2).config)
    assert isinstance(layout, Layout)
    assert layout.grid == (4, 4)
    assert layout.decoder_depths == [0, 2, 2, 3]  # one more each, none where there is none
    assert all(isinstance(stage, StageSettings) for stage in layout.stages)
    # windows are no larger than the grids of 4, 2, 1 and 1
    assert [stage.window_size for stage in layout.stages] == [4, 2, 1, 1]


# weights


def test_a_fresh_model_predicts_zero_and_its_blocks_are_the_identity() -> None:
    torch.manual_seed(0)
    model, (x, t, cond) = LaMamba(**TINY), batch()
    assert not model(x, t, cond).sample.any()
    assert LaMamba(**TINY, zero_init_head=False)(x, t, cond).sample.abs().max() > 0.1
    block, grid = model.encoder[0].blocks[1], sample(1, 4, 4, 8)
    assert torch.equal(block(grid, sample(1, 32)), grid)


def test_positions_start_as_sines_of_columns_then_rows() -> None:
    table = LaMamba(**TINY).position.table.view(8, 8, 8)
    # d = 8: two frequencies an axis, 1 and 1 / 100; [sin, cos] of columns, then of rows
    place = torch.tensor([5.0, 0.05, 3.0, 0.03])
    expected = torch.cat((place[:2].sin(), place[:2].cos(), place[2:].sin(), place[2:].cos()))
    torch.testing.assert_close(table[3, 5].detach(), expected)


def test_initialisation_is_a_function_of_torchs_seed() -> None:
    states = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        states.append(LaMamba(**TINY).state_dict())
    name = "encoder.0.blocks.0.scan.step_bias"
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0][name], states[2][name])
    # Xavier: uniform within sqrt(6 / (in + out))
    weight = states[0]["encoder.0.blocks.0.attention.qkv.weight"]
    assert weight.abs().max().item() == pytest.approx((6 / (8 + 24)) ** 0.5, rel=0.05)


def test_a_model_built_on_the_meta_device_can_be_started_later() -> None:
    model = on_meta(**TINY).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    model.reset_parameters()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_decay_spares_rates_tables_norms_and_biases() -> None:
    model = build()
    spared = model.no_weight_decay()
    assert spared <= set(dict(model.named_parameters()))
    block = "encoder.0.blocks.0."
    for name in ("scan.log_rate", "scan.skip", "scan.step_bias", "attention.bias_table",
                 "mlp_norm.weight", "attention.qkv.bias"):  # fmt: skip
        assert block + name in spared
    assert {"position.table", "class_table.weight"} <= spared
    assert block + "scan.step_weight" not in spared
    assert block + "attention.qkv.weight" not in spared


@pytest.mark.parametrize("name", ["default", "cross scan, four states", "own decoder"])
def test_saving_and_loading_keep_settings_and_numbers(name: str, tmp_path: Path) -> None:
    model = build(**VARIANTS[name])
    model.save_pretrained(tmp_path)
    loaded = LaMamba.from_pretrained(tmp_path)
    assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
        k: v for k, v in model.config.items() if k[0] != "_"
    }
    assert torch.equal(loaded.eval()(*batch()).sample, model(*batch()).sample)


def test_block_classes_name_the_blocks() -> None:
    model = build()
    blocks = [module for module in model.modules() if isinstance(module, LaMambaBlock)]
    assert LaMamba.block_classes == (LaMambaBlock.__name__,)
    # encoder 2 + 1 + 1 + 0, middle 1, decoder 0 + 2 + 2 + 3
    assert len(blocks) == 12


# the converter


@pytest.mark.parametrize("name", ["default", "cross scan, four states", "overlapping convolutions"])
def test_conversion_is_undone_by_its_inverse(name: str) -> None:
    model = build(**VARIANTS[name])
    official = to_official(model.state_dict(), model.config)
    assert official["pos_embed"].shape == (1, 8, 8, 8)
    official["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16)  # left out
    back = from_official(official, model)
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[key], value) for key, value in model.state_dict().items())


def test_a_state_dict_tells_the_settings() -> None:
    for name, changes in VARIANTS.items():
        if name == "narrow modulation":
            continue  # has no official layout
        model = build(**changes)
        official = to_official(model.state_dict(), model.config)
        found = config_from_state_dict(official)
        if model.config["scan"] == "cross":
            found["scan"] = "cross"  # leaves no trace
        with torch.device("meta"):
            twin: LaMamba = LaMamba(**found)
        back = from_official(official, twin)
        assert all(torch.equal(back[key], value) for key, value in model.state_dict().items())
        twin.load_state_dict(back, assign=True)
        assert torch.equal(twin.eval()(*batch()).sample, model(*batch()).sample), name
    with pytest.raises(CheckpointError, match=r"no official LaMamba .*'patch_embed.proj.weight'"):
        config_from_state_dict({"a": torch.zeros(1)})


def test_conversion_refuses_other_models() -> None:
    model = build()
    official = to_official(model.state_dict(), model.config)
    with pytest.raises(CheckpointError, match=r"0 missing, 1 unexpected keys .*\(first: extra\)"):
        from_official(official | {"extra": torch.zeros(1)}, model)
    with pytest.raises(
        CheckpointError, match=r"final_linear.weight is \(2, 8\), expected \(4, 8\)"
    ):
        from_official(official, build(learn_sigma=True))
    with pytest.raises(CheckpointError, match="1 missing, 0 unexpected"):
        to_official({k: v for k, v in model.state_dict().items() if k != "head.bias"}, model.config)
    with pytest.raises(CheckpointError, match="modulation_rank=3"):
        from_official(official, build(modulation_rank=3))
    with pytest.raises(CheckpointError, match="'tail' has no counterpart"):
        official_name("tail")


OFFICIAL: dict[str, Any] = {
    "patch_size": 2,
    "in_chans": 4,
    "num_classes": 7,
    "depths": [2, 2, 1, 0],
    "dims": [8, 16, 32, 32],
    "bottleneck_depth": 1,
    "in_resolution": 16,
    "num_heads": [2, 2, 4, 4],
    "window_size": 4,
    "continuous_scan": True,
    "ssm_d_state": 1,
    "ssm_ratio": 2.0,
    "ssm_dt_rank": "auto",
    "ssm_conv": 3,
    "ssm_conv_bias": False,
    "mlp_ratio": 4.0,
}


def test_official_settings_are_translated() -> None:
    settings = config_from_official(OFFICIAL)
    assert settings["input_size"] == 32  # the official resolution is that of the grid
    assert settings["decoder_depths"] == [0, 2, 3, 3]
    assert settings["num_classes"] == 7
    plain = config_from_official(OFFICIAL | {"sd_unet_decoder_design": False,
                                             "unconditional": True})  # fmt: skip
    assert plain["decoder_depths"] == [0, 1, 2, 2]
    assert plain["num_classes"] == 0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dmis": 3}, r"hold \['dmis'\], which LaMamba does not know"),
        ({"skip_concat": True}, "skip_concat=True has no counterpart"),
        ({"downsample_version": "v9"}, "must be one of v1, v2, v3, but is 'v9'"),
    ],
)
def test_official_settings_without_counterpart_are_refused(
    changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        config_from_official(OFFICIAL | changes)


# mistakes


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"depths": [1, 1, 1]}, "model.depths has 3 entries but there are 4 stages"),
        ({"depths": [1, -1, 1, 1]}, r"model.depths must not be negative, but is \[1, -1, 1, 1\]"),
        ({"hidden_sizes": [8, 16, 32, 64]}, r"double twice and then stay.*Give \[8, 16, 32, 32\]"),
        (
            {"hidden_sizes": [6, 12, 24, 24]},
            r"sizes\[0\] is 6, which must be a multiple of 4",
        ),
        ({"num_heads": 3}, r"hidden_sizes\[0\] is 8, which 3 heads do not divide"),
        ({"input_size": 9, "patch_size": 2}, "model.input_size is 9 x 9, which must be a multiple"),
        ({"scan": "contiguous"}, "model.scan must be one of .* Did you mean 'continuous'"),
        ({"downsample": "v1"}, "model.downsample must be one of merge, conv2, conv3"),
        ({"kernel_size": 4}, "model.kernel_size must be odd, but is 4. Give 3 or 5"),
        ({"window_size": 0}, "model.window_size must be an integer of at least 1, but is 0"),
        ({"modulation_rank": 0}, "model.modulation_rank must be at least 1, or null, but is 0"),
        ({"mlp_ratio": 0}, "model.mlp_ratio must be positive, but is 0"),
        ({"checkpoint_stages": [4]}, "checkpoint_stages holds 4 but the stages are 0 to 3"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        LaMamba(**{**TINY, **changes})


@pytest.mark.parametrize(
    ("x", "t", "labels", "sentence"),
    [
        ((1, 3, 8, 8), (1,), None, r"takes x of shape \(B, 2, H, W\), but \(1, 3, 8, 8\)"),
        ((1, 2, 8, 7), (1,), None, "multiples of 2, the patch, but x is 8 x 7"),
        ((3, 2, 8, 8), (2,), None, r"t must have shape \(3,\), or \(1,\) when shared"),
        ((3, 2, 8, 8), (3,), (1,), r"cond.labels must have shape \(3,\), but has \(1,\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    x: tuple[int, ...], t: tuple[int, ...], labels: tuple[int, ...] | None, sentence: str
) -> None:
    cond = Conditioning(labels=None if labels is None else torch.zeros(labels).long())
    with pytest.raises(ValueError, match=sentence):
        build(patch_size=2)(torch.zeros(x), torch.zeros(t), cond)
