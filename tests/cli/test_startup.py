"""The start of a training run: names, data, processes, and the place it is given."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from genscale.cli.placing import locate
from genscale.cli.startup import (
    adopt_data,
    check_processes,
    default_name,
    forget_hydra,
    quiet_lightning,
)
from genscale.data.base import TensorImages
from genscale.data.clips import ClipDataModule, TensorClips
from genscale.data.module import ImageDataModule
from genscale.errors import CheckpointError, ParallelError
from genscale.runs import RunFolder


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GENSCALE_RUN_DIR", "")


def settings(outputs: Path, **changes: object) -> object:
    node = {"name": "tiny", "paths": {"outputs": str(outputs)}, "run_dir": None, "resume": None}
    return OmegaConf.create(node | changes)


class TestPlace:
    def test_a_new_run_claims_a_folder_of_its_name(self, tmp_path: Path) -> None:
        folder, checkpoint = locate(settings(tmp_path))
        assert folder.path.parent == tmp_path / "tiny"
        assert folder.path.is_dir()
        assert checkpoint is None

    def test_a_further_process_goes_where_it_is_told(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("GENSCALE_RUN_DIR", str(tmp_path / "told"))
        monkeypatch.setenv("LOCAL_RANK", "1")  # as Lightning starts it
        folder, _ = locate(settings(tmp_path / "outputs"))
        assert folder.path == tmp_path / "told"
        assert not (tmp_path / "outputs").exists()  # no folder of its own

    def test_a_job_of_slurm_comes_back_to_its_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SLURM_JOB_ID", "77")
        cfg = settings(tmp_path, seed=1)
        folder, checkpoint = locate(cfg)
        assert folder.path == tmp_path / "tiny" / "slurm-77"
        assert checkpoint is None
        # requeued: the same job finds its checkpoint without being told to resume
        (folder.path / "checkpoints").mkdir(parents=True)
        (folder.path / "checkpoints" / "step-00000005.ckpt").write_bytes(b"")
        folder.config_file.write_text(OmegaConf.to_yaml(cfg))
        assert locate(cfg)[1] == RunFolder(folder.path).checkpoint(5)

    def test_a_checkpoint_of_ones_own_choice(self, tmp_path: Path) -> None:
        run = tmp_path / "tiny" / "a"
        (run / "checkpoints").mkdir(parents=True)
        for step in (5, 10):
            (run / "checkpoints" / f"step-{step:08d}.ckpt").write_bytes(b"")
        cfg = settings(tmp_path)
        (run / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
        file = run / "checkpoints" / "step-00000005.ckpt"
        assert locate(settings(tmp_path, resume=str(file))) == (RunFolder(run), file)
        assert locate(settings(tmp_path, resume="latest"))[1] == RunFolder(run).checkpoint(10)
        with pytest.raises(CheckpointError):
            RunFolder(run).checkpoint(7)


class TestStart:
    def test_a_run_is_named_by_model_and_data(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # an earlier test of the same process may have left Hydra's choices behind
        monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
        cfg = OmegaConf.create({"model": {"_target_": "a.b.DiMR"}, "data": {"name": "digits"}})
        assert default_name(cfg) == "dimr_digits"

    def test_lightning_sees_no_hydra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        config = HydraConfig.instance()
        monkeypatch.setattr(config, "cfg", OmegaConf.create({"hydra": {}}))
        forget_hydra()
        assert not HydraConfig.initialized()

    def test_banners_are_silenced(self) -> None:
        logger = logging.getLogger("lightning.pytorch")
        before = logger.level
        try:
            logger.setLevel(logging.INFO)
            quiet_lightning()
            assert not logger.isEnabledFor(logging.INFO)
            assert logger.isEnabledFor(logging.WARNING)
        finally:
            logger.setLevel(before)

    def test_the_config_says_what_the_data_turned_out_to_be(self) -> None:
        pixels = torch.zeros(6, 3, 8, 8, dtype=torch.uint8)
        images = TensorImages(pixels, torch.arange(6) % 2, class_names=("cat", "dog"), name="pets")
        cfg = OmegaConf.create({"data": {"channels": 3, "num_classes": None}})
        adopt_data(cfg, ImageDataModule(images, batch_size=2))
        assert cfg.data.num_classes == 2  # counted
        assert "resolution" not in cfg.data  # nothing is added that was not there
        assert cfg.data_info.size == 6
        assert cfg.data_info.class_names == ["cat", "dog"]
        assert cfg.data_info.fingerprint == images.fingerprint()
        assert "num_frames" not in cfg.data_info

    def test_the_config_says_how_many_frames_clips_have(self) -> None:
        clips = TensorClips(torch.zeros(4, 3, 5, 8, 8, dtype=torch.uint8), 12.0)
        cfg = OmegaConf.create({"data": {"num_frames": None}})
        adopt_data(cfg, ClipDataModule(clips, batch_size=2))
        assert (cfg.data.num_frames, cfg.data_info.num_frames) == (5, 5)
        assert cfg.data_info.frame_rate == 12.0

    def test_processes_and_trainer_must_agree(self, monkeypatch: pytest.MonkeyPatch) -> None:
        check_processes(SimpleNamespace(world_size=2))  # Lightning will start them
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
        check_processes(SimpleNamespace(world_size=2))
        with pytest.raises(ParallelError, match=r"2 processes were started, but .* is set to 1"):
            check_processes(SimpleNamespace(world_size=1))
