"""What upscalers learn from: patches, small pictures, and losses that follow the step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genscale import rng
from genscale.autoencoders.base import Variational
from genscale.autoencoders.identity import Identity
from genscale.data.base import TensorImages
from genscale.data.stream import GlobalStream
from genscale.errors import ConfigError
from genscale.io.images import from_uint8
from genscale.metrics.pixels import Pixels
from genscale.metrics.reconstruction import picture_psnr
from genscale.training.kept_latents import KeptLatents
from genscale.training.latent_upscaling import (
    PUBLISHED_WEIGHTS,
    LatentUpscaling,
    LatentUpscalingTraining,
    Stage,
)
from genscale.training.reconstruction import map_distance
from genscale.training.rescaling import Rescaling, RescalingTraining
from genscale.training.super_resolution import SuperResolution, SuperResolutionTraining
from genscale.training.trainable import MODEL, PictureBatch
from genscale.training.upscaling import (
    UpscalerRecipe,
    UpscalerTraining,
    count_upscaler_flops,
    cut,
    interpolated,
    reduced,
    turned,
)
from genscale.upscaling.espcn import ESPCN
from genscale.upscaling.irn import IRN
from genscale.upscaling.latent_space import autoencoder_facts, decoder_affine, space_of
from genscale.upscaling.loading import facts_of, save_upscaler
from genscale.upscaling.lua import LUA
from genscale.upscaling.swinir import SwinIR
from tests.autoencoders.test_tokenizer_training import Slopes

TINY: dict[str, Any] = {
    "input_size": 8,
    "window_size": 4,
    "depths": [2],
    "hidden_size": 8,
    "num_heads": [2],
    "drop_path": 0.0,
}


class Squares(Variational):
    """An autoencoder without mistakes on squares of 2 pixels: the moments are their means."""

    latent_channels = 1
    downsample = 2
    image_channels = 1
    scale, shift = 0.5, 3.0

    def moments(self, images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images, 2)

    def decode(self, latents: Tensor) -> Tensor:
        means = latents / self.scale + self.shift
        return means.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def encoder_digest(self) -> str | None:
        return "00ff"


def lua(scales: tuple[int, ...] = (2, 4)) -> LUA:
    torch.manual_seed(0)
    return LUA(**TINY, channels=1, scales=scales, head_size=4)


def batch(step: int = 0, side: int = 16, count: int = 3) -> PictureBatch:
    torch.manual_seed(1)
    images = torch.rand(count, 1, side, side) * 2 - 1
    return PictureBatch(images=images, position=torch.arange(count) + 10, step=step, size=count)


def losses(training: UpscalerTraining, given: PictureBatch) -> Any:
    return training.losses(given, rng.for_step(0, given.position))


class TestPictures:
    def test_small_pictures_are_levels_of_eight_bits(self) -> None:
        ramp = torch.linspace(-1, 1, 32).expand(1, 1, 32, 32)
        small = reduced(ramp, 4)
        assert small.shape == (1, 1, 8, 8)
        levels = (small + 1) * 127.5
        torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
        # a ramp stays one: the middle of every square, away from the edges
        means = nn.functional.avg_pool2d(ramp, 4)
        torch.testing.assert_close(small[..., 2:6], means[..., 2:6], atol=1 / 255 + 1e-6, rtol=0)
        assert interpolated(small, 4).shape == ramp.shape
        with pytest.raises(ConfigError, match="32 x 32 cannot be made 3 times smaller"):
            reduced(ramp, 3)

    def test_patches_are_parts_of_pictures_by_position(self) -> None:
        images = torch.arange(2 * 5 * 7.0).view(2, 1, 5, 7)
        position = torch.tensor([4, 9])
        patches = cut(images, 3, rng.for_step(0, position))
        assert patches.shape == (2, 1, 3, 3)
        for image, patch in zip(images, patches, strict=True):
            top, left = divmod(int(patch[0, 0, 0] - image[0, 0, 0]), 7)
            assert torch.equal(patch, image[:, top : top + 3, left : left + 3])
        again = cut(images[1:], 3, rng.for_step(0, position[1:]))
        assert torch.equal(again, patches[1:])  # whoever is in the batch
        many = cut(images[:1].expand(64, -1, -1, -1), 3, rng.for_step(0, torch.arange(64)))
        assert len({int(patch[0, 0, 0]) for patch in many}) == 3 * 5  # every place comes up
        with pytest.raises(ConfigError, match="larger than the data's pictures"):
            cut(images, 6, rng.for_step(0, position))

    def test_there_are_eight_ways_to_turn(self) -> None:
        image = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).expand(64, 1, 2, 2)
        found = turned(image, rng.for_step(0, torch.arange(64)))
        assert len({tuple(x.flatten().tolist()) for x in found}) == 8

    def test_recipes_cut_and_turn(self) -> None:
        recipe = SuperResolution(patch_size=8, turned=True)
        assert isinstance(recipe, UpscalerRecipe)
        training = recipe.build(ESPCN(scale=2), seed=0)
        given = batch()
        assert training.patches(given, rng.for_step(0, given.position)).shape == (3, 1, 8, 8)
        assert (recipe.side(16), SuperResolution().side(16)) == (8, 16)
        with pytest.raises(ConfigError, match="patch_size must be at least 1"):
            SuperResolution(patch_size=0)


class TestStages:
    recipe = LatentUpscaling(stages={"latent": 10, "latent_pixel": 4, "pixel": 2})

    def test_steps_go_through_them(self) -> None:
        found = [self.recipe.stage_at(step).number for step in range(20)]
        assert found == [1] * 10 + [2] * 4 + [3] * 6  # the last one has no end

    def test_heads_are_drawn_at_the_end_of_each(self) -> None:
        late = [self.recipe.stage_at(step).one_head for step in range(14)]
        assert late == [False] * 6 + [True] * 4 + [False] * 3 + [True]
        training = self.recipe.build(lua(), seed=3, autoencoder=Squares())
        stage = self.recipe.stage_at(9)
        drawn = [training.scales_of(step, stage) for step in range(40)]
        assert set(drawn) == {(2,), (4,)}
        assert 10 < drawn.count((2,)) < 30
        assert training.scales_of(0, self.recipe.stage_at(0)) == (2, 4)

    def test_without_steps_of_one_head_there_are_none_however_long_a_run(self) -> None:
        recipe = replace(self.recipe, one_head_last=0.0)
        assert not any(recipe.stage_at(step).one_head for step in range(40))

    def test_a_stage_of_no_steps_is_left_out(self) -> None:
        recipe = LatentUpscaling(stages={"latent": 3, "pixel": 5})
        assert [recipe.stage_at(step).name for step in (2, 3, 100)] == ["latent", "pixel", "pixel"]

    def test_weights_are_the_published_ones_unless_given(self) -> None:
        recipe = LatentUpscaling(weights={"pixel": {"eagle": 0.0, "pixel_l1": 2.0}})
        assert recipe.weights_of("pixel") == {"pixel_l1": 2.0, "pixel_fourier": 1.0}
        assert recipe.weights_of("latent") == PUBLISHED_WEIGHTS["latent"]
        assert recipe.stage_at(0) == Stage("latent", 1, PUBLISHED_WEIGHTS["latent"], False)

    @pytest.mark.parametrize(
        ("settings", "sentence"),
        [
            ({"stages": {"latnt": 3}}, "objective.stages names 'latnt'.*Did you mean 'latent'"),
            ({"stages": {"latent": 0}}, "not all 0"),
            ({"weights": {"pixel": {"lpips": 1}}}, "objective.weights.pixel names 'lpips'"),
            ({"weights": {"latent": {"latent_l1": -1}}}, "must not be negative"),
            ({"weights": {"pixel": {"perceptual": 1}}}, "only the weight was given"),
            ({"perceptual": Slopes()}, "only the network was given"),
            ({"one_head_last": 2.0}, r"one_head_last must lie in \[0, 1\]"),
            ({"downscaled_by": 0}, "downscaled_by must be a whole number"),
            ({"frozen_steps": 5}, "are of a LUA to go on from"),
        ],
    )
    def test_what_is_out_of_range_is_told(self, settings: Any, sentence: str) -> None:
        with pytest.raises(ConfigError, match=sentence):
            LatentUpscaling(**settings)


class TestLatents:
    def training(self, **settings: Any) -> LatentUpscalingTraining:
        recipe = LatentUpscaling(stages={"latent": 5, "latent_pixel": 5, "pixel": 5}, **settings)
        return recipe.build(lua(), seed=0, autoencoder=Squares())

    def test_latents_are_those_of_the_decoder(self) -> None:
        training, images = self.training(), batch().images
        assert isinstance(training, LatentUpscalingTraining)
        u = training.encode(images)
        torch.testing.assert_close(u, Squares().moments(images))
        torch.testing.assert_close(
            training.decode(u), u.repeat_interleave(2, 2).repeat_interleave(2, 3)
        )
        shift, scale = decoder_affine(Squares(), u)
        assert (float(shift), float(scale)) == (3.0, 0.5)
        shift, scale = decoder_affine(Identity(latent_channels=1), u)
        assert (float(shift), float(scale)) == (0.0, 1.0)

    def test_every_stage_has_its_losses(self) -> None:
        training = self.training()
        for step, stage in ((0, "latent"), (5, "latent_pixel"), (10, "pixel")):
            out = losses(training, batch(step))
            named = {f"loss_{n}_x{s}" for n in PUBLISHED_WEIGHTS[stage] for s in (2, 4)}
            assert {name for name in out.terms if name.startswith("loss_")} == named
            total = sum(
                weight * out.terms[f"loss_{name}_x{scale}"]
                for name, weight in PUBLISHED_WEIGHTS[stage].items()
                for scale in (2, 4)
            )
            torch.testing.assert_close(out.by_group[MODEL].detach(), total)

    def test_maps_of_a_network_are_a_further_loss_of_pixels(self) -> None:
        network = Slopes()
        training = self.training(perceptual=network, weights={"pixel": {"perceptual": 3.0}})
        out, plain = (losses(each, batch(10)) for each in (training, self.training()))
        apart = sum(out.terms[f"loss_perceptual_x{scale}"] for scale in (2, 4))
        assert float(apart) > 0
        torch.testing.assert_close(
            out.by_group[MODEL] - plain.by_group[MODEL], 3.0 * apart, check_dtype=False
        )
        made, images = torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
        lost = training._distances(2)["perceptual"](made, images)
        torch.testing.assert_close(lost, map_distance(network, images, made))
        assert "loss_perceptual_x2" not in losses(training, batch(5)).terms
        assert training.recipe.check() == []
        assert "gives no maps" in replace(training.recipe, perceptual=Pixels()).check()[0]

    def test_pixels_teach_through_the_decoder_which_stays_as_it_is(self) -> None:
        training = self.training()
        losses(training, batch(10)).by_group[MODEL].backward()
        assert float(training.model.heads["x2"].last.weight.grad.abs().sum()) > 0
        assert list(training.state_dict()) == []  # nothing of the autoencoder is saved

    def test_a_perfect_upscaler_loses_nothing(self) -> None:
        training = self.training()
        target = training.encode(batch().images)
        training._held = (lambda x, scale: target,)  # type: ignore[assignment]
        training._held[0].scales, training._held[0].freeze_trunk = (2,), lambda frozen: None
        out = losses(training, batch(0))
        assert float(out.by_group[MODEL]) < 1e-6

    def test_facts_tell_the_space(self) -> None:
        training, images = self.training(), batch(count=40).images
        training.measure(images)
        facts = training.facts(data="noise")
        assert facts.autoencoder == autoencoder_facts(Squares())
        assert facts.autoencoder["encoder"] == "00ff"
        small = training.encode(reduced(images, 2))
        assert facts.latent_stats is not None
        assert facts.latent_stats["mean"] == pytest.approx([float(small.mean())], abs=1e-5)
        assert facts.latent_stats["std"] == pytest.approx([float(small.std())], abs=1e-5)
        assert (facts.space, facts.scales, facts.family) == ("latent", (2, 4), None)
        assert space_of(Squares()) is None

    def test_comparisons_know_what_can_be_attained(self) -> None:
        training, images = self.training(), batch().images
        found = training.baselines(images, 2)
        assert set(found) == {"bicubic", "bicubic_decoded", "bicubic_latent", "autoencoder"}
        small = training.decode(training.encode(reduced(images, 2))).clamp(-1, 1)
        assert torch.equal(found["bicubic_decoded"], interpolated(small, 2))
        assert not torch.equal(found["bicubic_decoded"], found["bicubic"])
        torch.testing.assert_close(
            found["autoencoder"], training.decode(Squares().moments(images)).clamp(-1, 1)
        )
        assert training.enlarge(training.model, images, 4).shape == images.shape
        assert torch.equal(training.shrink(training.model, images, 4), reduced(images, 4))
        assert training.input_shape(16) == (1, 4, 4)
        assert count_upscaler_flops(training.model, (1, 4, 4))[""] > 0

    def test_latents_that_are_kept_are_those_of_the_batch(self) -> None:
        pixels = torch.randint(0, 255, (5, 1, 16, 16), dtype=torch.uint8)
        pictures = TensorImages(pixels)
        once, every = self.training(encode_once=True), self.training()
        once.keep(pictures, seed=4)
        every.keep(pictures, seed=4)
        assert isinstance(once.kept, KeptLatents)
        assert every.kept is None
        for step in (0, 2):  # the second lies in two epochs
            rows = GlobalStream(5, 4).rows(step * 4, 4)[2:]  # a process's share
            position = torch.arange(step * 4 + 2, step * 4 + 4)
            given = PictureBatch(from_uint8(pixels[rows]), position, step, 4)
            found = [losses(training, given).by_group[MODEL] for training in (once, every)]
            torch.testing.assert_close(*found)
            small = every.encode(reduced(given.images, 2))
            torch.testing.assert_close(once.kept.of(given, 2), small)
        with pytest.raises(ConfigError, match="encode_once=true keeps the latents of whole"):
            LatentUpscaling(encode_once=True, turned=True)

    def test_another_space_keeps_the_trunk(self, tmp_path: Any) -> None:
        earlier = lua()
        nn.init.ones_(earlier.trunk.conv.weight)
        save_upscaler(earlier, tmp_path, facts_of(earlier))
        training = self.training(start=str(tmp_path), adapt=True, frozen_steps=2)
        assert torch.equal(training.model.trunk.conv.weight, earlier.trunk.conv.weight)
        assert not torch.equal(training.model.trunk.stem.weight, earlier.trunk.stem.weight)
        losses(training, batch(1))
        learning = [n for n, p in training.model.named_parameters() if p.requires_grad]
        assert {name.split(".")[-2] for name in learning} == {"stem", "last"}
        losses(training, batch(2))
        assert all(p.requires_grad for p in training.model.parameters())
        recipe = LatentUpscaling(start=str(tmp_path))
        with pytest.raises(ConfigError, match="has other settings than the model"):
            recipe.build(lua((2,)), seed=0, autoencoder=Squares())

    def test_what_it_does_not_train_is_told(self) -> None:
        recipe = LatentUpscaling()
        with pytest.raises(ConfigError, match="no autoencoder was given"):
            recipe.build(lua(), seed=0)
        with pytest.raises(ConfigError, match="the model is ESPCN"):
            recipe.build(ESPCN(), seed=0, autoencoder=Squares())
        other = LUA(**TINY, channels=2, scales=[2], head_size=4)
        with pytest.raises(ConfigError, match=r"model\.channels=2, but the latents"):
            recipe.build(other, seed=0, autoencoder=Squares())


class TestPixels:
    @pytest.mark.parametrize("loss", ["l1", "l2", "charbonnier"])
    def test_the_loss_is_the_distance_of_pictures_in_0_1(self, loss: Any) -> None:
        model = ESPCN(scale=2, channels=1, hidden_size=4)
        training = SuperResolution(loss=loss, charbonnier_eps=0.01).build(model, seed=0)
        assert isinstance(training, SuperResolutionTraining)
        given = batch()
        out = losses(training, given)
        made = model(reduced(given.images, 2) / 2 + 0.5, 2)
        apart = made - (given.images / 2 + 0.5)
        expected = {
            "l1": apart.abs().mean(),
            "l2": apart.square().mean(),
            "charbonnier": (apart.square() + 0.01).sqrt().mean(),
        }[loss]
        torch.testing.assert_close(out.by_group[MODEL], expected)
        psnr = -10 * torch.log10(apart.square().mean())
        torch.testing.assert_close(out.terms["psnr"], psnr.detach())

    def test_further_losses_are_added(self) -> None:
        model = SwinIR(**TINY, channels=1, upsampler="pixelshuffledirect")
        plain = losses(SuperResolution().build(model, seed=0), batch()).by_group[MODEL]
        recipe = SuperResolution(fourier_weight=1.0, eagle_weight=1.0)
        assert losses(recipe.build(model, seed=0), batch()).by_group[MODEL] > plain

    def test_what_it_does_not_train_is_told(self) -> None:
        with pytest.raises(ConfigError, match="the model is IRN"):
            SuperResolution().build(IRN(scale=2, num_blocks=[1], growth=4), seed=0)
        with pytest.raises(ConfigError, match="has the scale 1"):
            SuperResolution().build(SwinIR(**TINY, scale=1, upsampler=""), seed=0)
        with pytest.raises(ConfigError, match=r"objective\.loss must be one of"):
            SuperResolution(loss="l3")  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="fourier_weight must be 0 or more"):
            SuperResolution(fourier_weight=-1)


class TestRescaling:
    def test_an_untrained_rescaler_averages_squares(self) -> None:
        # Haar's first band is the mean, and every block starts as the identity
        torch.manual_seed(0)
        model = IRN(scale=2, num_blocks=[1], growth=4, channels=1)
        training = Rescaling().build(model, seed=0)
        assert isinstance(training, RescalingTraining)
        given = batch()
        small = training.shrink(model, given.images, 2)
        means = nn.functional.avg_pool2d(given.images, 2)
        torch.testing.assert_close(small, means, atol=1 / 127, rtol=0)
        out = losses(training, given)
        terms = [out.terms[f"loss_{n}"] for n in ("fit", "reconstruction", "latent")]
        torch.testing.assert_close(out.by_group[MODEL].detach(), torch.stack(terms).sum())
        # what was lost is drawn by position
        assert torch.equal(losses(training, given).by_group[MODEL], out.by_group[MODEL])
        assert training.enlarge(model, given.images, 2).shape == given.images.shape

    def test_it_learns_to_keep_more_than_bicubic(self) -> None:
        torch.manual_seed(0)
        model = IRN(scale=2, num_blocks=[1], growth=4, channels=1)
        training = Rescaling().build(model, seed=0)
        along = torch.arange(8) / 8 * 6.3
        stripes = torch.sin(along * 3.5)[:, None] * torch.sin(along)[None]
        images = (stripes * 0.9).expand(2, 1, 8, 8)
        given = PictureBatch(images, torch.arange(2), 0, 2)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(25):
            optimizer.zero_grad()
            losses(training, given).by_group[MODEL].backward()
            optimizer.step()

        def psnr(made: Tensor) -> float:
            levels = [((x + 1) * 127.5).round().to(torch.uint8) for x in (images, made)]
            return float(picture_psnr(*levels).mean())

        with torch.no_grad():
            own = psnr(training.enlarge(model, images, 2))
        assert own > psnr(training.baselines(images, 2)["bicubic"]) + 1

    def test_what_it_does_not_train_is_told(self) -> None:
        with pytest.raises(ConfigError, match="the model is ESPCN"):
            Rescaling().build(ESPCN(), seed=0)
        grey = IRN(scale=2, num_blocks=[1], growth=4, channels=3, small_channels=1)
        with pytest.raises(ConfigError, match="small_channels=1 and channels=3 differ"):
            Rescaling().build(grey, seed=0)
        with pytest.raises(ConfigError, match="latent_weight must be 0 or more"):
            Rescaling(latent_weight=-1.0)
