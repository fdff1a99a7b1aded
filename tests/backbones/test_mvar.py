"""M-VAR: published sizes, its memory, and what is its own beside what scale-wise networks share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from genscale.backbones.base import parameter_count
from genscale.backbones.dit import modulated_norm
from genscale.backbones.mvar import MVAR, MVARBlock
from genscale.cli.resolvers import register_resolvers
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.objectives.memory import map_tensors

CONF = Path(__file__).resolve().parents[2] / "conf"
TINY: dict[str, Any] = {
    **{"scales": [1, 2, 3], "latent_channels": 3, "vocab_size": 7, "num_classes": 5},
    **{"hidden_size": 16, "depth": 2, "num_heads": 2, "state_size": 4, "scan_head_size": 8},
}


def published(name: str) -> MVAR:
    """The network of conf/model/<name>.yaml for ImageNet, on the meta device."""
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides=[f"model={name}", "data.num_classes=1000"])
    arguments: dict[str, Any] = OmegaConf.to_container(cfg.model, resolve=True)  # type: ignore
    assert arguments.pop("_target_") == "genscale.backbones.mvar.MVAR"
    with torch.device("meta"):
        return MVAR(**arguments)


# counted from the official class; the released d16 and d20 lack the heads' factors, of which the
# counts have 0.0003 M
@pytest.mark.parametrize(
    ("depth", "parameters"),
    [(12, 198.4), (16, 464.2), (20, 900.5), (24, 1550.1), (30, 3017.1), (32, 3658.7)],
)
def test_published_sizes(depth: int, parameters: float) -> None:
    model = published(f"mvar_d{depth}")
    assert parameter_count(model) / 1e6 == pytest.approx(parameters, abs=0.05)
    block = model.blocks[0]
    assert (model.hidden_size, len(model.blocks)) == (64 * depth, depth)
    assert (block.attention.num_heads, block.scan.num_heads) == (depth, 2 * depth)
    assert (block.attention.log_factor is None) == (depth in (16, 20))


def test_operations_of_attention_are_those_inside_scales() -> None:
    model = published("mvar_d12")
    # sum of p^4 over the scales; a block has 4 D^2 in attention, 8 D^2 in the feed-forward layer,
    # and (4 D + 2 * 64 + 24) D + 2 D^2 in the scan's projections
    squares, tokens, width, depth = 110_468, 680, 768, 12
    linear = 2 * tokens * depth * ((4 + 8 + 2) * width**2 + (4 * width + 2 * 64 + 24) * width)
    attention = 2 * 2 * squares * width * depth
    head = 2 * tokens * width * (4096 + 32)
    modulation = 2 * (9 * depth + 2) * width**2
    scan = model.flops() - linear - attention - head - modulation
    assert 0 < scan < 0.03 * model.flops()


@pytest.mark.parametrize(("fixed", "third"), [(True, 1e-3), (False, 0.5)])
def test_gates_start_small(fixed: bool, third: float) -> None:
    """The official program leaves the feed-forward layer's gate out."""
    torch.manual_seed(0)
    model = MVAR(**{**TINY, "hidden_size": 64}, init_gate=1e-3, fix_gate_init=fixed)
    rows = model.blocks[1].modulation.weight.unflatten(0, (9, 64)).flatten(1)
    factors = torch.tensor([1e-3, 1e-3, third, *[0.5] * 6])
    torch.testing.assert_close(rows.std(dim=1), (1 / 192) ** 0.5 * factors, rtol=0.07, atol=0)


def test_the_scan_starts_as_its_own_layer_does() -> None:
    torch.manual_seed(0)
    scan = MVAR(**{**TINY, "hidden_size": 64}).blocks[0].scan
    assert scan.conv.weight.std().item() == pytest.approx(0.02, rel=0.15)
    assert not scan.conv.bias.any()
    # not divided by the depth, as other layers that write to the stream are
    assert scan.out_proj.weight.std().item() == pytest.approx((1 / 192) ** 0.5, rel=0.06)
    assert scan.log_rate.min() >= 0
    assert scan.log_rate.max() <= torch.log(torch.tensor(16.0))
    steps = torch.nn.functional.softplus(scan.step_bias)
    assert steps.min() > 0.9e-3
    assert steps.max() < 0.11
    assert torch.equal(scan.skip, torch.ones(16))
    assert torch.equal(scan.norm_scale, torch.ones(128))


def test_a_block_written_out() -> None:
    torch.manual_seed(0)
    block = MVARBlock(
        8, 2, 16, state_size=4, scan_head_size=8, l2_norm=True, drop_path=0.0, eps=1e-6
    )
    for name, parameter in block.named_parameters():
        if "scan" not in name:
            torch.nn.init.normal_(parameter, std=0.5)
    x, c, spans = torch.randn(2, 5, 8), torch.randn(2, 8), [(0, 1), (1, 5)]
    vectors = block.modulation(c).view(2, 9, 8).unbind(1)
    y = x
    layers = (lambda z: block.attention(z, spans), lambda z: block.scan(z)[0], block.mlp)
    for layer, gate, scale, shift in zip(
        layers, vectors[:3], vectors[3:6], vectors[6:], strict=True
    ):
        y = y + gate[:, None] * layer(modulated_norm(y, shift, scale))
    torch.testing.assert_close(block(x, c, spans), y)


def test_without_scans_no_scale_sees_another() -> None:
    torch.manual_seed(0)
    model = MVAR(**TINY).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.scan.out_proj.weight.zero_()
    features = torch.randn(2, 14, 3)
    whole = model(features, Conditioning()).logits
    changed = features.clone()
    changed[:, 1:5] += 1
    moved = (model(changed, Conditioning()).logits - whole).abs().amax(dim=(0, 2)) > 0
    assert moved.tolist() == [False] + [True] * 4 + [False] * 9


def test_memory_does_not_grow_with_the_scales() -> None:
    """2 n 64 x 64 numbers and 3 (128 n + 128) a layer, whatever the number of tokens."""
    sizes = []
    for scales in ([1, 2], [1, 2, 16]):
        with torch.device("meta"):
            model = MVAR(scales=scales, hidden_size=128, depth=1, num_heads=2)
        memory = model.begin(Conditioning(), 1, torch.device("meta"))
        del memory["scales_done"]
        count = [0]
        map_tensors(memory, lambda part: count.append(part.numel()))  # noqa: B023
        sizes.append(sum(count))
    given = (1 + 9 + 2) * 128  # what the condition gives
    assert sizes == [given + 4 * 64 * 64 + 3 * (2 * 128 + 2 * 64)] * 2


def test_the_tail_holds_no_more_than_itself() -> None:
    torch.manual_seed(0)
    model = MVAR(**TINY).eval()
    features = torch.randn(1, 14, 3)
    memory = model.begin(Conditioning(), 1, features.device)
    with torch.no_grad():
        for scale, (start, end) in enumerate(model.embed.spans):
            one = range(scale, scale + 1)
            memory = model(features[:, start:end], Conditioning(), one, memory).memory
    for tail in memory["tails"]:
        assert tail.untyped_storage().nbytes() == tail.numel() * tail.element_size()


def test_block_classes_name_the_blocks() -> None:
    names = [type(module).__name__ for module in published("mvar_d12").modules()]
    assert [name for name in names if name in MVAR.block_classes] == ["MVARBlock"] * 12
    assert MVAR.needs_prefix


def test_heads_of_the_scan_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.scan_head_size=5 must divide twice model.hidden"):
        MVAR(**{**TINY, "scan_head_size": 5})
    with pytest.raises(ConfigError, match=r"model\.state_size must be an integer of at least 1"):
        MVAR(**{**TINY, "state_size": 0})
