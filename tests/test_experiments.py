"""The published recipes: every number of their papers' tables, and that they train."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from genscale.backbones.base import parameter_count
from genscale.cli.app import conf_directory
from genscale.cli.building import instantiate
from genscale.cli.combinations import combination_problems
from genscale.cli.resolvers import register_resolvers
from genscale.data.latent_index import CacheIndex, CachePlan, write_shard
from genscale.io.images import to_uint8
from genscale.runs import RunFolder

FOLDER = conf_directory() / "experiment"
WORDS = ("data.root=CACHE", "autoencoder.source=VAE")


@dataclass(frozen=True)
class Published:
    """What a paper, or its official program, says of a model and how it was trained."""

    parameters: int
    gigamacs: float
    lr: float
    betas: tuple[float, float]
    weight_decay: float
    warmup: int
    batch: int
    steps: int
    sampler: tuple[str, int]
    scale: float
    channels: int | None
    labels: str
    autoencoder: str = "sd_vae"  # ft-ema; sd_vae_mse is ft-mse


# parameters: those that are trained. DiT's and SiT's fixed position table of 256 x 1152 numbers,
# which the official files hold too, is not among them: with it they are 675,129,632.
DIT = Published(
    parameters=674_834_720,
    gigamacs=118.6,
    lr=1e-4,
    betas=(0.9, 0.999),
    weight_decay=0.0,
    warmup=0,
    batch=256,
    steps=7_000_000,
    sampler=("Ancestral", 250),
    scale=1.5,
    channels=3,
    labels="random",
)
DIMR = Published(
    parameters=505_046_408,
    gigamacs=160.2,
    lr=2e-4,
    betas=(0.99, 0.99),
    weight_decay=0.03,
    warmup=5000,
    batch=1024,
    steps=1_000_000,
    sampler=("DPMSolverFast", 250),
    scale=1.4,
    channels=None,
    labels="balanced",
)
PUBLISHED = {
    "dit_xl_2_imagenet256": DIT,
    "sit_xl_2_imagenet256": replace(DIT, sampler=("ReverseSDE", 250)),
    "dimr_xl_2r_imagenet256": DIMR,
    "dimr_g_2r_imagenet256": replace(DIMR, parameters=1_056_352_904, gigamacs=331.1),
    "uvit_h_2_imagenet256": replace(
        DIMR,
        parameters=500_832_016,
        gigamacs=133.2,
        steps=500_000,
        sampler=("DPMSolverFast", 50),
        labels="random",
    ),
    "lamamba_xl_imagenet256": replace(
        DIT,
        parameters=652_484_648,
        gigamacs=45.6,
        weight_decay=0.01,
        channels=None,
        autoencoder="sd_vae_mse",
    ),
}


def composed(experiment: str, *words: str) -> DictConfig:
    register_resolvers()
    with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        return compose("train", overrides=[f"experiment={experiment}", *WORDS, *words])


# MSVQ's program was never released: sizes and losses are the paper's, all other numbers ours; the
# small ones are for a CPU
UNPUBLISHED = {"msvq_openimages", "msvq_scenes", "msvq_emoji", "dit_text_scenes"}
UNPUBLISHED |= {"causal_video_sprites", "snap_video_sprites"}
UNPUBLISHED |= {"kl_emoji", "lua_emoji", "swinir_emoji"}


def test_every_experiment_is_held_to_a_table() -> None:
    names = {path.stem for path in FOLDER.glob("*.yaml")}
    # VAR's and M-VAR's are held in test_scale_wise_experiments.py; Switti's is not published whole
    # Snap Video's networks are held in backbones/test_fit.py; its data are not published
    elsewhere = ("var_", "mvar_", "switti_", "snap_video_")
    names = {name for name in names if not name.startswith(elsewhere)}
    assert names - UNPUBLISHED == set(PUBLISHED)


def test_the_tokenizer_has_the_size_of_the_paper() -> None:
    register_resolvers()
    with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        cfg = compose("train", overrides=["experiment=msvq_openimages", "data.root=PICTURES"])
    with torch.device("meta"):
        model = instantiate(cfg.model, "model")
        training = instantiate(cfg.objective, "objective").build(model, seed=0)
    assert sum(p.numel() for p in model.parameters()) == 108_948_355  # the paper: 108.9 M
    assert (model.sample_shape, model.num_tokens) == ((3, 256, 256), 680)
    assert set(training.groups()) == {"model", "discriminator"}


@pytest.mark.parametrize("name", PUBLISHED)
class TestPublished:
    def test_the_network_is_the_published_one(self, name: str) -> None:
        cfg, published = composed(name), PUBLISHED[name]
        with torch.device("meta"):
            model = instantiate(cfg.model, "model")
        assert parameter_count(model) == published.parameters
        assert model.sample_shape == (4, 32, 32)
        assert model.flops() / 2e9 == pytest.approx(published.gigamacs, rel=0.005)

    def test_it_is_trained_as_published(self, name: str) -> None:
        cfg, published = composed(name), PUBLISHED[name]
        optimizer = instantiate(cfg.optim, "optim")
        assert (optimizer.lr, tuple(optimizer.betas)) == (published.lr, published.betas)
        assert (optimizer.weight_decay, optimizer.eps) == (published.weight_decay, 1e-8)
        schedule = instantiate(cfg.lr_schedule, "lr_schedule")
        expected = [1 / published.warmup, 0.5] if published.warmup else [1.0, 1.0]
        middle = max(published.warmup // 2 - 1, 0)
        assert [schedule.factor(s, published.steps) for s in (0, middle)] == expected
        # constant after the warm-up, to the end
        assert schedule.factor(published.warmup, published.steps) == 1.0
        assert schedule.factor(published.steps - 1, published.steps) == 1.0
        average = instantiate(cfg.ema, "ema")
        assert [average.decay_at(step) for step in (1, published.steps)] == [0.9999, 0.9999]
        assert (cfg.batch_size, cfg.trainer.max_steps) == (published.batch, published.steps)
        assert (cfg.condition_dropout, cfg.trainer.gradient_clip_val) == (0.1, None)
        assert cfg.trainer.precision == "bf16-mixed"

    def test_it_is_evaluated_as_published(self, name: str) -> None:
        cfg, published = composed(name), PUBLISHED[name]
        sampler = instantiate(cfg.sampler, "sampler")
        # all steps but the last of a fast solver are of order 3: the setting counts evaluations
        assert (type(sampler).__name__, cfg.sampler.steps) == published.sampler
        assert sampler.nfe(0, sampler.num_steps) == published.sampler[1]
        guidance = instantiate(cfg.guidance, "guidance")
        assert (guidance.scale, guidance.channels) == (published.scale, published.channels)
        assert cfg.evaluation == {"num_samples": 50_000, "labels": published.labels}
        assert cfg.metrics.num_samples == 50_000
        assert cfg.metrics.metrics == ["fid", "sfid", "inception_score", "precision", "recall"]

    def test_its_parts_fit(self, name: str) -> None:
        cfg = composed(name)
        parts = [instantiate(cfg[path], path) for path in ("objective", "guidance", "sampler")]
        assert combination_problems(cfg.model, *parts) == []
        assert (cfg.data.resolution, cfg.data.num_classes, cfg.data.root) == (256, 1000, "CACHE")
        assert (cfg.autoencoder.source, cfg.autoencoder.scale) == ("VAE", 0.18215)
        with initialize_config_dir(str(conf_directory()), version_base="1.3"):
            raw = compose("train", return_hydra_config=True, overrides=[f"experiment={name}"])
        choices = raw.hydra.runtime.choices
        assert choices["autoencoder"] == PUBLISHED[name].autoencoder
        assert cfg.name == name

    def test_it_starts_with_its_row_of_the_papers_table(self, name: str) -> None:
        lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
        assert lines[0] == "# @package _global_"
        comment = " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))
        assert "FID-50k" in comment
        assert "not reproduced here" in comment
        assert f"{PUBLISHED[name].parameters:,} parameters" in comment
        assert f"{PUBLISHED[name].gigamacs:g} GMAC" in comment
        assert f"python train.py experiment={name} data.root=" in comment


def test_lamamba_decays_every_weight_and_dimr_spares_its_gates() -> None:
    for name, words in (
        ("lamamba_xl_imagenet256", ("model.hidden_sizes=[16,32,64,64]", "model.num_heads=2")),
        ("dimr_xl_2r_imagenet256", ("model.hidden_sizes=[16,8]", "model.depths=[1,1]")),
    ):
        cfg = composed(name, *words)
        model = instantiate(cfg.model, "model")
        groups = instantiate(cfg.optim, "optim").build(model).param_groups
        spared = sum(len(group["params"]) for group in groups if group["weight_decay"] == 0)
        named = len(model.no_weight_decay())
        assert named > 0
        assert spared == (0 if name.startswith("lamamba") else named)


def test_rounding_to_8_bits_is_that_of_the_published_programs() -> None:
    images = torch.linspace(-1.1, 1.1, 100_001)
    ours = to_uint8(images)
    dit = (127.5 * images + 128.0).clamp(0, 255).to(torch.uint8)  # truncates what has a half more
    png = (0.5 * (images + 1)).clamp(0, 1).mul(255).add(0.5).clamp(0, 255).to(torch.uint8)  # DiMR
    # the formulas differ by one float32 rounding, at the borders of a few of the numbers
    for theirs in (dit, png):
        assert int((ours != theirs).sum()) <= 50


TINY = {
    "sit_xl_2_imagenet256": ("model.depth=1", "model.hidden_size=16", "model.num_heads=2"),
    "dimr_xl_2r_imagenet256": (
        *("model.depths=[1,1]", "model.hidden_sizes=[16,8]", "model.num_heads=2"),
        *("model.patch_sizes=[8,4]", "model.kernel_sizes=3"),
    ),
    "lamamba_xl_imagenet256": (
        *("model.depths=[1,0,0,0]", "model.hidden_sizes=[8,16,32,32]", "model.num_heads=2"),
        *("model.patch_size=4", "model.bottleneck_depth=1", "model.window_size=4"),
    ),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight made-up moments of 256-pixel pictures, as a cache of ImageNet's would hold them."""
    folder = tmp_path_factory.mktemp("latents")
    plan = CachePlan(
        data="imagenet256",
        fingerprint="0" * 64,
        count=8,
        resolution=256,
        channels=3,
        class_names=tuple(f"n{i:08d}" for i in range(1000)),
        autoencoder={"latent_channels": 4, "downsample": 8, "scale": 0.18215, "shift": 0.0},
        shape=(8, 32, 32),
        flip=True,
        dtype="float16",
        shard_size=8,
        tf32=False,
    )
    moments = torch.linspace(-3, 3, 8 * 8 * 32 * 32).view(8, 8, 32, 32).half()
    tensors = {"moments": moments, "mirrored": moments.flip(-1), "labels": torch.arange(8) * 100}
    shard = write_shard(folder, plan, 0, tensors)
    CacheIndex(plan, {"data": {}, "autoencoder": {}}, (shard,)).write(folder)
    return folder


@pytest.mark.parametrize("name", TINY)
def test_two_steps_of_a_tiny_network(name: str, command: Any, cache: Path, tmp_path: Path) -> None:
    answer = command(
        "train",
        f"experiment={name}",
        f"data.root={cache}",
        *TINY[name],
        *("data.num_workers=0", "trainer=cpu", "trainer.max_steps=2", "batch_size=4"),
        *("callbacks.sample_every=0", "callbacks.log_every=1", f"paths.outputs={tmp_path}"),
    )
    assert answer.status == 0, answer.err
    run = RunFolder.open(tmp_path / "latest")
    assert run.path.parent.name == name
    assert list(run.checkpoints()) == [2]
    # evaluate.py finds the recipe's protocol in the run
    config = yaml.safe_load(run.config_file.read_text())
    assert config["evaluation"] == {"num_samples": 50_000, "labels": PUBLISHED[name].labels}
    assert config["metrics"]["num_samples"] == 50_000
    assert config["trainer"]["precision"] == "bf16-mixed"
