"""Published Switti weights become folders of ours and go back; what no tensor tells is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from genscale.backbones.switti import Switti
from genscale.cli.import_checkpoint import main
from genscale.conditioning.base import Conditioning
from genscale.io.converters.switti import to_official
from genscale.io.layouts import write_official
from genscale.io.published import read_settings_beside, read_state_dict
from genscale.pipeline import GenerationPipeline

TINY: dict[str, Any] = {
    "scales": [1, 2, 4],
    "latent_channels": 3,
    "vocab_size": 11,
    "text_size": 12,
    "pooled_text_size": 10,
    "hidden_size": 128,
    "depth": 2,
    "num_heads": 2,
    "use_ar": True,
}


def tiny(**changes: Any) -> Switti:
    torch.manual_seed(0)
    model: Switti = Switti(**{**TINY, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def logits(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    cond = Conditioning(
        text=torch.randn(2, 3, 12, generator=generator),
        pooled_text=torch.randn(2, 10, generator=generator),
    )
    with torch.no_grad():
        out: Tensor = model(torch.randn(2, 21, 3, generator=generator), cond).logits
    return out


def test_a_training_file_is_imported_once_it_is_said_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny()
    file, out = tmp_path / "model_state_dict.pt", tmp_path / "ours"
    mask = {"attn_bias_for_masking": torch.zeros(1, 1, 21, 21)}
    torch.save({**to_official(model.state_dict(), model.config), **mask}, file)
    words = ["family=switti", f"file={file}", f"out={out}"]
    assert main(words) != 0
    assert "No tensor tells use_ar" in capsys.readouterr().err
    assert main([*words, "use_ar=true"]) == 0
    assert "autoencoder.run=<its folder>" in capsys.readouterr().out
    pipeline = GenerationPipeline.from_pretrained(out, device="cpu")
    assert torch.equal(logits(pipeline.model), logits(model))
    config = json.loads((out / "genscale.json").read_text())
    assert config["sampler"]["num_scales"] == 3
    assert config["autoencoder"]["scales"] == [1, 2, 4]
    assert config["autoencoder"]["vocab_size"] == 11


@pytest.mark.parametrize("use_ar", [False, True])
def test_exported_weights_are_imported_again(use_ar: bool, tmp_path: Path) -> None:
    model = tiny(use_ar=use_ar)
    untold = write_official(model, tmp_path)
    assert untold["use_ar"] is use_ar  # a word of the command that reads the file back
    assert not (tmp_path / "config.json").exists()  # which could not state these widths
    settings = [f"{name}={json.dumps(value)}" for name, value in untold.items()]
    file, out = tmp_path / "model.safetensors", tmp_path / "ours"
    assert main(["family=switti", f"file={file}", f"out={out}", *settings]) == 0
    again = GenerationPipeline.from_pretrained(out, device="cpu").model
    assert again.config["use_ar"] is use_ar
    assert torch.equal(logits(again), logits(model))


def test_config_json_beside_the_weights_tells_the_rest(tmp_path: Path) -> None:
    model = tiny(rope_theta=100.0)
    state = to_official(model.state_dict(), model.config)
    save_file(state, tmp_path / "model.safetensors")
    stated = {"depth": 2, "rope_theta": 100, "use_ar": True, "patch_nums": [1, 2, 4]}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    assert read_settings_beside(tmp_path / "model.safetensors") == stated
    out = tmp_path / "ours"
    assert main(["family=switti", f"file={tmp_path / 'model.safetensors'}", f"out={out}"]) == 0
    again = GenerationPipeline.from_pretrained(out, device="cpu").model
    assert (again.config["use_ar"], again.config["rope_theta"]) == (True, 100.0)
    assert torch.equal(logits(again), logits(model))


def test_an_export_of_the_published_form_has_a_config_json(tmp_path: Path) -> None:
    published = {"latent_channels": 32, "vocab_size": 4096, "text_size": 2048}
    scales = [1, 2, 3, 4, 6, 9, 13, 18, 24, 32]
    model = tiny(**published, pooled_text_size=1280, scales=scales)
    assert write_official(model, tmp_path) == {}  # the two files tell everything
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "depth": 2, "rope": True, "rope_theta": 10000.0, "rope_size": 128.0,
        "use_swiglu_ffn": True, "use_ar": True, "use_crop_cond": True, "reso": 512,
    }  # fmt: skip
    assert load_file(tmp_path / "model.safetensors")["lvl_1L"].shape == (1, 2240)


def test_weights_inside_a_training_file_are_found(tmp_path: Path) -> None:
    state = {"a": torch.ones(1)}
    torch.save({"epoch": 3, "trainer": {"config": {}, "net": state}}, tmp_path / "last.pth")
    found = read_state_dict(tmp_path / "last.pth", nested=("trainer", "net"))
    assert torch.equal(found["a"], state["a"])
    torch.save(state, tmp_path / "bare.pth")
    assert list(read_state_dict(tmp_path / "bare.pth", nested=("trainer", "net"))) == ["a"]
