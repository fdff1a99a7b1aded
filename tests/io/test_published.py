"""Weight files of other programs: what is taken, and what is said of the rest."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from genscale.errors import CheckpointError
from genscale.io.published import is_state_dict, read_diffusers, read_state_dict

EMA, RAW = {"w": torch.ones(2)}, {"w": torch.zeros(2)}


class Settings:
    """A class of another program."""


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


class TestTrainingFiles:
    def test_bare_files_are_taken_as_they_are(self, tmp_path: Path) -> None:
        file = saved(tmp_path / "w.pt", EMA)
        assert torch.equal(read_state_dict(file)["w"], EMA["w"])
        with pytest.raises(CheckpointError, match=r"is a bare state dict, but weights=ema was giv"):
            read_state_dict(file, "ema")

    def test_options_beside_the_weights_do_not_hinder(self, tmp_path: Path) -> None:
        # as the trainers of DiT and SiT write them
        options = argparse.Namespace(model="DiT-XL/2", epochs=1400, vae="ema")
        opt = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4}]}
        file = saved(tmp_path / "t.pt", {"model": RAW, "ema": EMA, "opt": opt, "args": options})
        assert torch.equal(read_state_dict(file)["w"], EMA["w"])
        assert torch.equal(read_state_dict(file, "ema")["w"], EMA["w"])
        assert torch.equal(read_state_dict(file, "model")["w"], RAW["w"])
        # nowhere else is the class taken
        assert argparse.Namespace not in torch.serialization.get_safe_globals()

    def test_other_objects_are_refused_with_the_way_out(self, tmp_path: Path) -> None:
        # as LaMamba's trainer, whose settings are objects of a package
        file = saved(tmp_path / "t.pt", {"model": RAW, "ema": EMA, "config": Settings()})
        with pytest.raises(CheckpointError, match="would run code when loaded") as caught:
            read_state_dict(file, "model")
        assert "torch.load('t.pt', weights_only=False)['model'], 'weights.pt')" in str(caught.value)

    def test_weights_that_are_not_there_are_named(self, tmp_path: Path) -> None:
        file = saved(tmp_path / "t.pt", {"model": RAW, "step": 3})
        with pytest.raises(
            CheckpointError, match=r"below 'ema': its keys are model, step\. Give weights=model"
        ):
            read_state_dict(file)
        empty = saved(tmp_path / "e.pt", {"step": 3})
        with pytest.raises(CheckpointError, match=r"keys are step\. Give a file with a state dict"):
            read_state_dict(empty)
        with pytest.raises(CheckpointError, match=r"one of ema, model, but 'eam'.*mean 'ema'"):
            read_state_dict(file, "eam")

    def test_a_checkpoint_of_ours_needs_no_import(self, tmp_path: Path) -> None:
        file = saved(tmp_path / "step-3.ckpt", {"state_dict": EMA, "genscale": {"step": 3}})
        with pytest.raises(CheckpointError, match=r"needs no import.*genscale\.cli\.export run="):
            read_state_dict(file)

    def test_what_a_state_dict_is(self) -> None:
        assert is_state_dict(EMA)
        assert not any(is_state_dict(x) for x in ({}, {"w": 1}, {1: torch.ones(1)}, [1], None))


class TestDiffusers:
    CONFIG = {"_class_name": "DiTTransformer2DModel", "num_layers": 1}

    def folder(self, path: Path, config: Any = CONFIG) -> Path:
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(config))
        save_file(EMA, path / "diffusion_pytorch_model.safetensors")
        return path

    def test_folder_file_and_pipeline(self, tmp_path: Path) -> None:
        folder = self.folder(tmp_path / "pipe" / "transformer")
        for path in (folder, tmp_path / "pipe", folder / "diffusion_pytorch_model.safetensors"):
            state, config = read_diffusers(path)
            assert torch.equal(state["w"], EMA["w"])
            assert config == self.CONFIG

    def test_shards_are_joined(self, tmp_path: Path) -> None:
        folder = self.folder(tmp_path / "m")
        (folder / "diffusion_pytorch_model.safetensors").unlink()
        for i in (1, 2):
            name = f"diffusion_pytorch_model-0000{i}-of-00002.safetensors"
            save_file({f"w{i}": torch.ones(i)}, folder / name)
        assert set(read_diffusers(folder)[0]) == {"w1", "w2"}

    def test_older_folders_name_the_general_class(self, tmp_path: Path) -> None:
        old = {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero"}
        assert read_diffusers(self.folder(tmp_path / "m", old))[1] == old
        other = {**old, "norm_type": "layer_norm"}
        with pytest.raises(CheckpointError, match="describes Transformer2DModel, but a DiTTrans"):
            read_diffusers(self.folder(tmp_path / "m", other))

    def test_other_folders_are_refused(self, tmp_path: Path) -> None:
        folder = self.folder(tmp_path / "m", {"_class_name": "UNet2DModel"})
        with pytest.raises(CheckpointError, match="describes UNet2DModel, but a DiTTransformer2DM"):
            read_diffusers(folder)
        (folder / "config.json").write_text("{")
        with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
            read_diffusers(folder)
        (folder / "config.json").unlink()
        with pytest.raises(CheckpointError, match=r"config\.json is missing from"):
            read_diffusers(folder)
        with pytest.raises(CheckpointError, match=r"model\.safetensors is missing from"):
            read_diffusers(tmp_path)
