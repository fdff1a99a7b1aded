"""Upscalers read back: the same network comes out of a folder, and of other programs' files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genscale.errors import CheckpointError, ConfigError
from genscale.io.converters import irn as irn_keys
from genscale.io.converters.swin import to_official
from genscale.upscaling.base import Upscaler
from genscale.upscaling.espcn import ESPCN
from genscale.upscaling.interpolation import Interpolation
from genscale.upscaling.irn import IRN
from genscale.upscaling.loading import (
    UpscalerFacts,
    facts_of,
    load_upscaler,
    read_file,
    read_folder,
    save_upscaler,
    trains_upscaler,
    write_facts,
)
from genscale.upscaling.lua import LUA
from genscale.upscaling.swinir import SwinIR

SWIN: dict[str, Any] = {
    "input_size": 8,
    "window_size": 4,
    "depths": [2],
    "hidden_size": 8,
    "num_heads": [2],
}
NETWORKS = {
    "lua": (LUA, {**SWIN, "channels": 4, "scales": [2, 4], "head_size": 4}),
    "swinir": (SwinIR, {**SWIN, "channels": 3, "scale": 2}),
    "espcn": (ESPCN, {"scale": 3, "channels": 1, "hidden_size": 4}),
    "irn": (IRN, {"scale": 4, "num_blocks": [1, 2], "growth": 4, "channels": 1}),
    "interpolation": (Interpolation, {"channels": 4}),
}


def network(kind: str) -> Upscaler:
    torch.manual_seed(0)
    make, settings = NETWORKS[kind]
    made: Upscaler = make(**settings).eval()
    for parameter in made.parameters():  # IRN's blocks start as the identity
        torch.nn.init.normal_(parameter, std=0.1)
    return made.requires_grad_(False)  # attention rounds otherwise where there are gradients


def numbers(made: Upscaler) -> Tensor:
    return torch.linspace(0, 1, made.channels * 64).view(1, made.channels, 8, 8)


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_folder_gives_the_same_network_and_facts(kind: str, tmp_path: Path) -> None:
    made = network(kind)
    facts = facts_of(made, data="digits", step=7, weights="ema_0.9", origin="a/run step 7")
    save_upscaler(made, tmp_path / "it", facts)
    read, told = load_upscaler(tmp_path / "it")
    assert told == facts
    assert (told.space, told.channels, told.scales) == (made.space, made.channels, made.scales)
    assert not read.training
    scale = made.scales[0]
    assert torch.equal(read(numbers(made), scale), made(numbers(made), scale))
    (tmp_path / "it" / "upscaler.json").unlink()  # another program's folder
    assert read_folder(tmp_path / "it")[1] == facts_of(made, origin="it")


def test_facts_of_latents_are_kept(tmp_path: Path) -> None:
    facts = UpscalerFacts(
        space="latent",
        channels=4,
        scales=(2,),
        family="sdxl",
        latent_stats={"mean": [0.0] * 4, "std": [1.0] * 4},
        autoencoder={"name": "KL", "encoder": "ab12", "downsample": 8},
    )
    save_upscaler(network("lua"), tmp_path, facts)
    # what the weights say of themselves is not taken from the file beside them
    assert load_upscaler(tmp_path)[1].scales == (2, 4)
    assert load_upscaler(tmp_path)[1].autoencoder == facts.autoencoder
    write_facts(tmp_path, facts_of(network("lua")))
    assert json.loads((tmp_path / "upscaler.json").read_text())["family"] is None


@pytest.mark.parametrize("kind", ["lua", "swinir", "espcn", "irn"])
def test_files_of_other_programs_tell_their_settings(kind: str, tmp_path: Path) -> None:
    made = network(kind)
    state = made.state_dict()
    if kind in ("lua", "swinir"):
        state = to_official(state, made.config)
    torch.save(state, tmp_path / f"{kind}.pth")
    read, facts = read_file(tmp_path / f"{kind}.pth")
    assert type(read) is type(made)
    assert facts.origin == f"{kind}.pth"
    scale = made.scales[0]
    read.requires_grad_(False).eval()
    assert torch.equal(read(numbers(made), scale), made(numbers(made), scale))


@pytest.mark.parametrize(
    "settings",
    [
        {"scale": 3, "num_blocks": [2], "downsampling": "conv"},
        {"scale": 4, "num_blocks": [3], "down_first": True, "small_channels": 1},
        {"scale": 2, "num_blocks": [1]},
    ],
)
def test_every_layout_of_irn_is_told_by_its_tensors(settings: dict[str, Any]) -> None:
    made = IRN(growth=4, channels=3, **settings)
    told = irn_keys.config_from_state_dict(made.state_dict())
    given = {"growth": 4, "channels": 3, "small_channels": 3, "downsampling": "haar"}
    assert told == {"down_first": False, **given, **settings}


def test_sigmoid_is_told_by_the_names_of_a_port() -> None:
    from genscale.io.converters import espcn

    names = {"feature_maps.0": "conv1", "feature_maps.2": "conv2", "sub_pixel.0": "conv3"}
    own = network("espcn").state_dict()
    state = {f"{names[k.rpartition('.')[0]]}.{k.rpartition('.')[2]}": v for k, v in own.items()}
    assert espcn.is_official(state)
    assert espcn.config_from_state_dict(state)["output"] == "sigmoid"
    assert espcn.config_from_state_dict(own)["output"] == "clamp"
    assert not espcn.is_official({**state, "more.weight": state["conv1.weight"]})
    assert not irn_keys.is_official(state)


def test_what_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no folder and no file"):
        load_upscaler(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="is no run, and holds one set of weights"):
        load_upscaler(tmp_path, weights="raw")
    (tmp_path / "config.yaml").write_text("model: {_target_: genscale.backbones.dit.DiT}\n")
    with pytest.raises(ConfigError, match="trained DiT, which is no upscaler"):
        load_upscaler(tmp_path)
    assert trains_upscaler({"model": {"_target_": "genscale.upscaling.lua.LUA"}})
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text('{"_class_name": "UNet"}')
    with pytest.raises(CheckpointError, match="describes UNet, but one of LUA, SwinIR"):
        load_upscaler(tmp_path / "folder")
