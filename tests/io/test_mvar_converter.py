"""M-VAR state dicts load exactly and come back exactly; a VAR starts an M-VAR."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genscale.backbones.mvar import MVAR
from genscale.backbones.var import VAR
from genscale.conditioning.base import Conditioning
from genscale.errors import CheckpointError, ConfigError
from genscale.io.converters import var
from genscale.io.converters.mvar import (
    NESTED,
    config_from_official,
    config_from_state_dict,
    from_official,
    from_var,
    to_official,
)
from genscale.io.published import read_state_dict

SIZES: dict[str, Any] = {
    **{"scales": [1, 2, 4], "latent_channels": 3, "vocab_size": 7, "num_classes": 5},
    **{"hidden_size": 16, "depth": 2, "num_heads": 4, "mlp_ratio": 2.0},
}
SCAN = {"state_size": 4, "scan_head_size": 8}
D16: dict[str, Any] = {
    **{"depth": 16, "embed_dim": 1024, "num_heads": 16, "num_classes": 1000, "shared_aln": False},
    **{"attn_l2_norm": False, "drop_path_rate": 0.1 * 16 / 24, "cond_drop_rate": 0.1},
}


def random(kind: type[Any], **settings: Any) -> Any:
    torch.manual_seed(0)
    model = kind(**{**SIZES, **settings})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tiny(**changes: Any) -> MVAR:
    model: MVAR = random(MVAR, **{**SCAN, **changes})
    return model


def on_meta(**settings: Any) -> MVAR:
    with torch.device("meta"):
        return MVAR(**settings)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("changes", [{}, {"l2_norm": False}, {"scales": [2, 3]}])
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
    probes = {
        "attn_bias_for_masking": (1, 1, 680, 680),
        "blocks.0.attn.patch_nums": (10,),
        "blocks.0.attn.zero_k_bias": (1024,),
        "blocks.15.mamba.in_proj.weight": (2 * 2048 + 2 * 64 + 32, 1024),
        "blocks.15.mamba.conv1d.weight": (2048 + 2 * 64, 1, 4),
        "blocks.15.mamba.conv1d.bias": (2048 + 2 * 64,),
        "blocks.15.mamba.dt_bias": (32,),
        "blocks.15.mamba.A_log": (32,),
        "blocks.15.mamba.D": (32,),
        "blocks.15.mamba.norm.weight": (2048,),
        "blocks.15.mamba.out_proj.weight": (1024, 2048),
        "blocks.0.ada_lin.1.weight": (9216, 1024),
    }
    for name, shape in probes.items():
        assert tuple(official[name].shape) == shape
    assert not any("scale_mul" in name for name in official)
    found = config_from_state_dict(official)
    assert (found["num_heads"], found["l2_norm"]) == (16, False)
    assert (found["state_size"], found["scan_head_size"]) == (64, 64)


def test_the_mask_is_that_of_one_scale() -> None:
    model = tiny(scales=[1, 2])
    official = to_official(model.state_dict(), model.config)
    mask = official["attn_bias_for_masking"][0, 0]
    assert mask[0].tolist() == [0, *[-math.inf] * 4]
    assert mask[1].tolist() == [-math.inf, 0, 0, 0, 0]
    assert official["blocks.1.attn.patch_nums"].tolist() == [1, 2]


def test_training_files_are_read_through(tmp_path: Path) -> None:
    model = tiny()
    official = to_official(model.state_dict(), model.config)
    torch.save({"epoch": 3, "trainer": {"mvar_wo_ddp": official}}, tmp_path / "last.pth")
    state = read_state_dict(tmp_path / "last.pth", nested=NESTED)
    assert same(from_official(state, model), model.state_dict())


def test_settings_translate() -> None:
    assert config_from_official(D16)["fix_gate_init"]
    assert not config_from_official(D16, parity=True)["fix_gate_init"]
    with pytest.raises(ConfigError, match="shared_aln=True does not run there"):
        config_from_official({**D16, "shared_aln": True})


def test_other_files_are_refused() -> None:
    model: VAR = random(VAR)
    official = var.to_official(model.state_dict(), model.config)
    with pytest.raises(CheckpointError, match="its blocks have no 'mamba'"):
        config_from_state_dict(official)
    mvar = tiny()
    official = to_official(mvar.state_dict(), mvar.config)
    with pytest.raises(CheckpointError, match="looks like state_size 4, the config says 8"):
        from_official(official, tiny(state_size=8))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("l2_norm", [False, True])
def test_a_var_starts_an_mvar_that_is_that_var_without_earlier_scales(
    shared: bool, l2_norm: bool
) -> None:
    start: VAR = random(VAR, shared_adaln=shared, l2_norm=l2_norm)
    model = tiny(l2_norm=l2_norm)
    before = {name: t.clone() for name, t in model.state_dict().items() if ".scan." in name}
    model.load_state_dict(from_var(start.state_dict(), model))
    assert same({n: t for n, t in model.state_dict().items() if ".scan." in n}, before)
    features = torch.randn(2, 21, 3, generator=torch.Generator().manual_seed(1))
    cond = Conditioning(labels=torch.tensor([2, -1]))
    assert not torch.allclose(model(features, cond).logits, start(features, cond).logits)
    for block in start.blocks:
        block.attention.prefix = False
    torch.testing.assert_close(model(features, cond).logits, start(features, cond).logits)


def test_a_var_of_other_sizes_starts_nothing() -> None:
    model = tiny()
    with pytest.raises(CheckpointError, match="tensors have another shape than the M-VAR's"):
        from_var(random(VAR, hidden_size=32).state_dict(), model)
    with pytest.raises(CheckpointError, match="weights are missing from the VAR"):
        from_var(random(VAR, depth=1).state_dict(), model)
    with pytest.raises(CheckpointError, match="weights are missing from the VAR"):
        from_var(random(VAR, l2_norm=False).state_dict(), model)
