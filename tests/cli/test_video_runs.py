"""Runs on video files: broken ones on the way, and latents of a video autoencoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from genscale.autoencoders.video_kinds import KINDS
from genscale.backbones.base import parameter_count
from genscale.cli.building import instantiate
from genscale.cli.resolvers import latent_frames, register_resolvers
from genscale.cli.startup import check
from genscale.errors import ConfigError
from genscale.runs import RunFolder
from tests.cli.conftest import TINY_CLIPS
from tests.conftest import Command
from tests.data.videos import damage, write_video

SMALL = [word for word in TINY_CLIPS if not word.startswith("data.")]


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Five videos with captions, of which one is broken in the middle."""
    for number in range(5):
        video = write_video(tmp_path / "videos" / f"{number}.mp4", 40, codec="libx264")
        video.with_suffix(".txt").write_text(f"number {number}")
    damage(tmp_path / "videos" / "3.mp4", length=300)
    return tmp_path / "videos"


def words_of(videos: Path) -> list[str]:
    return [
        *SMALL,
        *("data=video_folder", f"data.root={videos}", "data.labels=none", "data.num_workers=0"),
        *("data.backend=pyav", "data.resolution=16", "data.num_frames=4"),
    ]


@pytest.mark.slow
def test_training_goes_on_past_a_broken_file_counts_it_and_resumes_to_the_same_weights(
    command: Command, videos: Path, tmp_path: Path
) -> None:
    """The broken file is met in training alone: its header is as good as any."""
    words = [*words_of(videos), f"paths.outputs={tmp_path / 'outputs'}", "data.frame_rate=10"]
    stopped = command("train", *words, f"run_dir={tmp_path / 'e'}")
    assert stopped.status == 1
    assert "3.mp4 cannot be read as a video" in stopped.err
    assert "Traceback" not in stopped.err
    words += ["data.damaged=skip", "callbacks.checkpoint_every=2"]
    whole = command("train", *words, f"run_dir={tmp_path / 'w'}")
    assert whole.status == 0, whole.err
    summary = json.loads((tmp_path / "w" / "summary.json").read_text())
    assert 1 <= summary["replaced_samples"] <= 4  # of 16 samples, 3 or 4 are of that file
    half = command("train", *words, f"run_dir={tmp_path / 'h'}", "trainer.max_steps=2")
    assert half.status == 0, half.err
    rest = command("train", *words, f"run_dir={tmp_path / 'h'}", "resume=latest")
    assert rest.status == 0, rest.err
    resumed = json.loads((tmp_path / "h" / "summary.json").read_text())
    assert resumed["replaced_samples"] == summary["replaced_samples"]
    ends = []
    for name in ("w", "h"):
        checkpoints = RunFolder(tmp_path / name).checkpoints()
        ends.append(torch.load(checkpoints[max(checkpoints)], weights_only=True)["state_dict"])
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_model_of_clips_trains_from_cached_latents(
    command: Command, videos: Path, tmp_path: Path
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = KINDS["wan"].load_class()(
            **{"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
            **{"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 0.5, 4.0]},
        )
    vae.save_pretrained(tmp_path / "wan")
    encoder = [
        *("autoencoder=wan_vae", f"autoencoder.source={tmp_path / 'wan'}"),
        "autoencoder.latent_channels=4",
    ]
    data = [word for word in words_of(videos) if word.startswith("data")]
    data += ["data.num_frames=13", "data.verify=frames", "data.damaged=skip", "data.resolution=32"]
    folder = tmp_path / "latents"
    cached = command("cache", *data, *encoder, f"out_dir={folder}", "clips_per_video=2")
    assert cached.status == 0, cached.err
    assert "8 clips in 1 shards" in cached.out
    answer = command(
        *("train", *SMALL, *encoder, "data=video_latents", f"data.root={folder}"),
        *("data.num_workers=0", "model.patch_size=[1,1,1]", f"run_dir={tmp_path / 'run'}"),
        f"paths.outputs={tmp_path / 'outputs'}",
    )
    assert answer.status == 0, answer.err
    config = RunFolder(tmp_path / "run").config()
    assert config["model"]["input_size"] == [4, 4, 4]  # 1 + 3 latent frames of 13
    assert config["data_info"]["num_frames"] == 13
    sampled = command(
        *("sample", f"run={tmp_path / 'run'}", "num_samples=2", "format=npz", "prompts=[number 1]"),
        *(f"out_dir={tmp_path / 'samples'}", "guidance.scale=1"),
    )
    assert sampled.status == 0, sampled.err
    import numpy as np

    assert np.load(tmp_path / "samples" / "samples.npz")["arr_0"].shape == (2, 13, 32, 32, 3)


def test_a_sampler_of_the_trained_length_waits_for_data_to_tell_it() -> None:
    register_resolvers()
    conf = str(Path(__file__).resolve().parents[2] / "conf")
    with initialize_config_dir(conf, version_base="1.3"):
        words = ["model=causal_video", "data=video_latents", "data.root=missing"]
        cfg = compose("train", overrides=words)
        with pytest.raises(ConfigError, match="missing") as refusal:
            check(cfg)  # of the data alone, which are not there
        assert "trained_frames" not in str(refusal.value)


@pytest.mark.parametrize(
    ("experiment", "parameters"),
    [("causal_video_sprites", 3_932_752), ("snap_video_sprites", 7_004_200)],
)
def test_recipes_of_sprites_read_latents_of_a_quarter_of_the_sides(
    experiment: str, parameters: int
) -> None:
    register_resolvers()
    conf = str(Path(__file__).resolve().parents[2] / "conf")
    with initialize_config_dir(conf, version_base="1.3"):
        cfg = compose("train", overrides=[f"experiment={experiment}", "data.root=missing"])
    assert cfg.model.input_size == [8, 8, 8]
    cfg.data.num_classes = 0  # which the data tell
    assert parameter_count(instantiate(cfg.model, "model")) == parameters


def test_latent_frames_follow_the_autoencoder() -> None:
    register_resolvers()
    conf = str(Path(__file__).resolve().parents[2] / "conf")
    with initialize_config_dir(conf, version_base="1.3"):
        for frames, option, expected in (
            (17, "wan_vae", 5),
            (17, "ltx_vae", 3),
            (16, "allegro_vae", 4),
            (16, "identity", 16),
        ):
            words = ["model=snap_video", f"autoencoder={option}", f"data.num_frames={frames}"]
            cfg = compose("train", overrides=words)
            assert latent_frames(frames, cfg.autoencoder) == expected
            side = cfg.data.resolution // cfg.autoencoder.downsample
            assert cfg.model.input_size == [expected, side, side]
        assert latent_frames(None, cfg.autoencoder) is None
        cfg = compose("train", overrides=["autoencoder=wan_vae"])
        with pytest.raises(ConfigError, match="Give 13 or 17"):
            latent_frames(16, cfg.autoencoder)
