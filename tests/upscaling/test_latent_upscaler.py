"""Latent upscalers behind diffusers pipelines: conversion, decoding, refusals."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from genscale.errors import CheckpointError, ConfigError
from genscale.io.converters.swin import to_official
from genscale.upscaling.interpolation import Interpolation
from genscale.upscaling.latent_conventions import (
    FAMILIES,
    decode,
    family_of,
    to_vae_space,
    vae_channels,
    vae_is_video,
    vae_stride,
)
from genscale.upscaling.latent_upscaler import (
    LatentUpscaler,
    UpscaledPipeline,
    with_latent_upscaler,
)
from genscale.upscaling.lua import LUA
from genscale.upscaling.swinir import SwinIR

TINY = {
    "input_size": 8,
    "window_size": 4,
    "depths": [2],
    "hidden_size": 8,
    "num_heads": [2],
    "head_size": 4,
}


def tiny_vae(channels, **settings):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **settings,
    ).eval()


def sd_pipe():
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
    )
    pipe = StableDiffusionPipeline(
        *(tiny_vae(4), None, None, unet, DDIMScheduler(clip_sample=False, steps_offset=1)),
        *(None, None),
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe, {"guidance_scale": 1.0, "prompt_embeds": torch.zeros(1, 4, 8)}


def sd3_pipe():
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        pos_embed_max_size=16,
    )
    vae = tiny_vae(16, scaling_factor=1.5305, shift_factor=0.0609)
    nothing = [None] * 6
    pipe = StableDiffusion3Pipeline(transformer, FlowMatchEulerDiscreteScheduler(), vae, *nothing)
    pipe.set_progress_bar_config(disable=True)
    embeds = {
        "prompt_embeds": torch.zeros(1, 4, 8),
        "pooled_prompt_embeds": torch.zeros(1, 8),
    }
    return pipe, {"guidance_scale": 1.0, **embeds}


def flux_pipe():
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )
    vae = tiny_vae(16, scaling_factor=0.3611, shift_factor=0.1159)
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, None, None, transformer)
    pipe.set_progress_bar_config(disable=True)
    embeds = {
        "prompt_embeds": torch.zeros(1, 4, 8),
        "pooled_prompt_embeds": torch.zeros(1, 8),
    }
    return pipe, embeds


PIPES = {"sd": sd_pipe, "sd3": sd3_pipe, "flux": flux_pipe}


def stand_in(name="AutoencoderKL", *, stride=8, bn=None, **config):
    """Return what is read of a pipeline: the VAE's config, its class, and the stride."""
    vae = type(name, (), {})()
    vae.config = config
    if bn is not None:
        vae.bn = bn
        vae.config = SimpleNamespace(**config)
    return SimpleNamespace(vae=vae, vae_scale_factor=stride)


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def tiny_upscaler(channels, family=None, **settings):
    torch.manual_seed(0)
    return LatentUpscaler(LUA(channels=channels, **TINY).eval(), family=family, **settings)


@pytest.mark.slow  # importing the pipelines is
@pytest.mark.parametrize("kind", PIPES)
def test_latents_decode_to_what_the_pipeline_returns(kind):
    """Converted and decoded without upscaling, pictures are the pipeline's own, exactly."""
    pipe, call = PIPES[kind]()
    size = {"height": 16, "width": 24, "num_inference_steps": 2}

    def run(output_type):
        generator = torch.Generator().manual_seed(0)
        return pipe(**call, **size, output_type=output_type, generator=generator).images

    u = to_vae_space(pipe, run("latent"), 16, 24)
    assert u.shape == (1, vae_channels(pipe), 8, 12)
    assert u.dtype == torch.float32
    torch.testing.assert_close(decode(pipe, u, output_type="pt"), run("pt"), atol=1e-5, rtol=1e-5)
    assert family_of(pipe) == kind
    assert vae_stride(pipe) == 2
    assert not vae_is_video(pipe.vae)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_a_wrapped_pipeline_is_called_as_before_and_gives_larger_pictures(kind):
    pipe, call = PIPES[kind]()
    upscaler = tiny_upscaler(vae_channels(pipe), family=kind)
    larger = with_latent_upscaler(pipe, upscaler, scale=2)
    assert isinstance(larger, UpscaledPipeline)
    call |= {"height": 16, "width": 24, "num_inference_steps": 1}

    def run(**more):
        return larger(**call, generator=torch.Generator().manual_seed(0), **more)

    assert run().images[0].size == (48, 32)
    images = run(output_type="pt").images
    (again,) = run(output_type="pt", return_dict=False)
    assert torch.equal(images, again)
    latents = run(output_type="latent").images
    assert latents.shape == (1, upscaler.channels, 16, 24)
    assert torch.equal(decode(pipe, latents, output_type="pt"), images)
    assert larger.vae is pipe.vae  # the rest is the pipeline's own
    assert larger.to("cpu") is larger


def test_channel_statistics_are_undone_for_sdxl_and_qwen():
    mean, std = [0.5, -1.0, 2.0, 0.0], [2.0, 0.5, 1.0, 3.0]
    m, s = (torch.tensor(v).view(1, -1, 1, 1) for v in (mean, std))
    y = numbers(1, 4, 2, 4)
    stats = {"latents_mean": mean, "latents_std": std}
    sdxl = stand_in(latent_channels=4, scaling_factor=0.13025, **stats)
    torch.testing.assert_close(to_vae_space(sdxl, y, 16, 32), y * s / 0.13025 + m)
    plain = stand_in(latent_channels=4, scaling_factor=0.13025, latents_mean=None)
    torch.testing.assert_close(to_vae_space(plain, y, 16, 32), y / 0.13025)
    assert family_of(plain) == "sdxl"
    assert family_of(sdxl) is None
    qwen = stand_in("AutoencoderKLQwenImage", z_dim=4, **stats)
    assert family_of(qwen) == "qwen"
    assert vae_is_video(qwen.vae)
    packed = y.view(1, 4, 1, 2, 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 2, 16)
    torch.testing.assert_close(to_vae_space(qwen, packed, 16, 32), y * s + m)
    torch.testing.assert_close(to_vae_space(qwen, y[:, :, None], 16, 32), y * s + m)


def test_patches_normalised_by_a_batch_norm_are_undone_before_they_are_unpacked():
    bn = nn.BatchNorm1d(8)
    bn.running_mean, bn.running_var = numbers(8), numbers(8).square()
    flux2 = stand_in("AutoencoderKLFlux2", bn=bn, latent_channels=2, batch_norm_eps=1e-4)
    packed = numbers(1, 6, 8)
    got = to_vae_space(flux2, packed, 32, 48)
    assert got.shape == (1, 2, 4, 6)
    # cell (2 i + a, 2 j + b) of channel c is number 4 c + 2 a + b of patch (i, j)
    c, i, j, a, b = 1, 1, 2, 0, 1
    n = 4 * c + 2 * a + b
    expected = packed[0, 3 * i + j, n] * (bn.running_var[n] + 1e-4).sqrt() + bn.running_mean[n]
    torch.testing.assert_close(got[0, c, 2 * i + a, 2 * j + b], expected)
    assert family_of(flux2) == "flux2"


@pytest.mark.parametrize("kind", ["sd", "qwen"])
def test_tiled_decoding_gives_the_whole_picture(kind):
    """With a decoder that only enlarges cells, tiles are exact; clips have one frame."""
    calls = []

    def run(z, return_dict):
        calls.append(z.shape)
        flat = z[:, :, 0] if kind == "qwen" else z
        image = torch.nn.functional.interpolate(flat[:, :3], scale_factor=2.0)
        return (image[:, :, None] if kind == "qwen" else image,)

    pipe = stand_in(stride=2, **({"z_dim": 4} if kind == "qwen" else {"latent_channels": 4}))
    pipe.vae.decode, pipe.vae.dtype, pipe.vae.device = run, torch.float32, torch.device("cpu")
    pipe.image_processor = SimpleNamespace(postprocess=lambda image, output_type: image)
    u = numbers(1, 4, 12, 20)
    whole = decode(pipe, u)
    assert len(calls) == 1
    torch.testing.assert_close(decode(pipe, u, tile=8, overlap=2), whole)
    assert len(calls) == 1 + 2 * 3
    assert calls[-1][-2:] == (8, 8)
    large = decode(pipe, numbers(1, 4, 300, 260))  # in tiles without being asked
    assert large.shape == (1, 3, 600, 520)
    assert calls[-1][-2:] == (128, 128)


def test_a_half_precision_vae_that_overflows_decodes_in_float32():
    from diffusers.image_processor import VaeImageProcessor

    vae = tiny_vae(4, force_upcast=True).half()
    processor = VaeImageProcessor(vae_scale_factor=2)
    pipe = SimpleNamespace(vae=vae, vae_scale_factor=2, image_processor=processor)
    seen = []
    pipe.vae.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    images = decode(pipe, numbers(1, 4, 4, 4), output_type="pt")
    assert seen == [torch.float32]
    assert pipe.vae.dtype == torch.float16
    assert images.isfinite().all()


def test_latents_of_another_size_or_clips_are_refused():
    pipe = stand_in(latent_channels=16, scaling_factor=1.0)
    with pytest.raises(ConfigError, match=r"\(B, 6, 64\) were expected .* for pictures of 32 x 48"):
        to_vae_space(pipe, numbers(1, 5, 64), 32, 48)
    with pytest.raises(ConfigError, match="one by one"):
        to_vae_space(pipe, numbers(1, 16, 3, 4, 6), 32, 48)


def test_upscalers_of_another_space_are_refused():
    pipe = stand_in(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609)
    assert family_of(pipe) == "sd3"
    assert FAMILIES["sd3"][0] == FAMILIES["flux"][0]  # the channels do not tell them apart
    with pytest.raises(ConfigError, match=r"space 'flux', but those of .* are of 'sd3'"):
        with_latent_upscaler(pipe, tiny_upscaler(16, "flux"))
    with pytest.raises(ConfigError, match=r"latents of 4 channels, but those of .* have 16"):
        with_latent_upscaler(pipe, tiny_upscaler(4))
    with pytest.raises(ConfigError, match=r"scale=3 is not offered: .* scales 2, 4"):
        with_latent_upscaler(pipe, tiny_upscaler(16, "sd3"), scale=3)
    with_latent_upscaler(pipe, tiny_upscaler(16))  # where nobody knows, nothing is refused
    with pytest.raises(ConfigError, match="SwinIR upscales pictures"):
        LatentUpscaler(SwinIR(**{k: v for k, v in TINY.items() if k != "head_size"}))


def test_latents_unlike_those_of_training_are_warned_of_and_clamped():
    stats = {"mean": [1.0] * 4, "std": [2.0] * 4}
    upscaler = tiny_upscaler(4, latent_stats=stats, clamp_sigma=2.5)
    usual = 1.0 + 2.0 * numbers(1, 4, 8, 8).clamp(-2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = upscaler(usual)
    assert torch.equal(got, tiny_upscaler(4)(usual))  # the clamp changes nothing in range
    with pytest.warns(UserWarning, match="is 6 deviations away"):
        far = upscaler(torch.where(usual > 100, usual, 13.0) + 1e-3 * usual)
    assert torch.equal(far, tiny_upscaler(4)(torch.full_like(usual, 6.0)))
    with pytest.warns(UserWarning, match="differs 11"):
        upscaler(1.0 + 0.1 * (usual - 1.0))
    with pytest.raises(ConfigError, match="of 4 channels"):
        tiny_upscaler(4, latent_stats={"mean": [0.0], "std": [1.0]})
    with pytest.raises(ConfigError, match="clamp_sigma=3 must be positive and needs latent_stats"):
        tiny_upscaler(4, clamp_sigma=3)


def test_an_upscaler_comes_back_from_its_folder(tmp_path):
    stats = {"mean": [0.0] * 4, "std": [1.0] * 4}
    upscaler = tiny_upscaler(4, "sdxl", latent_stats=stats)
    upscaler.save_pretrained(tmp_path / "lua")
    again = LatentUpscaler.from_pretrained(tmp_path / "lua")
    u = numbers(1, 4, 8, 8)
    assert torch.equal(again(u, 4), upscaler(u, 4))
    assert (again.family, again.latent_stats) == ("sdxl", stats)
    assert (again.channels, again.scales) == (4, (2, 4))
    assert not any(p.requires_grad for p in again.network.parameters())
    file = LatentUpscaler.from_pretrained(
        tmp_path / "lua" / "diffusion_pytorch_model.safetensors", family="sd"
    )
    assert torch.equal(file(u), upscaler(u))
    assert file.family == "sd"
    half = again.to(dtype=torch.bfloat16)(u)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, upscaler(u), atol=0.05, rtol=0.05)
    LatentUpscaler(Interpolation(scales=(2,))).save_pretrained(tmp_path / "bicubic")
    assert LatentUpscaler.from_pretrained(tmp_path / "bicubic")(u).shape == (1, 4, 16, 16)


@pytest.mark.parametrize("key", ["params_ema", "params"])
def test_the_authors_file_is_read_as_it_is(key, tmp_path):
    upscaler = tiny_upscaler(16)
    state = to_official(upscaler.network.state_dict(), upscaler.network.config)
    block = "layers.0.residual_group.blocks"
    for j in range(2):
        state[f"{block}.{j}.attn.relative_position_index"] = torch.zeros(16, 16).long()
    state[f"{block}.1.attn_mask"] = torch.zeros(4, 16, 16)
    torch.save({key: state}, tmp_path / "lua_flux.pth")
    read = LatentUpscaler.from_pretrained(tmp_path / "lua_flux.pth")
    assert read.family == "flux"
    u = numbers(1, 16, 9, 8)
    assert torch.equal(read(u, 4), upscaler(u, 4))
    assert torch.equal(read(u, 2, tile=100), upscaler(u, 2))


def test_a_hub_id_gives_the_authors_file(tmp_path, monkeypatch):
    import huggingface_hub

    upscaler = tiny_upscaler(16)
    state = to_official(upscaler.network.state_dict(), upscaler.network.config)
    torch.save({"params": state}, tmp_path / "lua_flux.pth")
    asked = []

    def fetch(repository, name):
        asked.append((repository, name))
        if repository != "owner/there":
            raise OSError("no such repository")
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    u = numbers(1, 16, 8, 8)
    assert torch.equal(LatentUpscaler.from_pretrained("owner/there")(u), upscaler(u))
    assert asked == [("owner/there", "lua_flux.pth")]
    with pytest.raises(CheckpointError, match=r"the hub does not give its lua_flux\.pth \(OSError"):
        LatentUpscaler.from_pretrained("owner/elsewhere")


def test_what_is_no_upscaler_is_told_in_a_sentence(tmp_path):
    with pytest.raises(CheckpointError, match="is no folder, no file and no hub id"):
        LatentUpscaler.from_pretrained(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"no config\.json in"):
        LatentUpscaler.from_pretrained(tmp_path)
    pictures = SwinIR(**{k: v for k, v in TINY.items() if k != "head_size"})
    torch.save(to_official(pictures.state_dict(), pictures.config), tmp_path / "swinir.pth")
    with pytest.raises(ConfigError, match="expected, but SwinIR upscales pictures"):
        LatentUpscaler.from_pretrained(tmp_path / "swinir.pth")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="has no official keys of LUA"):
        LatentUpscaler.from_pretrained(tmp_path / "other.pth")
    pictures.save_pretrained(tmp_path / "swinir")
    with pytest.raises(ConfigError, match="expected, but SwinIR upscales pictures"):
        LatentUpscaler.from_pretrained(tmp_path / "swinir")
