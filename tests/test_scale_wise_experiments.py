"""The published recipes of VAR and M-VAR: every number of their papers' and programs' tables."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from genscale.backbones.base import parameter_count
from genscale.cli.app import conf_directory
from genscale.cli.building import instantiate
from genscale.cli.combinations import combination_problems
from genscale.cli.resolvers import register_resolvers
from genscale.training.lr_schedule import Annealed

FOLDER = conf_directory() / "experiment"
PICTURES = 1_281_167  # of ImageNet-1k


@dataclass(frozen=True)
class Published:
    """One row: how a depth was trained."""

    parameters: float  # millions
    epochs: int
    batch: int
    rate: float  # of a batch of 256
    init_gate: float
    final_rate: float  # of the peak
    final_decay: float
    shared: bool = False


VAR_16 = Published(310.3, 200, 768, 1e-4, 1e-3, 0.1, 0.05)
MVAR_16 = Published(464.2, 200, 768, 1e-4, 1e-3, 0.1, 0.05)
PUBLISHED = {
    "var_d16_imagenet256": VAR_16,
    "var_d20_imagenet256": Published(600.9, 250, 768, 1e-4, 1e-3, 0.1, 0.05),
    "var_d24_imagenet256": Published(1033.4, 350, 768, 8e-5, 1e-4, 0.01, 0.05),
    "var_d30_imagenet256": Published(2010.0, 350, 1024, 8e-5, 1e-5, 0.01, 0.08),
    "var_d36_imagenet512": Published(2353.9, 350, 768, 8e-5, 5e-6, 0.01, 0.08, shared=True),
    "mvar_d12_imagenet256": Published(198.4, 200, 768, 1e-4, 1e-3, 0.1, 0.05),
    "mvar_d16_imagenet256": MVAR_16,
    "mvar_d20_imagenet256": Published(900.5, 250, 768, 1e-4, 1e-3, 0.1, 0.05),
    "mvar_d24_imagenet256": Published(1550.1, 350, 768, 8e-5, 1e-4, 0.01, 0.05),
    "mvar_d30_imagenet256": Published(3017.1, 350, 1024, 8e-5, 1e-5, 0.01, 0.08),
}


def composed(experiment: str) -> DictConfig:
    register_resolvers()
    words = [f"experiment={experiment}", "data.root=PICTURES", "autoencoder.run=TOKENIZER"]
    with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        return compose("train", overrides=words)


def test_every_experiment_of_these_families_is_held_to_a_table() -> None:
    names = {path.stem for path in FOLDER.glob("*.yaml")}
    assert {name for name in names if name.startswith(("var_", "mvar_"))} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_is_the_published_recipe(name: str) -> None:
    cfg, row = composed(name), PUBLISHED[name]
    depth = int(name.split("_d")[1][:2])
    assert cfg.name == name

    # the network
    with torch.device("meta"):
        model = instantiate(cfg.model, "model")
    assert parameter_count(model) / 1e6 == pytest.approx(row.parameters, abs=0.05)
    side = 32 if "512" in name else 16
    assert model.sample_shape == (32, side, side)
    assert cfg.data.resolution == 16 * side
    settings = model.config
    assert (settings["num_classes"], settings["l2_norm"]) == (1000, True)
    assert settings["init_gate"] == row.init_gate
    assert settings["drop_path"] == pytest.approx(0.1 * depth / 24, abs=5e-5)
    assert settings.get("shared_adaln", False) == row.shared

    # how it is trained
    optimizer = instantiate(cfg.optim, "optim")
    assert optimizer.lr == pytest.approx(row.rate * row.batch / 256)
    assert tuple(optimizer.betas) == (0.9, 0.95)
    assert (optimizer.weight_decay, optimizer.final_weight_decay) == (0.05, row.final_decay)
    epoch = PICTURES // row.batch
    assert (cfg.batch_size, cfg.trainer.max_steps) == (row.batch, row.epochs * epoch)
    schedule = instantiate(cfg.lr_schedule, "lr_schedule")
    assert schedule == Annealed(
        warmup_steps=row.epochs * epoch // 50,
        initial_scale=0.005,
        shape="linear",
        flat_fraction=0.05,
        final_scale=row.final_rate,
    )
    assert instantiate(cfg.ema, "ema").decay == 0.0
    assert (cfg.condition_dropout, cfg.trainer.gradient_clip_val, cfg.data.flip) == (
        0.1,
        2.0,
        False,
    )

    # how it is sampled and measured
    parts = [instantiate(cfg[path], path) for path in ("objective", "guidance", "sampler")]
    assert combination_problems(cfg.model, *parts) == []
    objective, guidance, sampler = parts
    assert (objective.label_smoothing, objective.progressive) == (0.0, None)
    assert (guidance.scale, guidance.form, guidance.stop) == (2.5, "ramp", None)
    assert (sampler.top_k, sampler.top_p, sampler.smooth) == (900, 0.96, False)
    assert cfg.evaluation == {"num_samples": 50_000, "labels": "balanced"}

    # what its first lines say
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    comment = " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))
    assert "not reproduced here" in comment
    assert f"{row.parameters:,} M parameters" in comment
    assert f"python train.py experiment={name} data.root=" in comment
