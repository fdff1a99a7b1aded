"""VAR: published sizes, its cache, and what is its own beside what scale-wise networks share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from genscale.backbones.base import parameter_count
from genscale.backbones.dit import modulated_norm
from genscale.backbones.var import VAR, VARBlock
from genscale.cli.resolvers import register_resolvers
from genscale.conditioning.base import Conditioning

CONF = Path(__file__).resolve().parents[2] / "conf"
SCALES_512 = [1, 2, 3, 4, 6, 9, 13, 18, 24, 32]


def published(name: str, *words: str) -> VAR:
    """The network of conf/model/<name>.yaml for ImageNet, on the meta device."""
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides=[f"model={name}", "data.num_classes=1000", *words])
    arguments: dict[str, Any] = OmegaConf.to_container(cfg.model, resolve=True)  # type: ignore
    assert arguments.pop("_target_") == "genscale.backbones.var.VAR"
    with torch.device("meta"):
        return VAR(**arguments)


# the paper's table
@pytest.mark.parametrize(
    ("depth", "parameters"),
    [(16, 310.3), (20, 600.9), (24, 1033.4), (30, 2010.0), (36, 2353.9)],
)
def test_published_sizes(depth: int, parameters: float) -> None:
    words = [f"autoencoder.scales={SCALES_512}".replace(" ", "")] if depth == 36 else []
    model = published(f"var_d{depth}", *words)
    assert parameter_count(model) / 1e6 == pytest.approx(parameters, abs=0.05)
    assert (model.hidden_size, len(model.blocks), model.num_heads) == (64 * depth, depth, depth)


def test_operations_are_those_of_the_table() -> None:
    """d16: 274 G in the blocks' linear layers and 19 G in attention, at 2 a multiply-add."""
    model = published("var_d16")
    tokens, width = 680, 1024
    head, word = 2 * tokens * width * 4096, 2 * tokens * width * 32
    modulation = 2 * (6 * 16 + 2) * width**2
    blocks = model.flops() - head - word - modulation
    assert blocks / 1e9 == pytest.approx(274 + 19, abs=1)


def test_the_small_one_follows_the_tokenizer() -> None:
    register_resolvers()
    words = ["model=var", "autoencoder.scales=[1,3]", "autoencoder.vocab_size=9"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides=words)
    assert (cfg.model.scales, cfg.model.vocab_size, cfg.model.latent_channels) == ([1, 3], 9, 8)


def test_gates_start_small() -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"hidden_size": 64, "depth": 2, "num_heads": 2, "init_gate": 1e-3}
    std = (1 / (3 * 64)) ** 0.5
    rows = VAR(**settings).blocks[1].modulation.weight.unflatten(0, (6, 64))
    deviations = rows.flatten(1).std(dim=1)
    expected = std * torch.tensor([1e-3, 1e-3, 0.5, 0.5, 0.5, 0.5])
    torch.testing.assert_close(deviations, expected, rtol=0.07, atol=0)
    shared = VAR(**settings, shared_adaln=True)
    # 64 numbers a row: within four standard errors
    deviations = shared.blocks[1].offsets.std(dim=1) * 64**0.5
    torch.testing.assert_close(deviations, expected / std, rtol=0.36, atol=0)
    assert shared.shared_modulation is not None
    assert shared.shared_modulation.weight.std().item() == pytest.approx(std, rel=0.05)


def test_a_block_written_out() -> None:
    torch.manual_seed(0)
    block = VARBlock(
        8, 2, 16, l2_norm=True, shared_adaln=False, drop_path=0.0, eps=1e-6
    )  # fmt: skip
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x, c, spans = torch.randn(2, 5, 8), torch.randn(2, 8), [(0, 1), (1, 5)]
    assert block.modulation is not None
    g1, g2, s1, s2, b1, b2 = block.modulation(c).view(2, 6, 8).unbind(1)
    y = x + g1[:, None] * block.attention(modulated_norm(x, b1, s1), spans)
    y = y + g2[:, None] * block.mlp(modulated_norm(y, b2, s2))
    torch.testing.assert_close(block(x, c, spans), y)


def test_shared_modulation_is_one_layer_plus_offsets() -> None:
    """A shared model equals one whose blocks have the same layer with their offsets as bias."""
    settings: dict[str, Any] = {
        **{"scales": [1, 2], "latent_channels": 3, "vocab_size": 7, "num_classes": 5},
        **{"hidden_size": 16, "depth": 2, "num_heads": 2},
    }
    torch.manual_seed(0)
    shared, own = VAR(**settings, shared_adaln=True).eval(), VAR(**settings).eval()
    state = shared.state_dict()
    weight, bias = (state.pop(f"shared_modulation.{part}") for part in ("weight", "bias"))
    for i in range(2):
        state[f"blocks.{i}.modulation.weight"] = weight
        state[f"blocks.{i}.modulation.bias"] = bias + state.pop(f"blocks.{i}.offsets").flatten()
    own.load_state_dict(state)
    inputs = torch.randn(2, 5, 3), Conditioning(labels=torch.tensor([1, -1]))
    torch.testing.assert_close(shared(*inputs).logits, own(*inputs).logits)


def test_keys_and_values_lie_in_buffers_that_stay() -> None:
    torch.manual_seed(0)
    model = VAR(
        scales=[1, 2], latent_channels=3, vocab_size=7, num_classes=5,
        hidden_size=16, depth=2, num_heads=2,
    ).eval()  # fmt: skip
    features, cond = torch.randn(3, 5, 3), Conditioning(labels=torch.tensor([0, 1, 2]))
    memory = model.begin(cond, 3, features.device)
    assert [part.shape for part in memory["modulation"]] == [(3, 6, 16)] * 2
    buffers = [*memory["cache"]["keys"], *memory["cache"]["values"]]
    assert [part.shape for part in buffers] == [(3, 2, 5, 8)] * 4
    with torch.no_grad():
        for scale, (start, end) in enumerate(model.embed.spans):
            memory = model(features[:, start:end], cond, range(scale, scale + 1), memory).memory
    after = [*memory["cache"]["keys"], *memory["cache"]["values"]]
    assert [part.data_ptr() for part in after] == [part.data_ptr() for part in buffers]
    assert all(part.abs().amax(dim=(1, 3)).min() > 0 for part in after)  # every token is there


def test_nothing_of_the_condition_is_computed_after_begin() -> None:
    torch.manual_seed(0)
    model = VAR(
        scales=[1, 2], latent_channels=3, vocab_size=7, num_classes=5,
        hidden_size=16, depth=2, num_heads=2,
    ).eval()  # fmt: skip
    features, cond = torch.randn(3, 5, 3), Conditioning(labels=torch.tensor([0, 1, 2]))
    memory = model.begin(cond, 3, features.device)
    whole = model(features, cond).logits
    with torch.no_grad():
        for layer in (
            model.class_table,
            model.head.modulation,
            *(b.modulation for b in model.blocks),
        ):
            layer.weight.fill_(float("nan"))
        for scale, (start, end) in enumerate(model.embed.spans):
            out = model(features[:, start:end], cond, range(scale, scale + 1), memory)
            memory = out.memory
            torch.testing.assert_close(out.logits, whole[:, start:end])


def test_block_classes_name_the_blocks() -> None:
    names = [type(module).__name__ for module in published("var_d16").modules()]
    assert [name for name in names if name in VAR.block_classes] == ["VARBlock"] * 16
    assert VAR.needs_prefix
