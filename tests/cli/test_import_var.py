"""Published files of VAR and M-VAR become folders of ours, and exports go back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genscale.backbones.base import ScaleBackbone
from genscale.cli.import_checkpoint import main
from genscale.conditioning.base import Conditioning
from genscale.io.converters import converter
from genscale.io.layouts import write_official
from genscale.pipeline import GenerationPipeline

TINY: dict[str, Any] = {
    **{"scales": [1, 2, 4], "latent_channels": 3, "vocab_size": 11, "num_classes": 5},
    **{"hidden_size": 64, "depth": 2, "num_heads": 1},
}
both_families = pytest.mark.parametrize("family", ["var", "mvar"])


def tiny(family: str, **changes: Any) -> ScaleBackbone:
    torch.manual_seed(0)
    model: ScaleBackbone = converter(family).BACKBONE(**{**TINY, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def logits(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    cond = Conditioning(labels=torch.tensor([4, -1]))
    with torch.no_grad():
        out: Tensor = model(torch.randn(2, 21, 3, generator=generator), cond).logits
    return out


@both_families
def test_a_training_file_is_recognised(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny(family)
    official = converter(family).to_official(model.state_dict(), model.config)
    weights = {f"_orig_mod.{name}": tensor for name, tensor in official.items()}
    file, out = tmp_path / "ar-ckpt-last.pth", tmp_path / "ours"
    torch.save({"epoch": 1, "trainer": {"config": {}, f"{family}_wo_ddp": weights}}, file)
    assert main([f"family={family}", f"file={file}", f"out={out}"]) == 0
    told = capsys.readouterr().out
    assert "is assumed" not in told  # the heads' factors tell how many there are
    assert "autoencoder.run=<its folder>" in told
    pipeline = GenerationPipeline.from_pretrained(out, device="cpu")
    assert torch.equal(logits(pipeline.model), logits(model))
    config = json.loads((out / "genscale.json").read_text())
    assert config["objective"]["_target_"].endswith(".NextScale")
    assert (config["sampler"]["num_scales"], config["autoencoder"]["scales"]) == (3, [1, 2, 4])
    assert config["data_info"]["num_classes"] == 5


@both_families
def test_exported_weights_are_imported_again(family: str, tmp_path: Path) -> None:
    model = tiny(family, l2_norm=False, num_heads=2)
    untold = write_official(model, tmp_path)
    assert untold == {"num_heads": 2}  # no shape tells it without the heads' factors
    words = [f"{name}={json.dumps(value)}" for name, value in untold.items()]
    out = tmp_path / "ours"
    file = tmp_path / "model.safetensors"
    assert main([f"family={family}", f"file={file}", f"out={out}", *words]) == 0
    again = GenerationPipeline.from_pretrained(out, device="cpu").model
    assert torch.equal(logits(again), logits(model))
