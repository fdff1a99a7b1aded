"""The cache of clip latents: several clips a video, their frame rates and captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from genscale.autoencoders.frames import on_clips
from genscale.autoencoders.kl import KL
from genscale.autoencoders.video_kinds import KINDS
from genscale.autoencoders.video_kl import VideoAutoencoder
from genscale.cli.autoencoding import clip_problems
from genscale.data.clips import TensorClips
from genscale.data.kept_clips import CAPTIONS, KeptCaptions, KeptClips, read_captions_kept
from genscale.data.latent_index import CachePlan, shard_name
from genscale.data.latents import LatentDataModule, Latents
from genscale.data.video_folder import VideoFolder
from genscale.errors import DataError
from genscale.io.images import from_uint8
from genscale.rng import Purpose, key
from tests.conftest import Command
from tests.data.videos import damage, write_video

COUNT = 5


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Wan autoencoder of random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = KINDS["wan"].load_class()(
            **{"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
            **{"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 0.5, 4.0]},
        )
    folder = tmp_path_factory.mktemp("vae") / "wan"
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five videos of two classes with captions."""
    root = tmp_path_factory.mktemp("data") / "videos"
    for row in range(COUNT):
        folder = root / ("cat", "dog")[row % 2]
        write_video(folder / f"{row}.mp4", 12 + row, rate=10)
        (folder / f"{row}.txt").write_text(f"number {row}")
    return root


@pytest.fixture
def words(videos: Path, wan: Path) -> list[str]:
    return [
        *("data=video_folder", f"data.root={videos}", "data.resolution=16", "data.num_frames=5"),
        *("data.num_workers=0", "data.backend=pyav", "autoencoder=wan_vae"),
        *(f"autoencoder.source={wan}", "autoencoder.latent_channels=4"),
        *("shard_size=4", "batch_size=3", "dtype=float32"),
    ]


def make(command: Command, words: list[str], folder: Path, *more: str) -> Path:
    answer = command("cache", *words, f"out_dir={folder}", *more)
    assert answer.status == 0, answer.err
    return folder


def data(videos: Path) -> VideoFolder:
    return VideoFolder(videos, 16, 5, backend="pyav")


def encoder(wan: Path) -> VideoAutoencoder:
    return VideoAutoencoder(source=str(wan), latent_channels=4)


class TestContent:
    def test_one_clip_a_video_is_the_fixed_one(
        self, command: Command, words: list[str], videos: Path, wan: Path, tmp_path: Path
    ) -> None:
        latents = Latents(make(command, words, tmp_path / "c"), verify="digests")
        assert latents.plan.shape == (8, 2, 2, 2)
        assert (len(latents), latents.num_frames, latents.usual_frame_rate) == (COUNT, 5, 10.0)
        rows = torch.arange(COUNT)
        with torch.no_grad():
            for turned in (False, True):
                clips = data(videos).images(rows)
                clips = clips.flip(-1) if turned else clips
                torch.testing.assert_close(
                    latents.moments(rows, torch.full((COUNT,), turned)),
                    encoder(wan).moments(from_uint8(clips)),
                )
        assert latents.labels is not None
        assert latents.labels.tolist() == [0, 0, 0, 1, 1]
        assert latents.frame_rate(rows).tolist() == [10.0] * COUNT
        assert latents.captions == tuple(f"number {i}" for i in (0, 2, 4, 1, 3))
        assert torch.equal(latents.images([3]), data(videos).images([3]))
        part = latents.some(torch.tensor([4, 0]))
        assert part.captions == ["number 3", "number 0"]
        assert part.caption(0, mirrored=True) == "number 3"

    def test_several_clips_of_each_video(
        self, command: Command, words: list[str], videos: Path, wan: Path, tmp_path: Path
    ) -> None:
        more = ("clips_per_video=3", "flip=false", "seed=7", "data.frame_rate=[5,10]")
        latents = Latents(make(command, words, tmp_path / "c", *more))
        assert len(latents) == 3 * COUNT
        assert latents.labels is not None
        assert latents.labels.tolist() == [0] * 9 + [1] * 6
        clips = VideoFolder(videos, 16, 5, backend="pyav", frame_rate=[5.0, 10.0])
        kept = KeptClips(clips, 3, 7)
        pixels, rates = kept.read(range(15))
        assert torch.equal(latents.frame_rate(range(15)), rates)
        with torch.no_grad():
            expected = encoder(wan).moments(from_uint8(pixels))
        torch.testing.assert_close(latents.moments(range(15)), expected)
        # the first is the fixed one; the others are drawn with a key each
        assert torch.equal(pixels[::3], clips.images(range(COUNT)))
        one, rate = clips.clips([1], key(7, torch.tensor([4]), Purpose.CLIP))
        assert torch.equal(pixels[4], one[0])
        assert rates[4] == rate[0]
        assert torch.equal(latents.images([7]), clips.images([2]))

    def test_means_alone_take_half_the_room(
        self, command: Command, words: list[str], tmp_path: Path
    ) -> None:
        whole = Latents(make(command, words, tmp_path / "a", "flip=false"))
        means = Latents(make(command, words, tmp_path / "b", "flip=false", "keep=mode"))
        assert means.plan.shape == (4, 2, 2, 2)
        assert torch.equal(means.moments([2]), whole.moments([2])[:, :4])

    def test_an_autoencoder_of_pictures_takes_frame_after_frame(
        self, command: Command, words: list[str], videos: Path, tiny_vae: Path, tmp_path: Path
    ) -> None:
        other = [word for word in words if not word.startswith("autoencoder")]
        more = (f"autoencoder.source={tiny_vae}", "autoencoder.downsample=2", "flip=false")
        latents = Latents(make(command, other, tmp_path / "c", "autoencoder=sd_vae", *more))
        assert latents.plan.shape == (8, 5, 8, 8)
        kl = KL(source=str(tiny_vae), downsample=2)
        with torch.no_grad():
            expected = on_clips(kl, kl.moments, from_uint8(data(videos).images([3])))
        torch.testing.assert_close(latents.moments([3]), expected)

    def test_an_interrupted_cache_goes_on_to_the_same_bytes(
        self, command: Command, words: list[str], tmp_path: Path
    ) -> None:
        whole = make(command, words, tmp_path / "a", "clips_per_video=2")
        parts = make(command, words, tmp_path / "b", "clips_per_video=2")
        (parts / CAPTIONS).unlink()
        with pytest.raises(DataError, match=r"captions\.json cannot be read"):
            Latents(parts)
        (parts / shard_name(1)).unlink()
        make(command, words, parts, "clips_per_video=2")
        for file in whole.iterdir():
            assert file.read_bytes() == (parts / file.name).read_bytes()


class TestTraining:
    def test_batches_are_those_of_the_clips(
        self, command: Command, words: list[str], tmp_path: Path
    ) -> None:
        latents = Latents(make(command, words, tmp_path / "c"))
        module = LatentDataModule(latents, batch_size=4, num_workers=0)
        module.with_captions = True
        batch: dict[str, Any] = next(iter(module.train_dataloader()))
        assert batch["moments"].shape == (4, 8, 2, 2, 2)
        assert batch["frame_rate"].tolist() == [10.0] * 4
        assert (module.num_frames, module.frame_rate) == (5, 10.0)
        for label, caption in zip(batch["label"].tolist(), batch["caption"], strict=True):
            assert int(caption[-1]) % 2 == label
        assert latents.problems_with(VideoAutoencoder(kind="wan", latent_channels=4)) != []
        (problem,) = latents.problems_with(KL())
        assert "were made with autoencoder.scale=[1.0, 0.5, 2.0, 0.25], but 0.18215" in problem

    def test_mirrored_clips_have_mirrored_captions(self) -> None:
        class Sided(TensorClips):
            def mirrored_caption(self, caption: str) -> str:
                return caption.replace("left", "right")

        clips = Sided(torch.zeros(2, 3, 1, 8, 8, dtype=torch.uint8), captions=["left", "up"])
        kept = KeptClips(clips, 2, 0).captions(mirrored=True)
        assert kept == KeptCaptions(("left", "left", "up", "up"), ("right", "right", "up", "up"))
        assert kept.of(1, mirrored=True) == "right"
        assert kept.of(1, mirrored=False) == "left"
        plain = KeptClips(clips, 1, 0).captions(mirrored=False)
        assert plain is not None
        assert plain.mirrored is None
        assert plain.of(0, mirrored=True) == "left"


class TestRefusals:
    def test_captions_changed_by_hand(self, tmp_path: Path) -> None:
        kept = KeptCaptions(("a", "b"), None)
        kept.write(tmp_path)
        assert read_captions_kept(tmp_path, kept.digest) == kept
        (tmp_path / CAPTIONS).write_text(json.dumps({"captions": ["a", "c"], "mirrored": None}))
        with pytest.raises(DataError, match="does not hold the captions that were written"):
            read_captions_kept(tmp_path, kept.digest)

    def test_what_does_not_fit_is_told_before_anything_is_read(
        self, command: Command, words: list[str], tmp_path: Path
    ) -> None:
        for more, told in (
            ("data.num_frames=6", "1 + 4n frames. Give 5 or 9."),
            ("keep=mean", "keep must be moments or mode"),
            ("clips_per_video=0", "clips_per_video"),
        ):
            answer = command("cache", *words, f"out_dir={tmp_path / 'c'}", more)
            assert answer.status == 1
            assert told in answer.err
        assert not (tmp_path / "c").exists()
        (problem,) = clip_problems(VideoAutoencoder(), 0)
        assert "takes clips, but the data are pictures" in problem
        assert clip_problems(KL(), 6) == []

    def test_other_settings_are_refused_by_name(
        self, command: Command, words: list[str], tmp_path: Path
    ) -> None:
        make(command, words, tmp_path / "c", "flip=false")
        answer = command("cache", *words, f"out_dir={tmp_path / 'c'}", "flip=false", "keep=mode")
        assert answer.status == 1
        assert "is a cache with shape=(8, 2, 2, 2), not (4, 2, 2, 2)" in answer.err

    def test_a_damaged_video_is_never_replaced(
        self, command: Command, words: list[str], tmp_path: Path
    ) -> None:
        for number in range(3):
            write_video(tmp_path / "v" / f"{number}.mp4", 30, codec="libx264")
        damage(tmp_path / "v" / "1.mp4", 0.02, 5000)
        more = (f"data.root={tmp_path / 'v'}", "data.labels=none", "data.damaged=skip")
        unchecked = ("data.verify=none", "data.frame_rate=10")
        answer = command("cache", *words, *more, *unchecked, f"out_dir={tmp_path / 'c'}")
        assert answer.status == 1
        assert "1.mp4 cannot be read, and another video must not be kept" in answer.err
        folder = make(command, words, tmp_path / "d", *more, "data.verify=frames")
        assert len(Latents(folder)) == 2

    def test_plans_of_pictures_are_as_they_were(self) -> None:
        """Their digests must not change with what only clips have: caches would be refused."""
        fields: dict[str, Any] = {
            "data": "d",
            "fingerprint": "f",
            "count": 2,
            "resolution": 8,
            "channels": 3,
            "class_names": (),
            "autoencoder": {},
            "shape": (8, 4, 4),
            "flip": True,
            "dtype": "float16",
            "shard_size": 2,
            "tf32": False,
        }
        assert list(CachePlan(**fields).content()) == list(fields)
        assert CachePlan(**fields, num_frames=4).digest != CachePlan(**fields).digest

    def test_shards_hold_what_the_plan_says(
        self, command: Command, words: list[str], tmp_path: Path
    ) -> None:
        folder = make(command, words, tmp_path / "c")
        shard = load_file(folder / shard_name(0))
        assert set(shard) == {"moments", "mirrored", "labels", "frame_rate"}
        assert shard["frame_rate"].dtype == torch.float32
