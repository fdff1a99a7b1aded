"""The cache of latents: made, interrupted, resumed to the same bytes, and trained from."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file

from genscale.autoencoders.diffusers_folder import WEIGHTS
from genscale.autoencoders.identity import Identity
from genscale.autoencoders.kl import KL
from genscale.cli.app import main
from genscale.cli.autoencoding import autoencoder_problems, channel_problems
from genscale.data.image_folder import ImageFolder
from genscale.data.latent_index import shard_name
from genscale.data.latents import LatentDataModule, Latents
from genscale.data.module import ImageDataModule
from genscale.io.images import from_uint8
from tests.conftest import Command

COUNT, SHARD = 22, 8


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 pictures of two classes."""
    root = tmp_path_factory.mktemp("data") / "pictures"
    numbers = np.random.default_rng(0)
    for row in range(COUNT):
        folder = root / ("cat", "dog")[row % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = numbers.integers(0, 256, (18, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{row:02d}.png")
    return root


@pytest.fixture(scope="module")
def words(pictures: Path, tiny_vae: Path) -> list[str]:
    """What every command of this file shares, but for ``out_dir``."""
    return [
        f"data.root={pictures}",
        "data.resolution=16",
        "data.num_workers=0",
        f"autoencoder.source={tiny_vae}",
        "autoencoder.downsample=2",
        f"shard_size={SHARD}",
        "batch_size=3",
    ]


def make(command: Command, words: list[str], folder: Path, *more: str) -> Path:
    answer = command("cache", *words, f"out_dir={folder}", *more)
    assert answer.status == 0, answer.err
    return folder


def altered(folder: Path, target: Path, name: str) -> Path:
    """Copy an autoencoder with one tensor changed."""
    shutil.copytree(folder, target)
    weights = load_file(target / WEIGHTS[0])
    weights[name] += 1
    save_file(weights, target / WEIGHTS[0])
    return target


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def uninterrupted(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "whole"
    assert main("cache", "genscale.cli.cache:run", argv=[*words, f"out_dir={folder}"]) == 0
    return folder


@pytest.fixture
def whole(uninterrupted: Path, tmp_path: Path) -> Path:
    """A copy of an uninterrupted cache."""
    return shutil.copytree(uninterrupted, tmp_path / "whole")


class TestContent:
    def test_it_holds_the_moments_of_every_picture_and_its_mirror_image(
        self, whole: Path, pictures: Path, tiny_vae: Path
    ) -> None:
        images = ImageFolder(pictures, 16)
        latents = Latents(whole, verify="digests")
        assert len(latents) == COUNT
        rows = torch.arange(COUNT)
        kl = KL(source=str(tiny_vae), downsample=2)
        pixels = from_uint8(images.images(rows))
        with torch.no_grad():
            for which, given in ((False, pixels), (True, pixels.flip(-1))):
                kept = latents.moments(rows, torch.full((COUNT,), which))
                torch.testing.assert_close(kept, kl.moments(given).half(), rtol=2e-3, atol=1e-4)
        assert images.labels is not None
        assert latents.labels is not None
        assert torch.equal(latents.labels, images.labels)

    def test_the_index_says_what_it_is(self, whole: Path, pictures: Path, tiny_vae: Path) -> None:
        index = json.loads((whole / "index.json").read_text())
        assert (index["count"], index["resolution"], index["channels"]) == (COUNT, 16, 3)
        assert (index["num_classes"], index["class_names"]) == (2, ["cat", "dog"])
        assert (index["dtype"], index["flip"], index["shape"]) == ("float16", True, [8, 8, 8])
        assert index["fingerprint"] == ImageFolder(pictures, 16, name="x").fingerprint()
        digest = KL(source=str(tiny_vae), downsample=2).encoder_digest()
        assert index["autoencoder"]["encoder"] == digest
        assert index["source"]["data"]["root"] == str(pictures)
        assert [shard["count"] for shard in index["shards"]] == [8, 8, 6]
        for shard in index["shards"]:
            content = (whole / shard["file"]).read_bytes()
            assert shard["sha256"] == hashlib.sha256(content).hexdigest()
            assert shard["bytes"] == len(content)

    def test_it_tells_how_to_train(
        self, command: Command, words: list[str], tmp_path: Path, tiny_vae: Path
    ) -> None:
        answer = command("cache", *words, f"out_dir={tmp_path / 'c'}")
        assert answer.out.startswith("22 pictures in 3 shards, 45.4 KiB: ")
        assert f"data=latents data.root={tmp_path / 'c'} autoencoder=sd_vae" in answer.out
        assert f"autoencoder.source={tiny_vae}" in answer.out

    def test_options(self, command: Command, words: list[str], tmp_path: Path) -> None:
        plain = make(command, words, tmp_path / "c", "flip=false", "dtype=bfloat16")
        shard = load_file(plain / shard_name(0))
        assert set(shard) == {"moments", "labels"}
        assert shard["moments"].dtype == torch.bfloat16
        folder = make(command, words, tmp_path / "d", "data.labels=none", "data.limit=5")
        unlabelled = Latents(folder)
        assert (len(unlabelled), unlabelled.labels) == (5, None)


class TestResume:
    def test_a_killed_cache_goes_on_to_the_same_bytes(
        self,
        command: Command,
        words: list[str],
        tmp_path: Path,
        whole: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        folder, plain = tmp_path / "killed", KL.moments
        calls = []

        def interrupted(self: KL, images: torch.Tensor) -> torch.Tensor:
            if len(calls) == 9:  # in the second shard: three batches of two calls make one
                raise KeyboardInterrupt
            calls.append(len(images))
            return plain(self, images)

        monkeypatch.setattr(KL, "moments", interrupted)
        assert command("cache", *words, f"out_dir={folder}").status == 130
        assert sorted(contents(folder)) == ["index.json", shard_name(0)]
        train = ("data=latents", f"data.root={folder}", "autoencoder=sd_vae")
        answer = command("train", "model=dit", *train)
        assert "is unfinished: 1 of 3 shards" in answer.err

        calls.clear()
        (folder / ".latents-00001.torn.safetensors").write_bytes(b"half")
        monkeypatch.setattr(KL, "moments", plain)
        answer = command("cache", *words, f"out_dir={folder}")
        assert "(1 shards were there)" in answer.out
        assert contents(folder) == contents(whole)

    def test_only_what_is_missing_is_encoded(
        self, command: Command, words: list[str], whole: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before, plain, encoded = contents(whole), KL.moments, []

        def counted(self: KL, images: torch.Tensor) -> torch.Tensor:
            encoded.append(len(images))
            return plain(self, images)

        monkeypatch.setattr(KL, "moments", counted)
        (whole / shard_name(2)).unlink()
        make(command, words, whole)
        assert sum(encoded) == 2 * 6
        assert contents(whole) == before
        encoded.clear()
        make(command, words, whole)
        assert encoded == []
        assert contents(whole) == before

    def test_damaged_and_foreign_shards_are_reported_and_left_alone(
        self, command: Command, words: list[str], whole: Path, tmp_path: Path
    ) -> None:
        other = make(command, words, tmp_path / "other", "dtype=float32")
        expected = contents(whole)
        cut = (whole / shard_name(0)).read_bytes()[:-100]
        (whole / shard_name(0)).write_bytes(cut)
        flipped = bytearray((whole / shard_name(1)).read_bytes())
        flipped[-5] ^= 4
        (whole / shard_name(1)).write_bytes(flipped)
        shutil.copy(other / shard_name(2), whole / shard_name(2))
        answer = command("cache", *words, f"out_dir={whole}")
        assert answer.status == 1
        lines = answer.err.splitlines()
        assert [f"0000{i}" in line for i, line in enumerate(lines)] == [True] * 3
        assert "is damaged" in lines[0]
        assert "its content is not what was written" in lines[1]
        assert "is foreign" in lines[2]
        assert (whole / shard_name(0)).read_bytes() == cut
        for number in range(3):
            (whole / shard_name(number)).unlink()
        assert contents(make(command, words, whole)) == expected

    def test_another_cache_in_the_same_folder_is_refused(
        self, command: Command, words: list[str], whole: Path, tmp_path: Path, tiny_vae: Path
    ) -> None:
        vae = altered(tiny_vae, tmp_path / "vae", "encoder.conv_in.bias")
        before = contents(whole)
        for change, sentence in (
            ("dtype=float32", "is a cache with dtype=float16, not float32."),
            ("data.limit=7", "is a cache with fingerprint="),
            (f"autoencoder.source={vae}", "is a cache with autoencoder.encoder="),
        ):
            answer = command("cache", *words, f"out_dir={whole}", change)
            assert answer.status == 1
            assert sentence in answer.err
            assert len(answer.err.splitlines()) == 1
        (whole / "index.json").rename(tmp_path / "index.json")
        answer = command("cache", *words, f"out_dir={whole}")
        assert "holds shards without an index.json" in answer.err
        shutil.copy(tmp_path / "index.json", whole)
        assert contents(whole) == before

    @pytest.mark.dist
    @pytest.mark.slow
    def test_two_processes_share_the_shards(
        self,
        words: list[str],
        whole: Path,
        tmp_path: Path,
        repository: Path,
        subprocess_environment: dict[str, str],
    ) -> None:
        folder = tmp_path / "shared"
        program = [sys.executable, "-m", "genscale.cli.cache", *words, f"out_dir={folder}"]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        children = [
            subprocess.Popen(
                program,
                cwd=repository,
                env={**subprocess_environment, **group, "RANK": rank, "LOCAL_RANK": rank},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in ("0", "1")
        ]
        told = [child.communicate(timeout=120) for child in children]
        assert [child.returncode for child in children] == [0, 0], told
        assert contents(folder) == contents(whole)
        assert told[0][0].startswith("22 pictures in 3 shards")
        assert told[1][0] == ""


class TestMistakes:
    def test_all_wrong_settings_are_told_at_once(self, command: Command, words: list[str]) -> None:
        answer = command("cache", *words, "dtype=float61", "flip=maybe", "shard_size=0")
        assert answer.status == 1
        told = answer.err.splitlines()
        assert len(told) == 4
        assert "shard_size must be a whole number of at least 1" in told[0]
        assert "out_dir is not set. Give out_dir=<folder of the latents>." in told[1]
        assert told[2].endswith("Did you mean 'float16'?")
        assert "flip must be true or false, but 'maybe' was given." in told[3]

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            (["shard_sise=4"], "Did you mean 'shard_size'?"),
            (["autoencoder=identity", "~autoencoder.source"], "Identity has no moments to keep"),
            (["autoencoder.source=null"], "its weights are needed to encode pictures"),
            (["autoencoder.scale=0.5"], "autoencoder.scale=0.5, but the config.json"),
            (["data.channels=1"], "takes pictures of 3 channels. Give data.channels=3"),
            (["data.resolution=17"], "does not divide by autoencoder.downsample=2"),
            (["data.root=null"], "data.root is not set"),
        ],
    )
    def test_a_sentence_and_no_folder(
        self,
        command: Command,
        words: list[str],
        tmp_path: Path,
        changes: list[str],
        sentence: str,
    ) -> None:
        if changes[0] == "autoencoder=identity":
            words, changes = words[:3], changes[:1]
        answer = command("cache", *words, f"out_dir={tmp_path / 'c'}", *changes)
        assert answer.status == 1
        assert sentence in answer.err
        assert not (tmp_path / "c").exists()

    def test_latents_are_not_cached_again(
        self, command: Command, words: list[str], whole: Path, tmp_path: Path
    ) -> None:
        answer = command(
            "cache", "data=latents", f"data.root={whole}", *words[3:], f"out_dir={tmp_path / 'c'}"
        )
        assert "holds latents already" in answer.err

    def test_numbers_that_a_type_cannot_hold_stop_it(
        self, command: Command, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plain = KL.moments
        monkeypatch.setattr(KL, "moments", lambda self, images: plain(self, images) * 1e6)
        answer = command("cache", *words, f"out_dir={tmp_path / 'c'}")
        assert "rows 0 to 2 are not finite in float16. Give dtype=float32" in answer.err

    def test_help_names_the_command(self, repository: Path) -> None:
        result = subprocess.run(
            [sys.executable, "-m", "genscale.cli.cache", "--help"],
            cwd=repository,
            capture_output=True,
            text=True,
            check=True,
        )
        assert result.stdout.startswith("usage: python -m genscale.cli.cache [group=option")
        assert "dtype=float16" in result.stdout


class TestProblems:
    def config(self, **autoencoder: Any) -> DictConfig:
        node = {"_target_": "genscale.autoencoders.kl.KL", "downsample": 2, **autoencoder}
        intervals = {"sample_every": 0, "metrics_every": 0}
        return OmegaConf.create({"autoencoder": node, "callbacks": intervals, "model": {}})

    def test_pictures_need_an_encoder_and_grids_a_decoder(
        self, pictures: Path, whole: Path, tiny_vae: Path
    ) -> None:
        images = ImageDataModule(ImageFolder(pictures, 16), batch_size=2)
        latents = LatentDataModule(Latents(whole), batch_size=2)
        bare, given = self.config(), self.config(source=str(tiny_vae))
        assert autoencoder_problems(given, images) == autoencoder_problems(given, latents) == []
        assert autoencoder_problems(bare, latents) == []
        (problem,) = autoencoder_problems(bare, images)
        assert "needed to encode pictures" in problem
        bare.callbacks.sample_every = 10
        (problem,) = autoencoder_problems(bare, latents)
        assert "needed to decode samples" in problem

    def test_channels_of_pictures(self) -> None:
        assert channel_problems(Identity(latent_channels=1), 1) == []
        assert channel_problems(KL(), 3) == []
        assert len(channel_problems(KL(), 1)) == 1


@pytest.fixture
def training(whole: Path, tmp_path: Path, tiny_vae: Path) -> list[str]:
    """A short run from the cache; sizes and classes are the cache's own."""
    return [
        "model=dit",
        *("model.hidden_size=16", "model.depth=1", "model.num_heads=2"),
        *("debug=smoke", "batch_size=8", "sampler.steps=2", "callbacks.sample_count=4"),
        *("data=latents", f"data.root={whole}", "data.num_workers=0"),
        *("autoencoder=sd_vae", f"autoencoder.source={tiny_vae}", "autoencoder.downsample=2"),
        f"paths.outputs={tmp_path / 'outputs'}",
    ]


class TestTraining:
    def test_train_sample_evaluate(
        self, command: Command, training: list[str], tmp_path: Path, pictures: Path, whole: Path
    ) -> None:
        answer = command("train", *training)
        assert answer.status == 0, answer.err
        run = tmp_path / "outputs" / "latest"
        with Image.open(run / "samples" / "step-00000020.png") as grid:
            assert grid.mode == "RGB"
        summary = json.loads((run / "summary.json").read_text())
        assert summary["steps"] == 20
        answer = command("sample", f"run={run}", "num_samples=4", "format=npz", "labels=[0,1]")
        assert answer.status == 0, answer.err
        words = ("num_samples=8", "metrics.metrics=[fd_pixels]", "labels=random")
        answer = command("evaluate", f"run={run}", *words, f"out_dir={tmp_path / 'e'}")
        assert answer.status == 0, answer.err
        record = json.loads((tmp_path / "e" / "metrics.json").read_text())
        (protocol,) = record["protocols"].values()
        assert protocol["reference_count"] == COUNT
        assert protocol["autoencoder"].startswith("kl:")
        # its pictures gone, a reference must be given
        moved = pictures.rename(tmp_path / "moved")
        try:
            answer = command("evaluate", f"run={run}", *words)
        finally:
            moved.rename(pictures)
        assert answer.status == 1
        assert "The pictures cannot be read: There is no folder" in answer.err
        assert "reference=<statistics or npz>" in answer.err

    def test_no_weights_are_needed_without_grids_and_may_be_given_to_sample(
        self, command: Command, training: list[str], tmp_path: Path, tiny_vae: Path
    ) -> None:
        words = [word for word in training if not word.startswith("autoencoder.source")]
        answer = command("train", *words)
        assert answer.status == 1
        assert "its weights are needed to decode samples" in answer.err
        answer = command("train", *words, "callbacks.sample_every=0", "trainer.max_steps=2")
        assert answer.status == 0, answer.err
        run = f"run={tmp_path / 'outputs' / 'latest'}"
        answer = command("sample", run, "num_samples=1")
        assert answer.status == 1
        assert "its weights are needed to decode samples" in answer.err
        assert len(answer.err.splitlines()) == 1
        answer = command("sample", run, "num_samples=1", f"autoencoder.source={tiny_vae}")
        assert answer.status == 0, answer.err

    def test_another_autoencoder_is_refused_before_the_first_step(
        self, command: Command, training: list[str], tmp_path: Path, tiny_vae: Path
    ) -> None:
        vae = altered(tiny_vae, tmp_path / "vae", "encoder.conv_in.bias")
        bare = [word for word in training if not word.startswith("autoencoder")]
        quiet = "callbacks.sample_every=0"
        for words, sentence in (
            ([*training, f"autoencoder.source={vae}"], "made by an encoder with weights"),
            ([*bare, "autoencoder=sd_vae", quiet], "made with autoencoder.downsample=2, but 8"),
            ([*bare, "autoencoder=flux_vae", quiet], "autoencoder.latent_channels=4, but 16"),
            (bare, "holds latents, but the autoencoder is Identity, which has none"),
        ):
            answer = command("train", *words)
            assert answer.status == 1
            assert sentence in answer.err
            assert len(answer.err.splitlines()) == 1
        assert not (tmp_path / "outputs").exists()

    def test_a_tuned_decoder_is_no_other_autoencoder(
        self, command: Command, training: list[str], tmp_path: Path, tiny_vae: Path
    ) -> None:
        vae = altered(tiny_vae, tmp_path / "vae", "decoder.conv_out.bias")
        answer = command("train", *training, f"autoencoder.source={vae}", "trainer.max_steps=1")
        assert answer.status == 0, answer.err

    def test_pictures_may_be_encoded_on_the_way(
        self, command: Command, training: list[str], pictures: Path
    ) -> None:
        words = [word for word in training if not word.startswith("data")]
        folder = ("data=image_folder", f"data.root={pictures}", "data.resolution=16")
        answer = command("train", *words, *folder, "data.num_workers=0", "trainer.max_steps=2")
        assert answer.status == 0, answer.err
        answer = command("train", *words, "data=digits")
        assert "data.channels=1, but the autoencoder takes pictures of 3 channels" in answer.err

    def test_metrics_during_training_need_the_pictures(
        self, command: Command, training: list[str], pictures: Path, tmp_path: Path
    ) -> None:
        moved = pictures.rename(tmp_path / "moved")
        try:
            answer = command("train", *training, "callbacks.metrics_every=10")
        finally:
            moved.rename(pictures)
        assert answer.status == 1
        assert "reference=<statistics or npz>" in answer.err
