"""Upscaling in a pipeline: where it sits, what it is given, and what it refuses."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.autoencoders.base import Variational
from genscale.autoencoders.identity import Identity
from genscale.errors import ConfigError
from genscale.upscaling.base import Upscaler
from genscale.upscaling.choice import (
    InterpolatedUpscaling,
    NoUpscaling,
    TrainedUpscaling,
    UpscalingChoice,
)
from genscale.upscaling.espcn import ESPCN
from genscale.upscaling.interpolation import Interpolation
from genscale.upscaling.loading import facts_of, save_upscaler
from genscale.upscaling.lua import LUA
from genscale.upscaling.stage import Upscaling

TRUNK = {"input_size": 8, "window_size": 4, "depths": [1], "hidden_size": 8, "num_heads": [2]}


class Blocks(Variational):
    """Four latent channels of two pixels; decodes by blocks, so that tiles are exact."""

    latent_channels, downsample, image_channels = 4, 2, 3

    def __init__(self, scale: float = 0.5, shift: float = 0.25) -> None:
        super().__init__()
        self.scale, self.shift = scale, shift
        self.decoded: list[tuple[int, ...]] = []

    def moments(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def encoder_digest(self) -> str:
        return "f" * 64

    def decode(self, latents: Tensor) -> Tensor:
        self.decoded.append(tuple(latents.shape))
        z = latents / self.scale + self.shift
        return F.interpolate(z[:, :3] + z[:, 3:], scale_factor=2.0)


@pytest.fixture
def vae() -> Blocks:
    return Blocks()


def lua(channels: int = 4) -> LUA:
    torch.manual_seed(0)
    network: LUA = LUA(channels=channels, head_size=4, **TRUNK)
    return network.eval()


def latents(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def nearest(space: str, channels: int) -> Upscaler:
    network: Upscaler = Interpolation(space=space, channels=channels, mode="nearest")
    return network


@torch.no_grad()
def test_latents_reach_the_network_as_the_decoder_takes_them(vae: Blocks) -> None:
    y, network = latents(2, 4, 4, 6), lua()
    images = Upscaling(network, scale=2).decode(vae, vae.decode, y)
    u = y / 0.5 + 0.25  # neither shifted nor scaled
    wanted = vae.decode((network(u, 2) - 0.25) * 0.5)
    torch.testing.assert_close(images, wanted)
    assert images.shape == (2, 3, 16, 24)


@torch.no_grad()
def test_pictures_reach_the_network_in_the_unit_interval() -> None:
    torch.manual_seed(0)
    network = ESPCN(scale=3, channels=1).eval()
    x = 1.5 * latents(2, 1, 5, 5)
    upscaling = Upscaling(network)
    wanted = network((x * 0.5 + 0.5).clamp(0, 1), 3) * 2 - 1
    assert torch.equal(upscaling.decode(Identity(latent_channels=1), lambda y: y, x), wanted)
    assert upscaling.enlarged((1, 5, 5)) == (1, 15, 15)


@pytest.mark.parametrize("space", ["latent", "pixel"])
def test_clips_are_enlarged_frame_by_frame(space: str) -> None:
    clip = latents(1, 1, 3, 4, 4).clamp(-1, 1)
    upscaling = Upscaling(nearest(space, 1), scale=2)
    out = upscaling.decode(Identity(latent_channels=1), lambda y: y, clip)
    assert out.shape == (1, *upscaling.enlarged((1, 3, 4, 4))) == (1, 1, 3, 8, 8)
    torch.testing.assert_close(out[:, :, 1, ::2, 1::2], clip[:, :, 1])


def test_gradients_reach_the_latents(vae: Blocks) -> None:
    y = latents(1, 4, 4, 4).requires_grad_()
    network = lua()
    images = Upscaling(network, scale=2).decode(vae, vae.decode, y)
    (gradient,) = torch.autograd.grad(images.square().mean(), y)
    assert float(gradient.abs().min()) > 0
    assert not any(weight.requires_grad for weight in network.parameters())


@torch.no_grad()
def test_a_decoder_works_in_tiles_where_that_is_asked_for(vae: Blocks) -> None:
    y = latents(1, 4, 9, 7)
    whole = Upscaling(nearest("latent", 4), scale=2).decode(vae, vae.decode, y)
    tiled = Upscaling(nearest("latent", 4), scale=2, decode_tile=8).decode(vae, vae.decode, y)
    torch.testing.assert_close(tiled, whole)
    # 18 x 14 cells in tiles of 8 that share 4
    assert vae.decoded == [(1, 4, 18, 14), *[(1, 4, 8, 8)] * 12]


@torch.no_grad()
def test_more_than_65536_cells_are_decoded_in_tiles(vae: Blocks) -> None:
    for width, tiles in ((128, {(1, 4, 256, 256)}), (129, {(1, 4, 128, 128)})):
        vae.decoded.clear()
        Upscaling(nearest("latent", 4), scale=2).decode(
            vae, vae.decode, torch.zeros(1, 4, 128, width)
        )
        assert set(vae.decoded) == tiles


class TestLabel:
    def test_it_names_weights_and_settings(self) -> None:
        network = lua()
        label = Upscaling(network, scale=4, tile=8, decode_tile=64).label
        assert label.startswith("upscaled x4 by LUA:")
        assert label.endswith("tiles of 8 overlapping 4, decoded in tiles of 64")
        other = copy.deepcopy(network)
        with torch.no_grad():
            next(other.parameters()).add_(1)
        assert Upscaling(other, scale=4, tile=8, decode_tile=64).label != label
        assert Upscaling(nearest("pixel", 3)).label == "upscaled x2 by Interpolation"


KNOWN = facts_of(lua())
SPACES: list[tuple[dict[str, Any], str]] = [
    ({"autoencoder": {"encoder": "0123456789"}}, "encoder 01234567, but Blocks .* another latent"),
    ({"autoencoder": {"downsample": 8}}, "latents of 8 pixels a cell, but those of Blocks have 2"),
    ({"family": "sdxl"}, "the space 'sdxl', but those of Blocks are of 'sd'"),
]


class TestFit:
    @pytest.mark.parametrize(("facts", "words"), SPACES)
    def test_latents_of_another_space_are_refused(self, facts: dict[str, Any], words: str) -> None:
        like_sd = Blocks(scale=0.18215, shift=0.0)
        with pytest.raises(ConfigError, match=words):
            Upscaling(lua(), facts=replace(KNOWN, **facts)).check(like_sd, 3)

    def test_the_space_of_training_is_not(self, vae: Blocks) -> None:
        trained = {"encoder": vae.encoder_digest(), "downsample": 2}
        facts = replace(KNOWN, autoencoder=trained)
        Upscaling(lua(), facts=facts).check(vae, 3)
        Upscaling(lua()).check(vae, 3)  # where nothing is known, nothing is refused

    def test_other_channels_are_refused(self, vae: Blocks) -> None:
        with pytest.raises(ConfigError, match="latents of 16 channels, but those of Blocks have 4"):
            Upscaling(lua(16)).check(vae, 3)
        with pytest.raises(ConfigError, match=r"of 1 channel\(s\), but those .* have 3"):
            Upscaling(ESPCN()).check(vae, 3)

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"scale": 3}, "scale=3 is not offered: LUA has the scales 2, 4"),
            ({"tile": 8, "overlap": 8}, "tile=8, overlap=8"),
            ({"overlap": 4}, "no tile was given"),
            ({"decode_tile": 0}, "decode_tile must be at least 1"),
            ({"clamp_sigma": 2.0}, "needs latent_stats"),
        ],
    )
    def test_numbers_that_make_no_sense_are_refused(
        self, settings: dict[str, Any], words: str
    ) -> None:
        with pytest.raises(ConfigError, match=words):
            Upscaling(lua(), **settings)

    def test_only_latents_are_clamped(self) -> None:
        with pytest.raises(ConfigError, match="clamp_sigma=2 is for latents, but ESPCN"):
            Upscaling(ESPCN(), clamp_sigma=2)


def test_latents_are_looked_at_once(vae: Blocks) -> None:
    stats = {"mean": [9.0] * 4, "std": [1.0] * 4}
    upscaling = Upscaling(lua(), facts=replace(KNOWN, latent_stats=stats))
    with pytest.warns(UserWarning, match="unlike those"):
        upscaling.decode(vae, vae.decode, latents(1, 4, 4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        upscaling.decode(vae, vae.decode, latents(1, 4, 4, 4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("upscaler") / "lua"
    save_upscaler(lua(), folder, KNOWN)
    return folder


class TestChoice:
    def test_a_network_is_read_where_it_is_named(self, folder: Path, vae: Blocks) -> None:
        choice: UpscalingChoice = TrainedUpscaling(kind="LUA", run=str(folder), scale=4)
        found = choice.placed(vae, 3)
        assert found is not None
        assert found.label == Upscaling.from_pretrained(folder, scale=4).label
        assert found.label == Upscaling(lua(), scale=4).label

    def test_interpolation_takes_the_channels_of_the_pipeline(self, vae: Blocks) -> None:
        before = InterpolatedUpscaling(space="latent", scale=3).placed(vae, 3)
        behind = InterpolatedUpscaling(mode="nearest").placed(vae, 3)
        assert (before.network.channels, before.label) == (4, "upscaled x3 by bicubic_latent")
        assert (behind.network.channels, behind.label) == (3, "upscaled x2 by nearest")

    def test_none_enlarges_nothing(self, vae: Blocks) -> None:
        assert NoUpscaling().placed(vae, 3) is None  # type: ignore[func-returns-value]

    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (lambda at: TrainedUpscaling(kind="LUA"), "upscaling.run=None .* Give upscaling.run="),
            (lambda at: TrainedUpscaling(kind="LUA", run=at, file=at), "reads one trained network"),
            (lambda at: TrainedUpscaling(kind="LUA", file=at), "is a folder, but a file"),
            (
                lambda at: TrainedUpscaling(kind="IRN", run=at),
                "expects a network IRN, .* holds LUA",
            ),
        ],
    )
    def test_a_place_that_does_not_fit_is_told(
        self, make: Callable[[str], TrainedUpscaling], words: str, folder: Path, vae: Blocks
    ) -> None:
        with pytest.raises(ConfigError, match=words):
            make(str(folder)).placed(vae, 3)
