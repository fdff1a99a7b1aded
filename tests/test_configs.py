"""Every file of conf/ composes, and what it names can be built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from genscale.backbones.base import ScaleBackbone
from genscale.cli.building import instantiate
from genscale.cli.resolvers import register_resolvers
from genscale.conditioning.text import reads_text

CONF = Path(__file__).resolve().parent.parent / "conf"
GROUPS = sorted(p.name for p in CONF.iterdir() if p.is_dir() and any(p.glob("*.yaml")))
# needs pictures on disk: composed here, built in tests/data
ON_DISK = {("data", "fashion_mnist"), ("data", "image_folder"), ("data", "imagenet256")}
ON_DISK |= {("data", "emoji"), ("data", "video_folder"), ("data", "video_latents")}
ON_DISK |= {("data", name) for name in ("latents", "imagenet256_latents", "imagenet512_latents")}
# filled in from a run by sample.py
READ_BACK = {("sampler", "run"), ("guidance", "run"), ("autoencoder", "run"), ("metrics", "run")}
READ_BACK |= {("text_encoder", "run")}
READ_BACK |= {("sampler", "none"), ("reward", "none")}  # say that there is none

AUTOENCODERS = {"msvq", "kl_small"}  # trained like a backbone, and none
UPSCALERS = {"lua", "lua_flux", "swinir", "swinir_light", "swinir_m", "swinir_l", "espcn"}
UPSCALERS |= {"irn", "irn_x2", "irn_x4", "irn_dual", "iarn", "wdsr"}
# clips of the published size
OF_ONE_SIZE = {"snap_video_500m", "snap_video_3_9b", "snap_video_3_9b_upsampler", "causal_wan_1_3b"}
OF_SAMPLING = {"step_cache", "search", "reward", "upscaling", "resolution"}  # of sampling alone


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def composed(name: str, overrides: list[str]) -> DictConfig:
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, overrides=overrides)


@pytest.mark.parametrize(
    "name", ["train", "sample", "evaluate", "cache", "export", "import_checkpoint"]
)
def test_primary_configs_compose(name: str) -> None:
    cfg = composed(name, [])
    assert OmegaConf.to_container(cfg)  # no missing values in the structure


@pytest.mark.parametrize(
    ("group", "option"), [(g, o) for g in GROUPS for o in options(g) if (g, o) not in READ_BACK]
)
def test_every_option_composes_and_builds(group: str, option: str) -> None:
    overrides = [f"{group}={option}"]
    if (group, option) in ON_DISK:
        overrides += ["data.root=/nowhere"]
    if (group, option) == ("sampler", "next_scale"):
        overrides += ["model=var"]  # it counts the model's scales
    if (group, option) == ("sampler", "blocks"):
        overrides += ["sampler.block_size=2", "sampler.trained_frames=6"]  # the model's
    cfg = composed("sample" if group in OF_SAMPLING else "train", overrides)
    node: Any = cfg.get(group)
    if (group, option) in ON_DISK or group in ("debug", "experiment", "callbacks", "logger"):
        OmegaConf.to_container(cfg, resolve=group not in ("data",))
        return
    if group == "trainer" and option != "cpu":
        assert node._target_ == "lightning.pytorch.Trainer"  # building it needs the GPUs it names
        return
    with torch.device("meta" if group in ("model", "autoencoder") else "cpu"):
        assert instantiate(node, group) is not None


@pytest.mark.parametrize("group", GROUPS)
def test_every_file_says_what_it_is(group: str) -> None:
    for path in (CONF / group).glob("*.yaml"):
        lines = [x for x in path.read_text().splitlines() if not x.startswith("# @package")]
        assert lines[0].startswith("# "), f"{path.name} starts without a comment"


@pytest.mark.parametrize(
    "option", [o for o in options("model") if o not in AUTOENCODERS | UPSCALERS]
)
def test_a_model_alone_is_enough(option: str) -> None:
    cfg = composed("train", [f"model={option}"])
    with torch.device("meta"):
        model = instantiate(cfg.model, "model")
    objective = instantiate(cfg.objective, "objective")
    # the sizes follow from the data and the autoencoder
    if isinstance(model, ScaleBackbone):
        settings = cfg.autoencoder
        assert model.sample_shape == (settings.latent_channels, *model.scales[-1])
        assert (model.vocab_size, list(model.config["scales"])) == (
            settings.vocab_size,
            list(settings.scales),
        )
        assert cfg.sampler.num_scales == len(model.scales)
        return
    if len(model.sample_shape) == 4:  # clips
        channels, *size = model.sample_shape
        if option not in OF_ONE_SIZE:
            assert channels == cfg.autoencoder.latent_channels
            side = cfg.data.resolution // cfg.autoencoder.downsample
            assert size[1:] == [side, side]
            assert model.config.get("text_size", 0) in (0, cfg.text_encoder.token_size)
        assert objective.view(model).sample_shape == model.sample_shape
        return
    if reads_text(model.config):  # captions in place of classes, in colour
        assert model.sample_shape == (3, 32, 32)
        assert model.config["num_classes"] == 0
        assert model.config["text_size"] == cfg.text_encoder.token_size
        return
    assert model.sample_shape == (1, 16, 16)
    assert model.config["num_classes"] == 10
    assert objective.view(model).sample_shape == model.sample_shape


@pytest.mark.parametrize("option", sorted(AUTOENCODERS))
def test_an_autoencoder_alone_is_enough(option: str) -> None:
    cfg = composed("train", [f"model={option}", "data=scenes"])
    with torch.device("meta"):
        model = instantiate(cfg.model, "model")
    training = instantiate(cfg.objective, "objective").build(model, seed=0)
    assert training.model is model
    # the sizes follow from the data
    assert model.sample_shape == (3, cfg.data.resolution, cfg.data.resolution)
    side = cfg.data.resolution // model.downsample
    if option == "msvq":
        sides = [h for h, w in model.scales]
        assert sides[:3] == [1, 2, 4]
        assert sides[-1] == side


# parameters of the published sizes, for RGB, as the papers' programs count them
PUBLISHED_UPSCALERS = {
    "lua_flux": 54_917_584,
    "swinir_light": 910_152,
    "swinir_m": 11_752_487,
    "swinir_l": 28_013_059,
    "irn_x2": 1_667_952,
    "irn_x4": 4_355_136,
}


@pytest.mark.parametrize("option", sorted(UPSCALERS))
def test_an_upscaler_alone_is_enough(option: str) -> None:
    cfg = composed("train", [f"model={option}", "data=scenes"])
    with torch.device("meta"):
        model = instantiate(cfg.model, "model")
        autoencoder = instantiate(cfg.autoencoder, "autoencoder")
    recipe = instantiate(cfg.objective, "objective")
    assert recipe.build(model, seed=0, autoencoder=autoencoder).model is model
    of_latents = option.startswith("lua")
    assert model.space == ("latent" if of_latents else "pixel")
    assert model.channels == (cfg.autoencoder.latent_channels if of_latents else 3)
    if option in PUBLISHED_UPSCALERS:
        count = sum(p.numel() for p in model.parameters())
        assert count == PUBLISHED_UPSCALERS[option]


def test_an_explicit_objective_wins_over_the_model() -> None:
    cfg = composed("train", ["model=dimr_xl_2r"])
    assert cfg.objective._target_.endswith(".DDPM")
    cfg = composed("train", ["model=dimr_xl_2r", "objective=flow"])
    assert cfg.objective._target_.endswith(".FlowMatching")
