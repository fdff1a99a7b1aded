"""VAR state dicts load exactly and come back exactly; files that do not fit are refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genscale.backbones.var import VAR
from genscale.errors import CheckpointError, ConfigError
from genscale.io.converters.scale_wise import (
    derived,
    load,
    official_name,
    save,
    settings_from_official,
    settings_from_state,
    without_prefix,
)
from genscale.io.converters.var import (
    NESTED,
    config_from_official,
    config_from_state_dict,
    from_official,
    to_official,
)
from genscale.io.published import read_state_dict

TINY: dict[str, Any] = {
    **{"scales": [1, 2, 4], "latent_channels": 3, "vocab_size": 7, "num_classes": 5},
    **{"hidden_size": 16, "depth": 2, "num_heads": 4, "mlp_ratio": 2.0},
}
# config_from_official of the settings that the released weights were made with
D16: dict[str, Any] = {
    **{"depth": 16, "embed_dim": 1024, "num_heads": 16, "mlp_ratio": 4.0, "num_classes": 1000},
    **{
        "shared_aln": False,
        "attn_l2_norm": True,
        "norm_eps": 1e-6,
        "drop_path_rate": 0.1 * 16 / 24,
    },
    **{"cond_drop_rate": 0.1, "patch_nums": (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)},
    **{"flash_if_available": True, "fused_if_available": True},
}


def on_meta(**settings: Any) -> VAR:
    with torch.device("meta"):
        return VAR(**settings)


def tiny(**changes: Any) -> VAR:
    torch.manual_seed(0)
    model: VAR = VAR(**{**TINY, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "changes", [{}, {"shared_adaln": True}, {"l2_norm": False}, {"scales": [2, 3]}]
)
def test_there_and_back_is_exact(changes: dict[str, Any]) -> None:
    model = tiny(**changes)
    official = to_official(model.state_dict(), model.config)
    found = config_from_state_dict(official, num_heads=4)
    assert found == {name: model.config[name] for name in found}
    ours = from_official(official, on_meta(**found))
    assert same(ours, model.state_dict())
    assert same(to_official(ours, model.config), official)


def test_the_released_checkpoints_have_these_keys_and_shapes() -> None:
    model = on_meta(**config_from_official(D16))
    official = to_official(model.state_dict(), model.config)
    assert len(official) == 220  # of var_d16.pth
    probes = {
        "pos_start": (1, 1, 1024),
        "pos_1LC": (1, 680, 1024),
        "lvl_1L": (1, 680),
        "attn_bias_for_masking": (1, 1, 680, 680),
        "lvl_embed.weight": (10, 1024),
        "word_embed.weight": (1024, 32),
        "class_emb.weight": (1001, 1024),
        "blocks.15.attn.scale_mul_1H11": (1, 16, 1, 1),
        "blocks.15.attn.zero_k_bias": (1024,),
        "blocks.0.attn.mat_qkv.weight": (3072, 1024),
        "blocks.0.attn.proj.bias": (1024,),
        "blocks.0.ffn.fc1.weight": (4096, 1024),
        "blocks.0.ada_lin.1.weight": (6144, 1024),
        "head_nm.ada_lin.1.bias": (2048,),
        "head.weight": (4096, 1024),
    }
    for name, shape in probes.items():
        assert tuple(official[name].shape) == shape
    found = config_from_state_dict(official)
    assert found == {name: model.config[name] for name in found}
    shared = on_meta(**config_from_official({**D16, "depth": 2, "shared_aln": True}))
    keys = to_official(shared.state_dict(), shared.config)
    assert tuple(keys["blocks.1.ada_gss"].shape) == (1, 1, 6, 1024)
    assert tuple(keys["shared_ada_lin.1.weight"].shape) == (6144, 1024)
    assert config_from_state_dict(keys)["shared_adaln"]


def test_the_mask_hides_what_is_finer() -> None:
    model = tiny(scales=[1, 2])
    made = derived(model, torch.zeros(1))
    assert made["lvl_1L"].tolist() == [[0, 1, 1, 1, 1]]
    mask = made["attn_bias_for_masking"][0, 0]
    assert mask[0].tolist() == [0, *[-math.inf] * 4]
    assert not mask[1:].any()
    alone = derived(model, torch.zeros(1), same_scale=True)["attn_bias_for_masking"][0, 0]
    assert alone[1].tolist() == [-math.inf, 0, 0, 0, 0]


@pytest.mark.parametrize("left_out", ["none", "derived", "levels"])
def test_scales_are_told_by_the_levels_or_by_published_counts(left_out: str) -> None:
    scales = [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]
    model = tiny(scales=scales)
    official = to_official(model.state_dict(), model.config)
    if left_out != "none":
        del official["lvl_1L"]
    if left_out == "derived":
        for name in [name for name in official if "zero_k_bias" in name or "masking" in name]:
            del official[name]
    assert config_from_state_dict(official)["scales"] == scales
    assert same(from_official(official, model), model.state_dict())


def test_scales_that_nothing_tells_are_asked_for() -> None:
    model = tiny()
    official = to_official(model.state_dict(), model.config)
    del official["lvl_1L"]
    with pytest.raises(CheckpointError, match="has 3 scales of 21 tokens in all, and does not"):
        config_from_state_dict(official)
    assert config_from_state_dict(official, scales=[1, 2, 4])["scales"] == [1, 2, 4]


def test_training_files_are_read_through(tmp_path: Path) -> None:
    """ar-ckpt-last.pth: weights below trainer/var_wo_ddp, of a compiled module."""
    model = tiny()
    official = to_official(model.state_dict(), model.config)
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in official.items()}
    assert same(without_prefix(compiled), official)
    content = {
        **{"epoch": 3, "iter": 7, "args": {"depth": 2}},
        "trainer": {
            **{"config": {"patch_nums": (1, 2, 4)}, "var_wo_ddp": compiled},
            **{"vae_local": {"quant_conv.weight": torch.zeros(1)}, "var_opt": {"state": {}}},
        },
    }
    torch.save(content, tmp_path / "ar-ckpt-last.pth")
    state = read_state_dict(tmp_path / "ar-ckpt-last.pth", nested=NESTED)
    found = config_from_state_dict(state)
    assert same(from_official(state, on_meta(**found)), model.state_dict())


def test_a_joined_bias_is_split() -> None:
    model = tiny()
    official = to_official(model.state_dict(), model.config)
    q, v = (official.pop(f"blocks.0.attn.{part}_bias") for part in "qv")
    official["blocks.0.attn.mat_qkv.bias"] = torch.cat((q, torch.zeros(16), v))
    assert same(from_official(official, model), model.state_dict())
    official["blocks.0.attn.mat_qkv.bias"][20] = 0.5
    with pytest.raises(CheckpointError, match=r"mat_qkv.bias' gives keys a bias, up to 0.5"):
        from_official(official, model)


def test_a_bias_of_keys_is_refused() -> None:
    model = tiny()
    official = to_official(model.state_dict(), model.config)
    official["blocks.1.attn.zero_k_bias"][3] = -2.0
    with pytest.raises(CheckpointError, match=r"blocks.1.attn.zero_k_bias' gives keys a bias"):
        from_official(official, model)


def test_files_of_other_sizes_are_refused_with_what_differs() -> None:
    model = tiny()
    official = to_official(model.state_dict(), model.config)
    with pytest.raises(CheckpointError, match="looks like depth 2, the config says 3"):
        from_official(official, tiny(depth=3))
    with pytest.raises(CheckpointError, match="looks like vocab_size 7, the config says 9"):
        from_official(official, tiny(vocab_size=9))
    with pytest.raises(CheckpointError, match="looks like shared_adaln False, the config says"):
        from_official(official, tiny(shared_adaln=True))
    # as many tokens in as many scales, split in another way
    other = tiny(scales=[1, [2, 3], [2, 7]])
    with pytest.raises(CheckpointError, match=r"scales of \[1, 4, 16\] tokens, but the VAR has"):
        from_official(official, other)
    tokenizer = {"encoder.conv_in.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="no official VAR state dict: 'pos_1LC' is missing"):
        config_from_state_dict(tokenizer)
    with pytest.raises(CheckpointError, match="1 missing, 0 unexpected keys for VAR"):
        to_official(
            {k: v for k, v in model.state_dict().items() if k != "embed.start"}, model.config
        )


def test_oblong_scales_have_no_official_layout() -> None:
    model = tiny(scales=[1, [2, 3]])
    with pytest.raises(ConfigError, match=r"has square scales, but the model has \[2, 3\]"):
        to_official(model.state_dict(), model.config)


def test_settings_translate() -> None:
    found = config_from_official(D16)
    assert (found["drop_path"], found["eps"]) == (0.1 * 16 / 24, 1e-6)
    assert (found["vocab_size"], found["latent_channels"]) == (4096, 32)
    assert found == config_from_official({**D16, "vae": {"vocab_size": 4096, "Cvae": 32}})
    with pytest.raises(ConfigError, match=r"hold \['embed'\], which VAR does not know"):
        config_from_official({**D16, "embed": 3})
    with pytest.raises(ConfigError, match=r"hold \['attn_drop_rate'\], which VAR does not know"):
        config_from_official({**D16, "attn_drop_rate": 0.1})


def test_the_parts_that_families_share() -> None:
    model = tiny()
    assert official_name("blocks.3.attention.q_bias") == "blocks.3.attn.q_bias"
    assert official_name("blocks.3.scan.skip", (("scan.skip", "mamba.D"),)) == "blocks.3.mamba.D"
    weights = save(model.state_dict(), model, family="VAR")
    assert len(weights) == len(model.state_dict())
    read = load(weights, model, read=config_from_state_dict, family="VAR")
    assert same(read, model.state_dict())
    settings = settings_from_state(weights, family="VAR", num_heads=None, scales=[1, 2, 4])
    assert settings["num_heads"] == 4  # told by the factors
    assert settings_from_official({}, family="VAR")["depth"] == 16
