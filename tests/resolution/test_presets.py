"""Presets by name, what they are called, and which networks they fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from omegaconf import OmegaConf
from torch import nn

from genscale.backbones.causal_video import CausalVideo
from genscale.backbones.dimr import DiMR
from genscale.backbones.dit import DiT
from genscale.backbones.fit import FIT
from genscale.backbones.lamamba import LaMamba
from genscale.backbones.mvar import MVAR
from genscale.backbones.rin import RIN
from genscale.backbones.switti import Switti
from genscale.backbones.uvit import UViT
from genscale.backbones.var import VAR
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.layers.attention import SelfAttention
from genscale.resolution import Preset, preset_named, refusal
from genscale.resolution.applicability import NEEDS, Traits, rendered_table, traits
from genscale.resolution.cascades import (
    Cascade,
    FreeScale,
    HiFlow,
    IMax,
    SDEdit,
    adapted_attention,
    moved_patches,
)
from genscale.resolution.entropy import EntropyAttention
from genscale.resolution.flow_guided import Projection
from genscale.resolution.hidiffusion import HiDiffusion
from genscale.resolution.presets import (
    Entropy,
    FouriScale,
    Lumina,
    MultiDiffusion,
    NoScaling,
    Rotary,
    ScaleCrafter,
    check_count,
    check_share,
    fitting,
    operators_of,
    presets,
)
from genscale.resolution.pyramid import Pyramid
from genscale.resolution.rotary import RotaryScaling
from genscale.resolution.sampling import Stage
from genscale.resolution.swin_patches import SwinPatches
from genscale.resolution.text_tiles import TextTiles, joins_words
from genscale.resolution.window_cascades import LSRNA, AccDiffusion, CUpscale, DemoFusion

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
UNET = {
    **{"block_out_channels": (8, 8), "norm_num_groups": 8, "cross_attention_dim": 8},
    **{"down_block_types": ("CrossAttnDownBlock2D",) * 2, "attention_head_dim": 8},
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
}
FLUX = {
    **{"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8},
    **{"num_attention_heads": 1, "axes_dims_rope": (2, 2, 4)},
}
DIT = {"input_size": 8, "hidden_size": 16, "depth": 1, "num_heads": 2}
DIMR = {"input_size": 8, "hidden_sizes": (16, 8), "depths": (3, 1), "num_heads": 2}
LAMAMBA = {
    **{"input_size": 8, "hidden_sizes": (8, 16, 32, 32), "depths": (1, 1, 1, 1)},
    **{"bottleneck_depth": 1, "num_heads": 2, "window_size": 2},
}
RIN_ = {
    **{"input_size": 8, "tape_width": 16, "latent_width": 16, "num_latents": 4, "depth": 1},
    **{"compute_depth": 1, "num_heads": 2, "head_size": 8},
}
FIT_ = {
    **{"input_size": [2, 8, 8], "patch_size": [1, 2, 2], "group_size": [2, 2, 2]},
    **{"num_latents": 16, "patch_width": 16, "latent_width": 16, "context_width": 16},
    **{"depth": 1, "global_depth": 1, "patch_head_size": 8, "latent_head_size": 8},
}
VIDEO = {"hidden_size": 24, "depth": 1, "num_heads": 2, "mlp_size": 24}
# networks of this package by the names of their configs, and two of diffusers
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "dit, sit": lambda: DiT(**DIT),
    "dit_text": lambda: DiT(**DIT, text_size=8),
    "uvit": lambda: UViT(**DIT),
    "dimr": lambda: DiMR(**DIMR),
    "dimr, axial_rope": lambda: DiMR(**DIMR, position="axial_rope"),
    "lamamba": lambda: LaMamba(**LAMAMBA),
    "rin": lambda: RIN(**RIN_),
    "snap_video": lambda: FIT(**FIT_),
    "causal_video": lambda: CausalVideo(**VIDEO),
    "var": lambda: VAR(depth=1),
    "mvar": lambda: MVAR(depth=1),
    "switti": lambda: Switti(depth=1),
    "a UNet of diffusers": lambda: UNet2DConditionModel(**UNET),
    "FLUX": lambda: FluxTransformer2DModel(**FLUX),
}


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    with torch.device("meta"):
        return {name: make() for name, make in NETWORKS.items()}


def test_every_preset_has_a_file_with_its_defaults() -> None:
    assert set(presets()) == {path.stem for path in (CONF / "resolution").glob("*.yaml")}
    for name, kind in presets().items():
        node: Any = OmegaConf.to_container(OmegaConf.load(CONF / "resolution" / f"{name}.yaml"))
        assert node.pop("_target_") == f"{kind.__module__}.{kind.__name__}"
        # what a file says is the constructor's own default
        assert kind(**node).label == name == preset_named(name).label


def test_a_label_says_what_was_changed() -> None:
    assert SDEdit(strength=0.5, enlarge="pixel").label == "sdedit(strength=0.5, enlarge='pixel')"
    assert DemoFusion(exponents=[3, 1, 1]).label == "demofusion"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: preset_named("demofusoin"), "Did you mean 'demofusion'"),
        (lambda: SDEdit(strength=1.5), "resolution.strength must lie between 0 and 1, but is 1.5"),
        (lambda: SDEdit(enlarge="pixels"), "Did you mean 'pixel'"),  # type: ignore[arg-type]
        (lambda: DemoFusion(exponents=[3, 1]), "three numbers of at least 0"),
        (lambda: MultiDiffusion(stride=0), "resolution.stride must be a whole number"),
        (lambda: AccDiffusion(coverage=-1), "resolution.coverage must lie between"),
        (lambda: LSRNA(edge_noise=[1.0, 0.5]), "two rising numbers"),
        (lambda: HiFlow(strengths=[]), "resolution.strengths must have a value"),
        (lambda: IMax(shift=0.0), "resolution.shift must be positive"),
        (lambda: FouriScale(start_step=40), "stop_step must come after resolution.start_step"),
        (lambda: Rotary(variant="ntkk"), "Did you mean 'ntk'"),  # type: ignore[arg-type]
        (lambda: Lumina(watershed=2.0), "resolution.watershed"),
        (lambda: FreeScale(restart=-0.1), "resolution.restart"),
        (lambda: CUpscale(screen=3.0), "resolution.screen"),
        (lambda: HiDiffusion(until=7.0), "resolution.until"),
        (lambda: check_share("x", 2.0), "resolution.x"),
        (lambda: check_count("x", True), "resolution.x"),
    ],
)
def test_impossible_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_what_a_network_has_nothing_for_is_left_out_or_refused(
    models: dict[str, nn.Module],
) -> None:
    plain, turned = SelfAttention(8, 2), SelfAttention(8, 2, axial_rope=True)
    both = [EntropyAttention(), RotaryScaling()]
    assert fitting(plain, both) == both[:1]
    assert fitting(turned, both) == both
    assert [len(adapted_attention(m, 10.0)) for m in (plain, turned, nn.Identity())] == [1, 2, 0]
    assert len(moved_patches(plain, (8, 8))) == 1
    assert [joins_words(network) for network in (plain, models["FLUX"])] == [False, True]
    assert isinstance(traits(plain), Traits)
    assert (traits(plain).rotary, traits(turned).rotary) == (False, True)
    assert (traits(plain).tokens, traits(turned).tokens) == (True, False)
    assert operators_of(NoScaling(), plain, (4, 4), (8, 8)) == []
    assert [type(op) for op in operators_of(Entropy(), plain, (4, 4), (8, 8))] == [EntropyAttention]
    assert "softmax attention" in str(refusal(nn.Identity(), Entropy()))
    assert refusal(nn.Identity(), ScaleCrafter(), (4, 4), (8, 8)) == (
        "resolution=scalecrafter needs the convolutional stages of a UNet of diffusers, which "
        "Identity has not. Use resolution=none."
    )
    for kind in presets().values():
        assert {*kind.needs, *kind.uses} <= set(NEEDS)
        assert kind.cascade == issubclass(kind, Cascade | Pyramid)


def test_a_unet_takes_the_presets_of_its_convolutions(models: dict[str, nn.Module]) -> None:
    unet = models["a UNet of diffusers"]
    for preset in (ScaleCrafter(), FouriScale()):
        assert refusal(unet, preset) is None
        assert len(preset.operators(unet, (4, 4), (8, 8))) == 1


def test_the_table_of_the_docs_is_what_the_code_says(models: dict[str, nn.Module]) -> None:
    table = rendered_table(models, [kind() for kind in presets().values()])
    assert table in (ROOT / "docs" / "workflows" / "resolution.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1]: line.count(" yes ") for line in table.splitlines()[2:]}
    assert rows["none"] == len(models)
    assert rows["scalecrafter"] == 1


def test_a_base_preset_is_nothing_but_the_size() -> None:
    preset, latents = NoScaling(), torch.zeros(1)
    assert isinstance(preset, Preset)
    assert preset.called_at(nn.Identity(), (4, 4), (8, 8)) == [(8, 8)]
    assert preset.watch(nn.Identity(), (4, 4)) is None
    assert preset.strength_of(0) == 1.0
    assert preset.finished(latents, latents) is latents
    assert DemoFusion().called_at(nn.Identity(), (8, 8), (20, 12)) == [(8, 8), (10, 6)]
    assert [HiFlow().strength_of(i) for i in range(3)] == [0.533, 0.333, 0.333]


def test_a_larger_run_takes_the_operators_that_its_network_has_something_for(
    models: dict[str, nn.Module],
) -> None:
    latents = torch.zeros(1, 1, 16, 16)
    stage = Stage(
        **{"index": 0, "native": (8, 8), "before": (8, 8), "sides": (16, 16), "steps": 4},
        **{"small": latents[..., :8, :8], "guide": latents, "noise": latents, "cleans": {}},
        **{"first": 0, "seeds": torch.zeros(1, dtype=torch.int64), "cond": Conditioning()},
    )
    kinds = [type(op) for op in IMax().guided(models["FLUX"], stage)]
    assert kinds == [EntropyAttention, RotaryScaling, TextTiles, SwinPatches, Projection]
    kinds = [type(op) for op in IMax(swin_patches=False).guided(models["dit, sit"], stage)]
    assert kinds == [EntropyAttention, Projection]
    assert TextTiles not in map(type, IMax(text_tiles=False).guided(models["FLUX"], stage))
