"""The KL adapter: diffusers' own numbers, checked files, and weights that wait to be needed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file, save_file

from genscale.autoencoders.base import LOG_VARIANCE, Variational
from genscale.autoencoders.diffusers_folder import (
    WEIGHTS,
    Source,
    check_config,
    load,
    locate,
    read_config,
)
from genscale.autoencoders.identity import Identity
from genscale.autoencoders.kl import KL
from genscale.errors import CheckpointError, ConfigError
from genscale.rng import key, normal

IMAGES = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16).sin()
NOISE = normal(key(0, torch.arange(2)), (4, 8, 8))


@pytest.fixture
def kl(tiny_vae: Path) -> KL:
    return KL(source=str(tiny_vae), downsample=2)


@pytest.fixture
def official(tiny_vae: Path) -> Any:
    return AutoencoderKL.from_pretrained(tiny_vae, low_cpu_mem_usage=False)


def copy_of(folder: Path, target: Path, **changes: Any) -> Path:
    """Copy an autoencoder's folder with other entries in its config."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text()) | changes
    kept = {name: value for name, value in config.items() if value is not ...}
    (target / "config.json").write_text(json.dumps(kept))
    return target


class TestNumbers:
    def test_moments_are_diffusers_own(self, kl: KL, official: Any) -> None:
        with torch.no_grad():
            expected = official.encode(IMAGES).latent_dist.parameters
            assert torch.equal(kl.moments(IMAGES), expected)
        assert expected.shape == (2, 8, 8, 8)

    def test_latents_are_the_scaled_mean_or_a_draw_with_the_noise_given(
        self, kl: KL, official: Any
    ) -> None:
        with torch.no_grad():
            posterior = official.encode(IMAGES).latent_dist
            draw = (posterior.mean + posterior.std * NOISE) * 0.18215
            torch.testing.assert_close(kl.encode(IMAGES), posterior.mean * 0.18215)
            torch.testing.assert_close(kl.encode(IMAGES, NOISE), draw)
            assert torch.equal(kl.from_moments(kl.moments(IMAGES), NOISE), kl.encode(IMAGES, NOISE))

    def test_log_variances_are_clamped_when_drawing_only(self, kl: KL) -> None:
        moments = torch.tensor([0.0, 0.0, 0.0, 0.0, -1e3, -1e3, 1e3, 1e3]).view(1, 8, 1, 1)
        drawn = kl.from_moments(moments, torch.ones(1, 4, 1, 1)) / kl.scale
        spread = torch.tensor(LOG_VARIANCE).div(2).exp().repeat_interleave(2)
        torch.testing.assert_close(drawn.flatten(), spread)  # e^-15 and e^10
        assert LOG_VARIANCE == (-30.0, 20.0)

    def test_scale_and_shift_are_undone_by_decoding(self, tiny_vae: Path, tmp_path: Path) -> None:
        folder = copy_of(tiny_vae, tmp_path / "s", scaling_factor=0.3611, shift_factor=0.1159)
        shifted = KL(source=str(folder), downsample=2, scale=0.3611, shift=0.1159)
        plain = AutoencoderKL.from_pretrained(tiny_vae, low_cpu_mem_usage=False)
        with torch.no_grad():
            z = plain.encode(IMAGES).latent_dist.mean
            latents = shifted.encode(IMAGES)
            torch.testing.assert_close(latents, (z - 0.1159) * 0.3611)
            torch.testing.assert_close(shifted.decode(latents), plain.decode(z).sample)

    def test_encoding_is_float32_whatever_the_autocast(self, kl: KL) -> None:
        with torch.no_grad():
            expected = kl.moments(IMAGES)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert torch.equal(kl.moments(IMAGES), expected)
                assert kl.decode(NOISE).dtype == torch.bfloat16

    def test_pixels_ignore_the_noise(self) -> None:
        identity = Identity(latent_channels=3)
        assert torch.equal(identity.encode(IMAGES, torch.ones_like(IMAGES)), IMAGES)
        assert identity.check(encodes=True, decodes=True) == []
        assert not isinstance(identity, Variational)
        assert identity.protocol_name == "identity"


class TestWeightsWait:
    def test_construction_reads_nothing(self) -> None:
        with torch.device("meta"):
            autoencoder = KL(source="/nowhere/at/all")
        assert list(autoencoder.parameters()) == []

    def test_cached_moments_need_no_source(self) -> None:
        autoencoder = KL(downsample=2)
        assert autoencoder.from_moments(torch.zeros(1, 8, 2, 2)).shape == (1, 4, 2, 2)
        assert autoencoder.check(encodes=False, decodes=False) == []
        assert autoencoder.encoder_digest() is None

    def test_a_lacking_source_is_told_with_what_to_give(self) -> None:
        sentences = KL().check(encodes=True, decodes=True)
        assert len(sentences) == 2
        assert all("Give autoencoder.source=<folder or hub id" in text for text in sentences)
        with pytest.raises(ConfigError, match="needed to encode pictures"):
            KL().moments(IMAGES)
        with pytest.raises(ConfigError, match="needed to decode samples"):
            KL().decode(NOISE)

    def test_loading_draws_nothing_from_torchs_generator(self, kl: KL) -> None:
        before = torch.get_rng_state()
        kl.moments(IMAGES)
        assert torch.equal(torch.get_rng_state(), before)

    def test_loaded_weights_are_frozen_and_in_eval_mode(self, kl: KL) -> None:
        kl.moments(IMAGES)
        assert not any(parameter.requires_grad for parameter in kl.parameters())
        assert not any(module.training for module in kl._encoding.modules())


class TestDecoders:
    @pytest.fixture
    def tuned(self, tiny_vae: Path, tmp_path: Path) -> Path:
        """The same encoder with another decoder, as ft-EMA is to the original."""
        folder = copy_of(tiny_vae, tmp_path / "tuned")
        weights = load_file(folder / WEIGHTS[0])
        weights["decoder.conv_out.bias"] += 1.0
        save_file(weights, folder / WEIGHTS[0])
        return folder

    def test_one_may_encode_and_another_decode(self, kl: KL, tiny_vae: Path, tuned: Path) -> None:
        both = KL(source=str(tiny_vae), decoder_source=str(tuned), downsample=2)
        with torch.no_grad():
            assert torch.equal(both.moments(IMAGES), kl.moments(IMAGES))
            torch.testing.assert_close(both.decode(NOISE), kl.decode(NOISE) + 1.0)

    def test_tuned_decoders_share_the_latents_but_not_the_protocol(
        self, kl: KL, tuned: Path
    ) -> None:
        other = KL(source=str(tuned), downsample=2)
        assert other.encoder_digest() == kl.encoder_digest()
        assert other.protocol_name != kl.protocol_name
        assert kl.protocol_name.startswith("kl:")

    def test_a_decoder_is_enough_to_decode(self, tuned: Path) -> None:
        autoencoder = KL(decoder_source=str(tuned), downsample=2)
        assert autoencoder.check(encodes=False, decodes=True) == []
        assert autoencoder.decode(NOISE).shape == (2, 3, 16, 16)
        assert autoencoder.encoder_digest() is None


def spoil(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(file: Path) -> None:
        weights = load_file(file)
        change(weights)
        save_file(weights, file)

    return apply


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:1000])


class TestFiles:
    @pytest.mark.parametrize(
        ("setting", "stated"),
        [
            ({"scale": 0.3}, "scale=0.3, but .* says 0.18215"),
            ({"shift": 0.1}, "shift=0.1, but .* says 0.0"),
            ({"latent_channels": 16}, "latent_channels=16, but .* says 4"),
            ({"downsample": 8}, "downsample=8, but .* says 2"),
        ],
    )
    def test_a_contradiction_of_the_folders_config_is_refused(
        self, tiny_vae: Path, setting: dict[str, Any], stated: str
    ) -> None:
        autoencoder = KL(source=str(tiny_vae), **{"downsample": 2, **setting})
        with pytest.raises(ConfigError, match=stated):
            autoencoder.moments(IMAGES)
        assert len(autoencoder.check(encodes=False, decodes=False)) == 1

    def test_a_config_that_states_no_scale_takes_ours(self, tiny_vae: Path, tmp_path: Path) -> None:
        folder = copy_of(tiny_vae, tmp_path / "x", scaling_factor=..., shift_factor=...)
        settings = KL(downsample=2, scale=0.2301).settings()
        source = Source("autoencoder.source", str(folder))
        check_config(read_config(locate(source)), settings, source)  # as U-ViT's MS-COCO models

    def test_scales_for_each_channel_are_refused(self, tiny_vae: Path, tmp_path: Path) -> None:
        folder = copy_of(tiny_vae, tmp_path / "x", latents_mean=[0.0] * 4)
        (problem,) = KL(source=str(folder), downsample=2).check(encodes=True, decodes=True)
        assert "mean and deviation for each channel" in problem

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            (spoil(lambda w: w.pop("decoder.conv_in.weight")), "1 missing, 0 unexpected keys"),
            (spoil(lambda w: w.update(more=torch.zeros(1))), "0 missing, 1 unexpected keys"),
            (spoil(lambda w: w.update({"encoder.conv_in.bias": torch.zeros(1)})), "size mismatch"),
            (cut, "cannot be loaded"),
        ],
    )
    def test_weights_that_do_not_fit_are_refused(
        self, tiny_vae: Path, tmp_path: Path, change: Callable[[Path], None], sentence: str
    ) -> None:
        folder = copy_of(tiny_vae, tmp_path / "x")
        change(folder / WEIGHTS[0])
        with pytest.raises(CheckpointError, match=sentence):
            load(folder, Source("autoencoder.source", str(folder)))

    def test_torch_files_are_read_without_running_code(
        self, tiny_vae: Path, tmp_path: Path, kl: KL
    ) -> None:
        folder = copy_of(tiny_vae, tmp_path / "x")
        weights = load_file(folder / WEIGHTS[0])
        (folder / WEIGHTS[0]).unlink()
        torch.save(weights, folder / WEIGHTS[1])
        assert torch.equal(KL(source=str(folder), downsample=2).moments(IMAGES), kl.moments(IMAGES))
        torch.save({**weights, "x": shutil.copy}, folder / WEIGHTS[1])
        with pytest.raises(CheckpointError, match="cannot be loaded"):
            KL(source=str(folder), downsample=2).moments(IMAGES)

    def test_attention_of_older_files_is_renamed(
        self, tiny_vae: Path, tmp_path: Path, kl: KL
    ) -> None:
        folder = copy_of(tiny_vae, tmp_path / "x")
        names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        weights = load_file(folder / WEIGHTS[0])
        for new, old in names.items():
            weights = {name.replace(new, old): value for name, value in weights.items()}
        save_file(weights, folder / WEIGHTS[0])
        older = KL(source=str(folder), downsample=2)
        assert torch.equal(older.moments(IMAGES), kl.moments(IMAGES))
        assert older.encoder_digest() == kl.encoder_digest()

    def test_a_subfolder_is_looked_into_or_proposed(self, tiny_vae: Path, kl: KL) -> None:
        parent = tiny_vae.parent
        inside = KL(source=str(parent), subfolder="tiny", downsample=2)
        assert torch.equal(inside.moments(IMAGES), kl.moments(IMAGES))
        (problem,) = KL(source=str(parent)).check(encodes=True, decodes=True)
        assert problem.endswith("There is one below: give the subfolder tiny.")

    def test_places_that_are_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(CheckpointError, match="is no folder and no hub id"):
            locate(Source("autoencoder.source", str(tmp_path / "gone")))
        with pytest.raises(CheckpointError, match="the hub does not give it"):
            locate(Source("autoencoder.source", "nobody/has-this"))  # offline in tests
        with pytest.raises(ConfigError, match="subfolder=vae was given without"):
            KL(subfolder="vae")

    def test_a_hub_id_is_read_from_the_hubs_own_cache(
        self, tiny_vae: Path, monkeypatch: pytest.MonkeyPatch, kl: KL
    ) -> None:
        asked = []

        def cached(place: str, name: str, subfolder: str | None = None) -> str:
            asked.append((place, name, subfolder))
            return str(tiny_vae / name)

        monkeypatch.setattr("huggingface_hub.hf_hub_download", cached)
        hub = KL(source="owner/vae", subfolder="vae", downsample=2)
        assert torch.equal(hub.moments(IMAGES), kl.moments(IMAGES))
        assert asked == [("owner/vae", name, "vae") for name in ("config.json", WEIGHTS[0])]

    def test_other_networks_and_damaged_configs_are_refused(
        self, tiny_vae: Path, tmp_path: Path
    ) -> None:
        folder = copy_of(tiny_vae, tmp_path / "x", _class_name="VQModel")
        with pytest.raises(CheckpointError, match="describes VQModel"):
            read_config(folder)
        (folder / "config.json").write_text("{")
        with pytest.raises(CheckpointError, match=r"config.json is damaged"):
            read_config(folder)

    def test_pictures_that_cannot_be_encoded(self, kl: KL) -> None:
        with pytest.raises(ConfigError, match=r"3 channel\(s\), but these have 1. Give data"):
            kl.moments(IMAGES[:, :1])
        with pytest.raises(ConfigError, match="15 x 16 do not divide by"):
            kl.moments(IMAGES[:, :, :15])
        with pytest.raises(ConfigError, match="scale must be positive"):
            KL(scale=0.0)
