"""Official state dicts of VAR's tokenizer load exactly, come back exactly, or are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genscale.autoencoders.msvq import MSVQ, load_msvq
from genscale.cli.import_checkpoint import main
from genscale.errors import CheckpointError, ConfigError
from genscale.io.converters.msvq import (
    PUBLISHED_SCALES,
    config_from_official,
    config_from_state_dict,
    from_official,
    to_official,
)
from genscale.io.files import write_json
from genscale.io.keys import on_meta
from genscale.io.layouts import as_words, untold_settings, write_diffusers
from genscale.io.weights import below, read_checkpoint

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "a phi a scale": {"num_phis": None},
    "one phi": {"num_phis": 1},
    "no phi": {"phi_weight": 0.0},
    "small kernels": {"latent_kernel": 1},
    "grey, more attention": {"image_channels": 1, "attention_levels": [0, 1]},
    "no attention": {"attention_levels": [], "middle_attention": False},
    "deep": {"channel_multipliers": [1, 2, 4], "num_blocks": 3},
}


def tiny(**changes: Any) -> MSVQ:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "scales": [1, 2, 3],
        "vocab_size": 16,
        "latent_channels": 4,
        "hidden_size": 32,
        "channel_multipliers": [1, 2],
        "num_blocks": 1,
    }
    model = MSVQ(**{**settings, **changes})
    model.quantizer.hits.uniform_()
    return model


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", VARIANTS)
def test_there_and_back_is_exact_and_shapes_tell_the_settings(name: str) -> None:
    model = tiny(**VARIANTS[name])
    official = to_official(model.state_dict(), model.config)
    found = config_from_state_dict(official)
    if name != "no phi":  # how many there are not, nobody can tell
        assert found == {key: model.config[key] for key in found}
    ours = from_official(official, on_meta(MSVQ, found))
    assert same(ours, dict(model.state_dict()))
    assert same(to_official(ours, model.config), official)


def test_the_released_checkpoint_has_these_keys_and_shapes() -> None:
    model = on_meta(MSVQ, config_from_official({"ch": 160}))
    ours = on_meta(MSVQ, {}).config  # the defaults
    for name in (name for name in ours if name[0] != "_"):
        own, translated = ours[name], model.config[name]
        assert translated == (list(own) if isinstance(own, tuple) else own)
    official = to_official(model.state_dict(), model.config)
    assert len(official) == 324
    assert sum(x.numel() for x in official.values()) - 10 * 4096 == 108_948_355
    probes = {
        "encoder.conv_in.weight": (160, 3, 3, 3),
        "encoder.down.0.downsample.conv.weight": (160, 160, 3, 3),
        "encoder.down.2.block.0.nin_shortcut.weight": (320, 160, 1, 1),
        "encoder.down.4.block.1.conv2.weight": (640, 640, 3, 3),
        "encoder.down.4.attn.1.qkv.weight": (1920, 640, 1, 1),
        "encoder.mid.attn_1.proj_out.weight": (640, 640, 1, 1),
        "encoder.mid.block_2.norm2.bias": (640,),
        "encoder.norm_out.weight": (640,),
        "encoder.conv_out.weight": (32, 640, 3, 3),
        "decoder.conv_in.weight": (640, 32, 3, 3),
        "decoder.up.4.attn.2.norm.weight": (640,),
        "decoder.up.4.upsample.conv.bias": (640,),
        "decoder.up.3.block.0.nin_shortcut.weight": (320, 640, 1, 1),
        "decoder.up.0.block.2.conv1.weight": (160, 160, 3, 3),
        "decoder.conv_out.bias": (3,),
        "quantize.ema_vocab_hit_SV": (10, 4096),
        "quantize.quant_resi.qresi_ls.3.weight": (32, 32, 3, 3),
        "quantize.embedding.weight": (4096, 32),
        "quant_conv.weight": (32, 32, 3, 3),
        "post_quant_conv.bias": (32,),
    }
    for name, shape in probes.items():
        assert tuple(official[name].shape) == shape
    assert "encoder.down.4.downsample.conv.weight" not in official
    assert "decoder.up.0.upsample.conv.weight" not in official
    found = config_from_state_dict(official)
    assert found == {key: model.config[key] for key in found}
    larger = config_from_state_dict(official, input_size=512)
    assert larger["scales"] == PUBLISHED_SCALES[32]


@pytest.mark.parametrize(
    ("num_phis", "key"), [(4, "qresi_ls.2."), (None, "2."), (1, "qresi."), (2, "qresi_ls.1.")]
)
def test_phi_layers_are_called_by_how_they_are_shared(num_phis: int | None, key: str) -> None:
    model = tiny(num_phis=num_phis)
    official = to_official(model.state_dict(), model.config)
    assert f"quantize.quant_resi.{key}weight" in official


def test_the_decoders_levels_are_numbered_from_the_pictures_resolution() -> None:
    model = tiny(channel_multipliers=[1, 2, 4])
    official = to_official(model.state_dict(), model.config)
    official["decoder.up.2.block.0.conv1.bias"].fill_(3.0)
    official["encoder.down.2.block.0.conv1.bias"].fill_(4.0)
    ours = from_official(official, model)
    assert (ours["decoder.levels.0.blocks.0.conv_1.bias"] == 3.0).all()
    assert (ours["encoder.levels.2.blocks.0.conv_1.bias"] == 4.0).all()


def test_counts_of_use_are_kept_for_the_same_number_of_scales_alone() -> None:
    model = tiny()
    official = to_official(model.state_dict(), model.config)
    assert same(from_official(official, model), dict(model.state_dict()))
    more = tiny(scales=[1, 2, 3, 4])
    ours = from_official(official, more)
    assert torch.equal(ours.pop("quantizer.hits"), torch.zeros(4, 16))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in ours.items())


def test_settings_translate() -> None:
    found = config_from_official(
        {
            "vocab_size": 48,
            "z_channels": 8,
            "beta": 0.5,
            "using_znorm": True,
            "quant_conv_ks": 1,
            "quant_resi": -0.3,
            "share_quant_resi": 0,
            "default_qresi_counts": 10,
            "v_patch_nums": [1, 2, 4],
            "ddconfig": {
                **{"ch": 64, "ch_mult": [1, 2], "num_res_blocks": 1, "in_channels": 1},
                **{"dropout": 0.1, "using_sa": False, "using_mid_sa": False},
            },
        }
    )
    assert found == {
        "scales": [1, 2, 4],
        "vocab_size": 48,
        "latent_channels": 8,
        "image_channels": 1,
        "hidden_size": 64,
        "channel_multipliers": [1, 2],
        "num_blocks": 1,
        "attention_levels": [],
        "middle_attention": False,
        "dropout": 0.1,
        "num_phis": 10,
        "phi_weight": 0.3,
        "cosine": True,
        "latent_kernel": 1,
        "beta": 0.5,
    }
    assert config_from_official({"share_quant_resi": 0})["num_phis"] is None
    assert config_from_official({"quant_resi": 1e-7})["phi_weight"] == 0.0
    with pytest.raises(ConfigError, match=r"hold \['chanels'\], which MSVQ does not know"):
        config_from_official({"chanels": 3})
    with pytest.raises(ConfigError, match=r"hold \['depth'\]"):
        config_from_official({"ddconfig": {"depth": 3}})


def test_layers_of_their_own_by_another_number_than_scales() -> None:
    """Such files name them as one a scale; they are read, and come back as shared ones."""
    model = tiny(num_phis=5)
    official = to_official(model.state_dict(), model.config)
    own = {name.replace("qresi_ls.", ""): value for name, value in official.items()}
    assert config_from_state_dict(own)["num_phis"] == 5
    assert same(from_official(own, model), dict(model.state_dict()))


def test_files_that_do_not_fit_are_refused() -> None:
    model = tiny()
    official = to_official(model.state_dict(), model.config)
    with pytest.raises(CheckpointError, match=r"no official multi-scale VQVAE: 'quantize.embed"):
        config_from_state_dict({"blocks.0.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"looks like vocab_size 16, the config says 32"):
        from_official(official, tiny(vocab_size=32))
    with pytest.raises(CheckpointError, match=r"looks like num_blocks 1, the config says 2"):
        from_official(official, tiny(num_blocks=2))
    torn = {name: value for name, value in official.items() if name != "quant_conv.bias"}
    with pytest.raises(CheckpointError, match=r"1 missing, 0 unexpected .* incomplete or changed"):
        from_official(torn, model)
    ours = dict(model.state_dict())
    del ours["quant_conv.bias"]
    with pytest.raises(CheckpointError, match="1 missing, 0 unexpected"):
        to_official(ours, model.config)
    with pytest.raises(ConfigError, match="32 groups, but the model has norm_groups=16"):
        to_official({}, {**model.config, "norm_groups": 16})


def test_what_a_file_does_not_tell_is_named() -> None:
    model = tiny(scales=[1, 2, [2, 4]], cosine=True)
    found = config_from_state_dict(to_official(model.state_dict(), model.config))
    words = as_words(untold_settings(model, found))
    assert words == "scales=[1,2,[2,4]] cosine=true"


def test_diffusers_has_no_such_network(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is for DiT, SiT and causal Wan, but .* a MSVQ"):
        write_diffusers(tiny(), tmp_path)


class TestCommands:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        model = tiny()
        torch.save(to_official(model.state_dict(), model.config), tmp_path / "vae.pth")
        return tmp_path / "vae.pth"

    def test_a_file_becomes_a_folder_of_ours(
        self, file: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = file.parent / "ours"
        words = ["family=msvq", f"file={file}", f"out={out}", "scales=[1,2,4]", "cosine=true"]
        assert main(words) == 0
        assert f"autoencoder.run={out}" in capsys.readouterr().out
        model, images = tiny(cosine=True), torch.rand(1, 3, 8, 8)
        model.use_scales([1, 2, 4])
        imported = load_msvq(str(out))
        assert torch.equal(imported.tokens(images), model.eval().tokens(images))
        assert "Converted from vae.pth, SHA-256 " in (out / "README.md").read_text()

    def test_a_folder_goes_back_to_the_official_layout(self, file: Path, command: Any) -> None:
        ours, back = file.parent / "ours", file.parent / "back"
        assert main(["family=msvq", f"file={file}", f"out={ours}", "cosine=true"]) == 0
        answer = command("export", f"run={ours}", "layout=official", f"out={back}")
        assert answer.status == 0, answer.err
        assert same(read_checkpoint(back / "model.pth"), read_checkpoint(file))
        card = (back / "README.md").read_text()
        assert "family=msvq file=model.safetensors cosine=true out=<new folder>" in card
        refused = command("export", f"run={ours}", "weights=raw", f"out={file.parent / 'raw'}")
        assert "holds one set of weights, but checkpoint=latest and weights=raw" in refused.err

    def test_a_training_run_is_exported_by_its_average(self, tmp_path: Path, command: Any) -> None:
        model, run = tiny(), tmp_path / "run"
        settings = {name: value for name, value in model.config.items() if name[0] != "_"}
        node = {"_target_": "genscale.autoencoders.msvq.MSVQ", **settings}
        write_json(run / "config.yaml", {"model": node, "ema": {"decay": 0.99}})  # JSON is YAML
        averaged = {f"ema.{name}": 2 * value for name, value in model.state_dict().items()}
        (run / "checkpoints").mkdir()
        torch.save({"state_dict": averaged}, run / "checkpoints" / "step-5.ckpt")
        answer = command("export", f"run={run}")
        assert answer.status == 0, answer.err
        (folder,) = (run / "exports").iterdir()
        assert same(dict(load_msvq(str(folder)).state_dict()), below(averaged, "ema."))
        assert "Exported from " in (folder / "README.md").read_text()

    def test_scales_that_nothing_tells_are_said_to_be_a_guess(
        self, file: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["family=msvq", f"file={file}", f"out={file.parent / 'ours'}"]) == 0
        assert "scales=[1,2,3] is assumed: no shape tells them" in capsys.readouterr().out

    def test_settings_of_networks_are_refused(
        self, file: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ["family=msvq", f"file={file}", f"out={file.parent / 'ours'}", "recipe=dit_xl_2"]
        assert main(words) == 1
        assert "recipe=dit_xl_2 belongs to a generative network" in capsys.readouterr().err
