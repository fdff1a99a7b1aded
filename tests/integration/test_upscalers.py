"""Upscalers trained, broken off, resumed, exported, judged against interpolation, and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from genscale.autoencoders.kl_network import TrainedKL
from genscale.cli.autoencoding import settle_autoencoder
from genscale.cli.enlarging import enlarges
from genscale.cli.resolvers import share, trained
from genscale.cli.trained_autoencoders import trained_node
from genscale.data.digits import Digits
from genscale.errors import ConfigError
from genscale.io.images import from_uint8
from genscale.runs import RunFolder, read_jsonl
from genscale.training.autoencoder_run import trains_autoencoder
from genscale.training.latent_upscaling import LatentUpscalingTraining
from genscale.training.upscaler_run import (
    build_training,
    enlarge_first,
    enlarged,
    load_training,
    shown_small,
)
from genscale.upscaling.loading import load_upscaler
from scripts.check_exactness import differences
from tests.integration.test_tokenizer import stop_at

DATA = ("data=digits", "data.resolution=8", "batch_size=8")
LOOKS = (
    *("callbacks.log_every=1", "callbacks.checkpoint_every=3", "callbacks.sample_every=4"),
    *("callbacks.sample_count=8", "callbacks.metrics_every=8", "callbacks.metrics_samples=20"),
)
LUA = (
    *("model=lua", "model.hidden_size=8", "model.num_heads=[2]", "model.depths=[2]"),
    *("model.head_size=4", "model.drop_path=0.1", "model.scales=[2,4]", "trainer.max_steps=8"),
    *("objective.stages={latent: 3, latent_pixel: 3, pixel: 2}", "objective.turned=true"),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of an autoencoder, ``kl``, and of a LUA on its latents, ``lua``."""
    import os

    from genscale.cli.app import main

    folder = tmp_path_factory.mktemp("upscalers")
    kl = (
        *("model=kl_small", "model.hidden_size=4", "model.channel_multipliers=[1,1]"),
        *("model.norm_groups=2", "model.latent_channels=2", "trainer.max_steps=4"),
        *("callbacks.sample_every=0", "callbacks.checkpoint_every=0"),
    )
    lua = (*LUA, *LOOKS, "autoencoder=run", f"autoencoder.run={folder}/kl")
    for name, words in (("kl", kl), ("lua", lua)):
        options = (*words, *DATA, f"run_dir={folder}/{name}", f"paths.outputs={folder}")
        assert main("train", "genscale.cli.train:run", argv=list(options)) == 0
        os.environ.pop("GENSCALE_RUN_DIR", None)
    return folder


def test_stages_follow_each_other_and_a_broken_run_goes_on(
    runs: Path, command: Any, tmp_path: Path
) -> None:
    """Broken off in the first stage, resumed, it ends with the bits of one left alone."""
    rows = [row for row in read_jsonl(runs / "lua" / "metrics.jsonl") if "train/stage" in row]
    assert [row["train/stage"] for row in rows] == [1, 1, 1, 2, 2, 2, 3, 3]
    assert "train/psnr_x2" not in rows[0]  # nothing is decoded in the first stage
    options = (*LUA, *LOOKS, *DATA, "autoencoder=run", f"autoencoder.run={runs}/kl")
    words = (*options, f"run_dir={tmp_path}/broken", f"paths.outputs={tmp_path}")
    stop_at(4, command, *words)
    assert max(RunFolder(tmp_path / "broken").checkpoints()) == 3
    # any checkpoint can be used, finished run or not
    assert load_upscaler(tmp_path / "broken")[1].step == 3
    answer = command("train", *words, "resume=latest")
    assert answer.status == 0, answer.err
    assert differences(runs / "lua", tmp_path / "broken") == []


class TestRun:
    def test_its_export_is_its_average_and_knows_its_latents(
        self, runs: Path, command: Any
    ) -> None:
        network, facts = load_upscaler(runs / "lua")
        exported, told = load_upscaler(runs / "lua" / "export")
        assert facts == told
        assert (facts.step, facts.weights, facts.data) == (8, "ema_0.998", "digits")
        assert facts.autoencoder is not None
        trained_kl = TrainedKL(run=str(runs / "kl"), latent_channels=2, downsample=2)
        assert facts.autoencoder["encoder"] == trained_kl.encoder_digest()
        u = torch.linspace(-1, 1, 32).view(1, 2, 4, 4)
        assert torch.equal(network(u, 2), exported(u, 2))
        raw, _ = load_upscaler(runs / "lua", weights="raw")
        assert not torch.equal(network(u, 2), raw(u, 2))
        answer = command("export", f"run={runs}/lua")
        assert f"is {runs}/lua/export already" in answer.err

    def test_what_it_makes_is_seen(self, runs: Path) -> None:
        training, facts = load_training(runs / "lua", device="cpu")
        assert isinstance(training, LatentUpscalingTraining)
        assert facts.scales == (2, 4)
        images = from_uint8(Digits("heldout", 8).images(range(3)))
        made = enlarged(training, images, 2)
        assert list(made) == ["", "bicubic", "bicubic_decoded", "bicubic_latent", "autoencoder"]
        assert torch.equal(made[""], enlarge_first(training, training.model, images))
        squares = shown_small(training, images, 4)
        assert torch.equal(squares[..., :4, :4], squares[..., :1, :1].expand(-1, -1, 4, 4))
        config = RunFolder(runs / "lua").config()
        assert not trains_autoencoder(config)
        assert build_training(config, training.model).model is training.model

    def test_it_is_evaluated_beside_interpolation(
        self, runs: Path, command: Any, tmp_path: Path
    ) -> None:
        words = (f"run={runs}/lua", "num_samples=20", "device=cpu", "batch_size=7")
        answer = command("evaluate", *words, f"out_dir={tmp_path}")
        assert answer.status == 0, answer.err
        record = json.loads((tmp_path / "metrics.json").read_text())
        found = {row["name"]: row for row in record["metrics"]}
        others = ("", "_bicubic", "_bicubic_decoded", "_bicubic_latent", "_autoencoder")
        assert set(found) == {
            f"{score}_y_x{scale}{other}"
            for score in ("psnr", "ssim")
            for scale in (2, 4)
            for other in others
        }
        protocols = [record["protocols"][found[f"psnr_y_x{s}"]["protocol"]] for s in (2, 4)]
        assert [dict(p["settings"])["scale"] for p in protocols] == [2, 4]
        assert protocols[0]["autoencoder"].startswith("kl:")
        assert (tmp_path / "grid.png").is_file()
        assert found["psnr_y_x2_bicubic"]["value"] > found["psnr_y_x4_bicubic"]["value"]
        assert enlarges(OmegaConf.create({"run": f"{runs}/lua"}))
        assert not enlarges(OmegaConf.create({"run": f"{runs}/kl"}))

    def test_samples_are_pictures_made_large_again(
        self, runs: Path, command: Any, tmp_path: Path
    ) -> None:
        words = (f"run={runs}/lua", "num_samples=3", "format=png", f"out_dir={tmp_path}")
        answer = command("sample", *words)
        assert answer.status == 0, answer.err
        assert "3 held-out pictures made small and large again" in answer.out
        assert (tmp_path / "00002.png").is_file()
        refused = command("sample", *words, "sampler=ddim")
        assert "trained an upscaler, which makes held-out pictures small" in refused.err


def test_upscalers_of_pictures(command: Any, tmp_path: Path) -> None:
    words = ("model=irn", "model.num_blocks=[1]", "model.growth=2", "objective.patch_size=4")
    quiet = ("trainer.max_steps=2", "callbacks.sample_every=0", "callbacks.metrics_every=0")
    options = (*words, *DATA, *LOOKS, *quiet, f"paths.outputs={tmp_path}")
    answer = command("train", *options, f"run_dir={tmp_path}/run")
    assert answer.status == 0, answer.err
    answer = command("evaluate", f"run={tmp_path}/run", "num_samples=9", f"out_dir={tmp_path}/e")
    assert answer.status == 0, answer.err
    record = json.loads((tmp_path / "e" / "metrics.json").read_text())
    names = {row["name"] for row in record["metrics"]}
    assert names == {f"{s}_y_x2{o}" for s in ("psnr", "ssim") for o in ("", "_bicubic")}
    network, facts = load_upscaler(tmp_path / "run" / "export")
    assert (facts.space, network.channels, facts.autoencoder) == ("pixel", 1, None)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("model=lua",), "autoencoder.run is not set. Train one with: python train.py"),
        (("model=lua", "autoencoder=identity"), "the autoencoder leaves pictures as they are"),
        (
            ("model=irn", "objective=flow", "autoencoder=kl_small", "trainer.precision=bf16-mixed"),
            "does not train IRN. Give objective=rescaling",
        ),
        (("model=dimr", "objective=lua"), "DiMR is none. Give model=lua"),
        (("model=swinir", "data.resolution=15"), "data.resolution=15 does not divide by the scale"),
        (("model=espcn", "data=moving_sprites"), "holds clips, but upscalers are trained on"),
    ],
)
def test_what_does_not_fit_is_refused(
    words: tuple[str, ...], sentence: str, command: Any, tmp_path: Path
) -> None:
    answer = command("train", *words, f"paths.outputs={tmp_path}")
    assert answer.status == 1, answer.out
    assert sentence in answer.err
    assert "Traceback" not in answer.err
    if "objective=flow" in words:  # all of them at once
        assert "IRN enlarges pictures, but an autoencoder" in answer.err
        assert "none in half precision" in answer.err


class TestAutoencoderOfARun:
    def test_it_is_told_by_the_run(self, runs: Path) -> None:
        run = str(runs / "kl")
        node = trained_node(run)
        assert node["_target_"].endswith(".TrainedKL")
        sizes = ("latent_channels", "downsample", "image_channels")
        assert [node[name] for name in sizes] == [2, 2, 1]
        assert [trained(run, name) for name in sizes] == [2, 2, 1]
        assert trained(None, "downsample") is trained(str(runs / "lua"), "downsample") is None
        with pytest.raises(ConfigError, match="trained LUA, which is no autoencoder"):
            trained_node(str(runs / "lua"))

    def test_other_places_beside_it_are_refused(self, runs: Path) -> None:
        with pytest.raises(ConfigError, match="autoencoder=run needs the folder of a run"):
            settle_autoencoder(OmegaConf.create({"autoencoder": {"run": None}}))
        cfg = OmegaConf.create({"autoencoder": {"run": str(runs / "kl"), "subfolder": "vae"}})
        with pytest.raises(ConfigError, match=r"autoencoder\.subfolder was given"):
            settle_autoencoder(cfg)

    def test_shares_are_whole_numbers(self) -> None:
        assert [share(801, part) for part in (0.5, 0.25, 1.0)] == [400, 200, 801]
        with pytest.raises(ConfigError, match=r"asked for 1\.5 of 10"):
            share(10, 1.5)
