"""The three layouts of an export, and exports that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from genscale.backbones.base import Backbone
from genscale.backbones.dit import DiT
from genscale.backbones.uvit import UViT
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.io.layouts import (
    as_words,
    converter_of,
    untold_settings,
    write_diffusers,
    write_official,
)
from genscale.io.model_card import model_card
from genscale.io.weights import read_checkpoint
from genscale.pipeline import EXPORTED, GenerationPipeline

SETTINGS: dict[str, Any] = {
    **{"input_size": 8, "in_channels": 1, "num_classes": 5, "hidden_size": 16, "depth": 2},
    **{"num_heads": 2, "learn_sigma": True},
}


def config_of(model: Backbone) -> dict[str, Any]:
    """The config of a run whose network is ``model``."""
    own = {name: value for name, value in model.config.items() if name[0] != "_"}
    return {
        "model": {"_target_": f"{type(model).__module__}.{type(model).__name__}", **own},
        "autoencoder": {
            "_target_": "genscale.autoencoders.identity.Identity",
            "latent_channels": 1,
        },
        "objective": {"_target_": "genscale.objectives.ddpm.DDPM"},
        "sampler": {"_target_": "genscale.samplers.sde.DDIM", "steps": 2},
        "guidance": {"_target_": "genscale.guidance.base.Unguided"},
        "data_info": {"num_classes": 5, "class_names": list("abcde")},
    }


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """An exported folder of a small DiT with random weights."""
    torch.manual_seed(0)
    model: DiT = DiT(**SETTINGS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    config = config_of(model)
    folder = tmp_path / "ours"
    GenerationPipeline.from_config(config, model=model).save_pretrained(folder, config)
    return folder


def test_diffusers_loads_what_is_written_and_the_card_mends_its_differences(
    exported: Path, command: Any, tmp_path: Path
) -> None:
    out = tmp_path / "theirs"
    answer = command("export", f"run={exported}", "layout=diffusers", f"out={out}")
    assert answer.status == 0, answer.err
    names = {path.name for path in out.iterdir()}
    assert names == {"config.json", "diffusion_pytorch_model.safetensors", "README.md"}
    card = (out / "README.md").read_text()
    assert "127 in place of 128" in card
    assert "eps 1e-5" in card
    code = card.split("```")[1].replace("<this folder>", str(out))
    space: dict[str, Any] = {}
    exec(code, space)  # our own card: it must run as it stands
    ours = GenerationPipeline.from_pretrained(exported, device="cpu").model
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    t, labels = torch.tensor([0, 500, 999]), torch.tensor([0, 4, 5])
    with torch.no_grad():
        output = ours(x, t.float(), Conditioning(labels=labels))
        whole = torch.cat((output.sample, output.aux["variance"]), dim=1)
        found = space["model"](x, t, labels).sample
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)


def test_an_exported_folder_is_exported_again_to_the_same_bits(
    exported: Path, command: Any, tmp_path: Path
) -> None:
    answer = command("export", f"run={exported}", f"out={tmp_path / 'copy'}")
    assert answer.status == 0, answer.err
    for name in ("genscale.json", "model/config.json", "model/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "copy" / name).read_bytes() == (exported / name).read_bytes()
    card = (tmp_path / "copy" / "README.md").read_text()
    assert card.startswith("# DiT\n")
    assert '"hidden_size": 16' in card
    assert "FID" not in card  # no claims


def test_without_out_it_goes_into_the_run(exported: Path, command: Any) -> None:
    answer = command("export", f"run={exported}", "layout=official")
    assert answer.status == 0, answer.err
    (folder,) = (exported / "exports").iterdir()
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors",
        "model.pth",
        "README.md",
    }


def test_mistakes_leave_nothing_behind(exported: Path, command: Any, tmp_path: Path) -> None:
    before = sorted(exported.rglob("*"))
    for words, sentence in (
        (("layout=oficial",), "Did you mean 'official'?"),
        (("layuot=official",), "Did you mean 'layout'?"),
        (("weights=raw",), "holds the last averaged weights alone"),
        ((f"out={exported}",), "is there already, and a new or empty folder is needed"),
    ):
        answer = command("export", f"run={exported}", *words)
        assert answer.status == 1
        assert sentence in answer.err
    answer = command("export", f"run={tmp_path / 'gone'}")
    assert "is no run folder" in answer.err
    assert sorted(exported.rglob("*")) == before


def test_layouts_that_cannot_hold_the_network_are_refused(command: Any, tmp_path: Path) -> None:
    model = UViT(input_size=8, in_channels=1, num_classes=5, hidden_size=16, depth=3, num_heads=2)
    config, run = config_of(model), tmp_path / "uvit"
    GenerationPipeline.from_config(config, model=model).save_pretrained(run, config)
    answer = command("export", f"run={run}", "layout=diffusers")
    assert (
        "layout=diffusers is for DiT, SiT and causal Wan, but the run's network is a UViT"
        in answer.err
    )
    assert not (run / "exports").exists()
    with pytest.raises(ConfigError, match="holds softmax attention only"):
        write_diffusers(DiT(**SETTINGS | {"attention": "nala"}), tmp_path)

    class Mine(DiT):
        pass

    with pytest.raises(
        ConfigError, match=r"no official layout of Mine; converters are for .*dimr,"
    ):
        converter_of(Mine(**SETTINGS))


def test_official_files_are_two_of_the_same(tmp_path: Path) -> None:
    model: DiT = DiT(**SETTINGS)
    untold = write_official(model, tmp_path)
    assert untold == {"num_heads": 2}  # 1 head of 16 channels is what its shapes suggest
    state = read_checkpoint(tmp_path / "model.pth")  # nothing but tensors
    assert torch.equal(state["final_layer.linear.bias"], model.head.bias)
    assert state["pos_embed"].shape == (1, 16, 16)
    assert state.keys() == read_checkpoint(tmp_path / "model.safetensors").keys()


def test_settings_that_a_file_does_not_tell_are_written_as_words() -> None:
    model: DiT = DiT(**SETTINGS, position_resize="extend")
    found = {**SETTINGS, "num_heads": 1}
    untold = untold_settings(model, found)
    assert untold == {"num_heads": 2, "position_resize": "extend"}
    assert as_words({"a": [1, 2], "b": None, "c": True, "d": "x"}) == 'a=[1,2] b=null c=true d="x"'


def test_a_card_names_what_was_asked_for() -> None:
    model: DiT = DiT(**SETTINGS)
    config = config_of(model)
    card = model_card(model, config, origin="From here.", use="load it", notes=("Mind this.",))
    parameters = sum(p.numel() for p in model.parameters())
    assert f"{parameters:,} parameters, 5 classes, inputs of 1 x 8 x 8. From here." in card
    assert "```\nload it\n```" in card
    assert "- Mind this." in card
    assert "abcde" not in card
    assert set(EXPORTED) == set(config)
