"""Published files become folders that sample.py reads; files that do not fit are refused."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import initialize_config_dir
from safetensors.torch import save_file
from torch import Tensor

from genscale.backbones.base import Backbone
from genscale.cli.import_checkpoint import main, with_settings
from genscale.cli.recipes import check_recipe, compose_recipe, nearest, published
from genscale.cli.resolvers import register_resolvers
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.io.converters import converter
from genscale.io.converters.dit import diffusers_config, to_diffusers
from genscale.pipeline import GenerationPipeline

CONF = Path(__file__).resolve().parents[2] / "conf"

# family -> a network of pixels small enough for a test, and what its shapes do not tell
NETWORKS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "dit": ({"hidden_size": 16, "depth": 2, "num_heads": 2, "learn_sigma": True}, ("num_heads=2",)),
    "sit": ({"hidden_size": 16, "depth": 2, "num_heads": 2}, ("num_heads=2",)),
    "uvit": ({"hidden_size": 16, "depth": 3, "num_heads": 2}, ("num_heads=2",)),
    "dimr": (
        {"hidden_sizes": [16, 8], "depths": [3, 1], "patch_sizes": [2, 1], "num_heads": 2},
        ("num_heads=2",),
    ),
    "lamamba": (
        {
            **{"hidden_sizes": [8, 16, 32, 32], "depths": [1, 0, 0, 0], "bottleneck_depth": 0},
            **{"num_heads": 2, "window_size": 2, "learn_sigma": True},
        },
        (),
    ),
}
# what the published programs train and sample by
RECIPES = {
    "dit": ("DDPM", "Ancestral", "timestep"),
    "sit": ("FlowMatching", "ReverseSDE", "one_minus"),
    "uvit": ("DDPM", "DPMSolverFast", "vp_index"),  # as the sizes for pixels
    "dimr": ("DDPM", "DPMSolverFast", "dimr_linear"),
    "lamamba": ("DDPM", "DDIM", "timestep"),
}


def build(family: str, **changes: Any) -> Backbone:
    """A network whose weights are all random."""
    torch.manual_seed(0)
    settings = {"input_size": 8, "in_channels": 3, "num_classes": 5, **NETWORKS[family][0]}
    model: Backbone = converter(family).BACKBONE(**{**settings, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def official(family: str, model: Backbone) -> dict[str, Tensor]:
    state: dict[str, Tensor] = converter(family).to_official(model.state_dict(), model.config)
    return state


def predict(model: Backbone) -> Tensor:
    x = torch.randn(3, *model.sample_shape, generator=torch.Generator().manual_seed(1))
    cond = Conditioning(labels=torch.tensor([0, 4, -1]))
    with torch.no_grad():
        return model(x, torch.tensor([0.1, 0.5, 0.9]), cond).sample


@pytest.mark.parametrize("family", NETWORKS)
def test_a_published_file_is_recognised_and_sampled_at_once(
    family: str, tmp_path: Path, command: Any
) -> None:
    model = build(family)
    torch.save(official(family, model), tmp_path / "net.pth")
    out = tmp_path / "ours"
    words = (f"family={family}", f"file={tmp_path / 'net.pth'}", f"out={out}")
    assert main([*words, *NETWORKS[family][1]]) == 0
    pipeline = GenerationPipeline.from_pretrained(out, device="cpu")
    assert torch.equal(predict(pipeline.model), predict(model))
    assert pipeline.num_classes == 5
    config = json.loads((out / "genscale.json").read_text())
    objective, sampler, time_input = RECIPES[family]
    assert config["objective"]["_target_"].endswith(f".{objective}")
    assert config["objective"]["time_input"] == time_input
    assert config["sampler"]["_target_"].endswith(f".{sampler}")
    assert config["autoencoder"]["_target_"].endswith(".Identity")
    card = (out / "README.md").read_text()
    assert "Converted from net.pth, SHA-256 " in card
    answer = command("sample", f"run={out}", "num_samples=2", "sampler.steps=3")
    assert answer.status == 0, answer.err
    assert "2 samples, 3 network evaluations each" in answer.out


def test_a_number_of_heads_that_nothing_tells_is_said_to_be_a_guess(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for family, said in (("dit", True), ("dimr", True), ("lamamba", False)):
        wide = {"hidden_size": 128} if family == "dit" else {}
        torch.save(official(family, build(family, **wide)), tmp_path / f"{family}.pth")
        words = [f"family={family}", f"file={tmp_path / family}.pth", f"out={tmp_path / family}"]
        assert main(words) == 0
        out = capsys.readouterr().out
        assert ("is assumed, as published: no shape tells it" in out) == said


def test_training_files_hold_two_sets(tmp_path: Path) -> None:
    models = {"ema": build("dit"), "model": build("dit", learn_sigma=True)}
    with torch.no_grad():
        models["model"].head.bias.fill_(0.5)  # type: ignore[union-attr, operator]
    content: dict[str, Any] = {name: official("dit", model) for name, model in models.items()}
    torch.save({**content, "args": argparse.Namespace(epochs=3)}, tmp_path / "t.pt")
    for name, model in models.items():
        words = ["family=dit", f"file={tmp_path / 't.pt'}", "num_heads=2", f"weights={name}"]
        assert main([*words, f"out={tmp_path / name}"]) == 0
        loaded = GenerationPipeline.from_pretrained(tmp_path / name, device="cpu")
        assert torch.equal(predict(loaded.model), predict(model))


def test_latents_get_their_autoencoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(official("dit", build("dit", in_channels=4)), tmp_path / "net.pth")
    words = ["family=dit", f"file={tmp_path / 'net.pth'}", "num_heads=2"]
    assert main([*words, f"out={tmp_path / 'a'}"]) == 0
    assert "autoencoder.source=<folder or hub id>" in capsys.readouterr().out
    config = json.loads((tmp_path / "a" / "genscale.json").read_text())
    assert config["autoencoder"]["_target_"].endswith(".KL")
    assert config["autoencoder"]["source"] is None
    assert config["autoencoder"]["scale"] == 0.18215
    assert main([*words, f"out={tmp_path / 'b'}", "autoencoder.source=some/vae"]) == 0
    config = json.loads((tmp_path / "b" / "genscale.json").read_text())
    assert config["autoencoder"]["source"] == "some/vae"


def test_a_network_without_learned_variance_is_sampled_without(tmp_path: Path) -> None:
    torch.save(official("dit", build("dit", learn_sigma=False)), tmp_path / "net.pth")
    words = ["family=dit", f"file={tmp_path / 'net.pth'}", "num_heads=2", f"out={tmp_path / 'a'}"]
    assert main(words) == 0
    config = json.loads((tmp_path / "a" / "genscale.json").read_text())
    assert config["sampler"]["variance"] == "lower"
    assert config["objective"]["learn_sigma"] is False


def test_the_recipe_can_be_given(tmp_path: Path) -> None:
    torch.save(official("dit", build("dit")), tmp_path / "net.pth")
    words = ["family=dit", f"file={tmp_path / 'net.pth'}", "num_heads=2"]
    assert main([*words, f"out={tmp_path / 'a'}", "recipe=dit"]) == 0
    config = json.loads((tmp_path / "a" / "genscale.json").read_text())
    assert config["objective"]["_target_"].endswith(".FlowMatching")


@pytest.mark.parametrize("family", NETWORKS)
def test_published_sizes_are_their_own_nearest_recipe(family: str) -> None:
    import yaml

    for name in published(family, CONF):
        sizes: dict[str, Any] = {}
        chain = [name]
        while chain:  # what a size writes over what it builds on
            content = yaml.safe_load((CONF / "model" / f"{chain.pop()}.yaml").read_text())
            sizes = {**content, **sizes}
            chain += [x for x in content["defaults"] if isinstance(x, str) and x != "_self_"]
        found = {key: value for key, value in sizes.items() if "${" not in str(value)}
        if "${text_encoder." in str(sizes):  # a network with text has sizes of it
            found["text_size"] = 384
        assert nearest(family, found, CONF) == name


def test_a_recipe_is_composed_around_the_network() -> None:
    register_resolvers()
    settings = {"in_channels": 16, "num_classes": 7, "learn_sigma": False, "input_size": 64}
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose_recipe(
            "dit_xl_2", target="a.B", settings=settings, autoencoder={"source": "x", "y": None}
        )
    assert config["model"] == {"_target_": "a.B", **settings}  # nothing of the recipe's sizes
    assert config["autoencoder"]["scale"] == 0.3611  # that of 16 channels
    assert config["autoencoder"]["source"] == "x"
    assert config["data_info"] == {"num_classes": 7, "class_names": []}


def test_diffusers_folders_are_read(tmp_path: Path) -> None:
    model = build("dit")
    folder = tmp_path / "theirs"
    folder.mkdir()
    config = {"_class_name": "DiTTransformer2DModel", **diffusers_config(model.config)}
    (folder / "config.json").write_text(json.dumps(config))
    state = to_diffusers(model.state_dict(), model.config)
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    words = ["family=dit", "layout=diffusers", f"file={folder}"]
    assert main([*words, f"out={tmp_path / 'ours'}"]) == 0  # heads are in its config
    loaded = GenerationPipeline.from_pretrained(tmp_path / "ours", device="cpu")
    assert torch.equal(predict(loaded.model), predict(model))


# mistakes


def test_words_that_are_parameters_become_settings() -> None:
    words = ["family=dit", "num_heads=2", "out=x", "--cfg", "job", "input_size=[8,16]"]
    assert with_settings(words) == [
        *("family=dit", "++settings.num_heads=2", "out=x", "--cfg", "job"),
        "++settings.input_size=[8,16]",
    ]
    with pytest.raises(ConfigError, match=r"a parameter of DiT\. Did you mean 'num_heads'"):
        with_settings(["family=dit", "num_head=2"])
    with pytest.raises(ConfigError, match="Did you mean 'layout'"):
        with_settings(["family=dit", "layuot=diffusers"])
    with pytest.raises(
        ConfigError, match=r"family was not given, .* Give family= one of .*dimr, dit"
    ):
        with_settings(["num_heads=2"])
    check_recipe("dit_xl_2", CONF)
    with pytest.raises(ConfigError, match=r"recipe must be an option.*mean 'dit_xl_2'"):
        check_recipe("dit_xl2", CONF)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("family=dti",), "but 'dti' was given. Did you mean 'dit'?"),
        (("file=nowhere.pt",), "No weight file at nowhere.pt"),
        (("layout=difusers",), "Did you mean 'diffusers'?"),
        (("family=uvit", "layout=diffusers"), "layout=diffusers is known of family=dit, sit and "),
        (("layout=diffusers", "weights=ema"), "folders of diffusers hold one set. Leave it out."),
        (("weights=model",), "is a bare state dict, but weights=model was given"),
        (("depth=36",), "The file looks like depth 2, the config says 36. Build the model with de"),
        (("hidden_size=32",), "The file looks like hidden_size 16, the config says 32."),
        (("num_heads=3",), "model.hidden_size is 16, which model.num_heads=3 heads do not divide"),
        (("family=uvit",), "This is no official U-ViT state dict: 'patch_embed.proj.weight' is mi"),
        (("recipe=dit_xxl",), "recipe must be an option of conf/model, but 'dit_xxl' was given"),
        (("out=full",), "full is there already, and a new or empty folder is needed"),
    ],
)
def test_mistakes_are_told_in_a_sentence_and_leave_nothing(
    words: tuple[str, ...],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(official("dit", build("dit")), "net.pth")
    Path("full").mkdir()
    Path("full/something").write_text("")
    given = {"family": "dit", "file": "net.pth", "out": "out"}
    given |= dict(word.split("=") for word in words)
    assert main([f"{key}={value}" for key, value in given.items()]) == 1
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "net.pth"]


def test_damaged_and_incomplete_files_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "net.pth"
    state = official("dit", build("dit"))
    torch.save(state, file)
    whole = file.read_bytes()
    words = ["family=dit", f"file={file}", f"out={tmp_path / 'out'}", "num_heads=2"]
    file.write_bytes(whole[: len(whole) // 2])
    assert main(words) == 1
    assert "is damaged or no weight file" in capsys.readouterr().err
    del state["blocks.1.attn.qkv.bias"]
    torch.save(state, file)
    assert main(words) == 1
    sentence = "1 missing, 0 unexpected keys for DiT (first: blocks.1.attn.qkv.bias). The file itse"
    assert sentence in capsys.readouterr().err
