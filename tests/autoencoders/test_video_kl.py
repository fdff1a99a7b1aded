"""Video autoencoders: diffusers' own numbers, its pipelines' normalisation, and sizes that fit.

The instances are tiny and random; what is checked holds for any weights.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from genscale.autoencoders.diffusers_folder import WEIGHTS
from genscale.autoencoders.video_kinds import (
    KINDS,
    VideoKind,
    VideoSizes,
    assumed,
    kind_of,
    statistics,
)
from genscale.autoencoders.video_kl import VideoAutoencoder
from genscale.errors import CheckpointError, ConfigError
from genscale.rng import key, normal

WIDTHS = (8, 8, 8, 8)
PER_CHANNEL: dict[str, Any] = {
    "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [1.0, 2.0, 0.5, 4.0],
}
BLOCKS: dict[str, Any] = {"latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2}
TINY: dict[str, dict[str, Any]] = {
    "wan": {
        "base_dim": 4,
        "z_dim": 4,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        **PER_CHANNEL,
    },
    "cogvideox": {"block_out_channels": WIDTHS, **BLOCKS},
    "ltx": {
        "latent_channels": 4,
        "block_out_channels": WIDTHS,
        "decoder_block_out_channels": WIDTHS,
        "layers_per_block": (1,) * 5,
        "decoder_layers_per_block": (1,) * 5,
    },
    "hunyuan": {"block_out_channels": WIDTHS, **BLOCKS},
    "mochi": {
        "latent_channels": 4,
        "encoder_block_out_channels": (32,) * 4,
        "decoder_block_out_channels": (32,) * 4,
        "layers_per_block": (1,) * 5,
        "add_attention_block": (False,) * 5,
        "scaling_factor": 1.5,
        **PER_CHANNEL,
    },
    "allegro": {"block_out_channels": WIDTHS, **BLOCKS},
    "cosmos": {
        "latent_channels": 4,
        "encoder_block_out_channels": WIDTHS,
        "decode_block_out_channels": WIDTHS,
        "num_layers": 1,
        "attention_resolutions": (),
        "latents_mean": [0.1, 0.2, -0.1, 0.0, 0.5, 0.6, 0.7, 0.8],  # 4 channels x 2 latent frames
        "latents_std": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
    },
}
SIZES = {"ltx": VideoSizes(4, 32, 8), "mochi": VideoSizes(4, 8, 6), "cosmos": VideoSizes(4, 8, 8)}
FRAMES = {"cogvideox": 9, "ltx": 9, "mochi": 7, "allegro": 8, "cosmos": 9}
Built = Callable[..., VideoAutoencoder]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of tiny instances, made when asked for."""
    root = tmp_path_factory.mktemp("video_vaes")

    def folder(kind: str) -> Path:
        if not (root / kind).is_dir():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                vae = KINDS[kind].load_class()(**TINY[kind])
            if kind == "ltx":
                vae.latents_mean.copy_(torch.tensor(PER_CHANNEL["latents_mean"]))
                vae.latents_std.copy_(torch.tensor(PER_CHANNEL["latents_std"]))
            vae.save_pretrained(root / kind)
        return root / kind

    return folder


@pytest.fixture
def built(folders: Callable[[str], Path]) -> Built:
    def build(kind: str, **changes: Any) -> VideoAutoencoder:
        sizes = SIZES.get(kind, VideoSizes(4, 8, 4))
        arguments = {
            "source": str(folders(kind)),
            "latent_channels": sizes.latent_channels,
            "downsample": sizes.downsample,
            "temporal_downsample": sizes.temporal_downsample,
            **changes,
        }
        return VideoAutoencoder(kind=kind, **arguments)

    return build


def clips(kind: str, count: int = 2) -> Tensor:
    side = 2 * SIZES.get(kind, VideoSizes(4, 8, 4)).downsample
    return normal(key(0, torch.arange(count)), (3, FRAMES.get(kind, 5), side, side)).clamp(-1, 1)


def by_channel(values: list[float]) -> Tensor:
    return torch.tensor(values).view(1, 4, -1, 1, 1)


@pytest.mark.parametrize("kind", sorted(KINDS))
class TestEveryKind:
    def test_latents_are_normalised_as_the_pipelines_do(self, built: Built, kind: str) -> None:
        autoencoder = built(kind)
        pixels = clips(kind)
        vae = autoencoder._loaded("encode")
        if kind == "allegro":
            vae.enable_tiling()
            vae.kernel = vae.stride = tuple(pixels.shape[2:])
        with torch.no_grad():
            z = torch.cat([vae.encode(clip).latent_dist.mode() for clip in pixels.split(1)])
            latents = autoencoder.encode(pixels)
        expected = {
            "cogvideox": z * 1.15258426,
            "hunyuan": z * 0.476986,
            "allegro": z * 0.13,
        }.get(kind)
        if expected is None:
            config = TINY[kind] if kind == "cosmos" else PER_CHANNEL
            mean, std = by_channel(config["latents_mean"]), by_channel(config["latents_std"])
            expected = (z - mean) * (1.5 if kind == "mochi" else 1.0) / std
        torch.testing.assert_close(latents, expected)
        frames = FRAMES.get(kind, 5)
        assert latents.shape[2] == autoencoder.frames_to_latent(frames) == 2 + (kind == "cogvideox")
        assert autoencoder.latent_to_frames(latents.shape[2]) == frames

    def test_decoding_undoes_shift_and_scale(self, built: Built, kind: str) -> None:
        autoencoder = built(kind)
        pixels = clips(kind)
        with torch.no_grad():
            moments = autoencoder.moments(pixels)
            decoded = autoencoder.decode(autoencoder.from_moments(moments))
            vae = autoencoder._loaded("decode")
            plain = vae.decode(moments[:1, :4]).sample
        if kind == "allegro":
            plain = plain.transpose(1, 2)
        assert decoded.shape == pixels.shape
        torch.testing.assert_close(decoded[:1], plain, rtol=1e-4, atol=1e-5)

    def test_a_clip_does_not_depend_on_its_neighbours(self, built: Built, kind: str) -> None:
        autoencoder = built(kind)
        pixels = clips(kind)
        with torch.no_grad():
            assert torch.equal(autoencoder.moments(pixels)[1:], autoencoder.moments(pixels[1:]))

    def test_noise_draws_from_the_posterior(self, built: Built, kind: str) -> None:
        autoencoder = built(kind)
        width = 4 if kind == "cosmos" else 8
        moments = normal(key(1, torch.arange(1)), (width, 2, 2, 2))
        noise = normal(key(2, torch.arange(1)), (4, 2, 2, 2))
        drawn, mean = autoencoder.from_moments(moments, noise), autoencoder.from_moments(moments)
        if kind == "cosmos":  # it has no variance
            assert torch.equal(drawn, mean)
            return
        _, scale = autoencoder._affine(mean)
        torch.testing.assert_close(drawn - mean, scale * (moments[:, 4:] / 2).exp() * noise)
        assert torch.equal(autoencoder.from_moments(moments[:, :4], noise), mean)

    def test_checks_hold_the_config_against_the_settings(self, built: Built, kind: str) -> None:
        assert built(kind).check(encodes=True, decodes=True) == []
        (problem,) = built(kind, temporal_downsample=3).check(encodes=True, decodes=True)
        assert "autoencoder.temporal_downsample=3, but the config.json of" in problem
        with pytest.raises(ConfigError, match=r"autoencoder\.downsample=16, but the config"):
            built(kind, downsample=16)._loaded("encode")


class TestSizes:
    @pytest.mark.parametrize(
        ("kind", "ratio", "fits"),
        [
            ("wan", 4, {1: 1, 5: 2, 81: 21}),
            ("cogvideox", 4, {1: 1, 9: 3, 49: 13}),
            ("ltx", 8, {1: 1, 161: 21}),
            ("mochi", 6, {1: 1, 163: 28}),
            ("allegro", 4, {4: 1, 88: 22}),
        ],
    )
    def test_frames_and_latent_frames(self, kind: str, ratio: int, fits: dict[int, int]) -> None:
        for frames, latent in fits.items():
            assert KINDS[kind].latent_frames(frames, ratio) == latent
            assert KINDS[kind].frames(latent, ratio) == frames

    def test_the_nearest_that_fit_are_told(self) -> None:
        with pytest.raises(ConfigError, match=r"num_frames=16 .* 1 \+ 4n frames\. Give 13 or 17\."):
            kind_of("wan").latent_frames(16, 4)
        with pytest.raises(ConfigError, match=r"1 \+ 8n frames\. Give 9 or 17\."):
            kind_of("cogvideox").latent_frames(13, 4)
        with pytest.raises(ConfigError, match=r"have 4n frames\. Give 4\."):
            kind_of("allegro").latent_frames(3, 4)
        assert isinstance(kind_of("wan"), VideoKind)
        with pytest.raises(ConfigError, match=r"kind='wann' is unknown\. Did you mean 'wan'"):
            kind_of("wann")

    def test_published_sizes(self) -> None:
        """Sizes of the classes' own defaults: those of the published models."""
        expected = {
            "wan": (16, 8, 4),
            "cogvideox": (16, 8, 4),
            "ltx": (128, 32, 8),
            "hunyuan": (16, 8, 4),
            "mochi": (12, 8, 6),
            "allegro": (4, 8, 4),
            "cosmos": (16, 8, 8),
        }
        for kind in KINDS.values():
            assert kind.sizes(assumed(kind)) == VideoSizes(*expected[kind.name])

    def test_clips_that_cannot_be_encoded(self, built: Built) -> None:
        autoencoder = built("wan")
        with pytest.raises(ConfigError, match=r"encodes clips .* shape \(1, 3, 16, 16\)"):
            autoencoder.moments(torch.zeros(1, 3, 16, 16))
        with pytest.raises(ConfigError, match=r"of 3 channel\(s\), but these have 1"):
            autoencoder.moments(torch.zeros(1, 1, 5, 16, 16))
        with pytest.raises(ConfigError, match="20 x 16 do not divide"):
            autoencoder.moments(torch.zeros(1, 3, 5, 20, 16))
        with pytest.raises(ConfigError, match="num_frames=6 does not suit"):
            autoencoder.moments(torch.zeros(1, 3, 6, 16, 16))
        with pytest.raises(ConfigError, match=r"of 2 latent frames, but there are 3.*num_frames=9"):
            built("cosmos").from_moments(torch.zeros(1, 4, 3, 2, 2))


class TestNormalisation:
    def test_without_a_source_it_is_what_diffusers_assumes(self) -> None:
        autoencoder = VideoAutoencoder(kind="wan")
        z = torch.zeros(1, 16, 1, 1, 1)
        latents = autoencoder.from_moments(z).flatten()
        # Wan 2.1's first channel: (0 + 0.7571) / 2.8184
        assert float(latents[0]) == pytest.approx(0.7571 / 2.8184)
        assert VideoAutoencoder(kind="hunyuan").settings()["scale"] == [0.476986]
        with pytest.raises(ConfigError, match=r"among its weights, and autoencoder\.source"):
            VideoAutoencoder(kind="ltx").settings()

    def test_scaling_factors_join_the_deviation(self) -> None:
        config = {"scaling_factor": 2.0}
        assert statistics(kind_of("mochi"), config, [1.0], [4.0]) == ([1.0], [0.5])
        assert statistics(kind_of("wan"), config, None, None) == ([0.0], [1.0])

    def test_settings_can_be_kept_as_json(self, built: Built) -> None:
        settings = built("ltx").settings()
        assert json.loads(json.dumps(settings)) == settings
        assert settings["shift"] == pytest.approx(PER_CHANNEL["latents_mean"])
        assert built("wan").settings() != settings

    def test_ltx_reads_its_own_from_the_weights(
        self, folders: Callable[[str], Path], built: Built, tmp_path: Path
    ) -> None:
        import shutil

        folder = shutil.copytree(folders("ltx"), tmp_path / "ltx")
        weights = load_file(folder / WEIGHTS[0])
        weights.pop("latents_std")
        save_file(weights, folder / WEIGHTS[0], metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match="do not give latents_mean and latents_std"):
            built("ltx", source=str(folder)).settings()
        torch.save(weights, folder / WEIGHTS[1])
        (folder / WEIGHTS[0]).unlink()
        with pytest.raises(CheckpointError, match="safe_serialization=True"):
            built("ltx", source=str(folder)).settings()


class TestUse:
    def test_construction_reads_nothing_and_training_from_a_cache_needs_no_weights(self) -> None:
        with torch.device("meta"):
            autoencoder = VideoAutoencoder(source="/nowhere")
        assert list(autoencoder.parameters()) == []
        assert VideoAutoencoder().check(encodes=False, decodes=False) == []
        (problem,) = VideoAutoencoder().check(encodes=True, decodes=False)
        assert "autoencoder.source is not set" in problem

    def test_another_kind_in_the_folder_is_refused(self, folders: Callable[[str], Path]) -> None:
        autoencoder = VideoAutoencoder(kind="hunyuan", source=str(folders("wan")))
        (problem,) = autoencoder.check(encodes=True, decodes=True)
        assert (
            "describes AutoencoderKLWan, but an AutoencoderKLHunyuanVideo was expected" in problem
        )

    def test_digests_tell_encoders_and_decoders_apart(self, built: Built) -> None:
        one, other = built("wan"), built("hunyuan")
        assert one.encoder_digest() == built("wan").encoder_digest() != other.encoder_digest()
        assert one.protocol_name.startswith("wan:")
        assert one.protocol_name != other.protocol_name

    def test_tiles_cover_the_same_clip(self, built: Built) -> None:
        pixels = clips("wan")
        tiled, whole = built("wan", tiling=True), built("wan")
        with torch.no_grad():  # smaller than a tile: nothing changes
            assert torch.equal(tiled.encode(pixels), whole.encode(pixels))
        assert tiled._loaded("encode").use_tiling
        with pytest.raises(ConfigError, match="do not divide into Allegro's tiles"):
            built("allegro", tiling=True).moments(clips("allegro"))

    def test_decoding_in_bfloat16(self, built: Built) -> None:
        latents = normal(key(0, torch.arange(1)), (4, 2, 2, 2))
        with torch.no_grad():
            rounded = built("hunyuan", decode_dtype="bfloat16").decode(latents)
            exact = built("hunyuan").decode(latents)
        assert rounded.dtype == torch.bfloat16
        torch.testing.assert_close(rounded.float(), exact, rtol=0.1, atol=0.1)
        with pytest.raises(ConfigError, match="neither float32 nor bfloat16"):
            VideoAutoencoder(decode_dtype="float16")  # type: ignore[arg-type]

    def test_tensors_of_a_module_first_imported_on_the_meta_device_get_their_data(self) -> None:
        import importlib

        module = importlib.import_module("diffusers.models.autoencoders.autoencoder_kl_cosmos")
        with torch.device("meta"):
            module = importlib.reload(module)
        assert all(wave.is_meta for wave in module._WAVELETS.values())
        kind_of("cosmos").load_class()
        assert float(module._WAVELETS["haar"][0]) == pytest.approx(0.5**0.5)

    def test_a_broken_installation_is_told_in_a_sentence(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "diffusers.models.autoencoders.autoencoder_kl_wan", None)
        with pytest.raises(
            ImportError, match=r"kind=wan needs diffusers' AutoencoderKLWan.*remove"
        ):
            kind_of("wan").load_class()
