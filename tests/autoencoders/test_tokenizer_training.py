"""Losses of autoencoders: pixels, features, a rival, codes, and the divergence."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genscale.autoencoders.kl import KL
from genscale.autoencoders.kl_network import KLNetwork, TrainedKL
from genscale.autoencoders.msvq import MSVQ
from genscale.errors import ConfigError
from genscale.metrics.efficientnet import EfficientNetLite0
from genscale.metrics.features import FeatureNetwork
from genscale.metrics.pixels import Pixels
from genscale.rng import Purpose, for_step
from genscale.training.codebook import CodebookSettings
from genscale.training.kl import KLReconstruction, KLTraining, kl_from_normal
from genscale.training.reconstruction import (
    DISCRIMINATOR,
    ReconstructionLoss,
    ReconstructionRecipe,
    map_distance,
    psnr,
)
from genscale.training.tokenizer import TokenizerTraining, VQReconstruction, size_deviation
from genscale.training.trainable import MODEL, PictureBatch, TrainableRecipe


class Slopes(FeatureNetwork):
    """Differences of neighbours, as a network whose numbers can be written down."""

    name, tap, taps, resize, gives_maps = "slopes", "slopes", {"slopes": 2}, "none", True

    @property
    def sha256(self) -> str:
        return "0" * 64

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def maps(self, images: Tensor) -> list[Tensor]:
        gray = images.mean(1, keepdim=True)
        return [torch.cat([gray[..., 1:, 1:] - gray[..., :-1, 1:], gray[..., 1:, 1:]], dim=1)]


def tokenizer(**settings: object) -> MSVQ:
    torch.manual_seed(0)
    return MSVQ(
        scales=[1, 2],
        vocab_size=6,
        latent_channels=3,
        image_channels=1,
        hidden_size=4,
        channel_multipliers=(1, 1),
        num_blocks=1,
        norm_groups=2,
        attention_levels=(),
        middle_attention=False,
        **settings,  # type: ignore[arg-type]
    )


def pictures(step: int = 0, size: int = 4) -> PictureBatch:
    images = torch.rand(size, 1, 4, 4, generator=torch.Generator().manual_seed(step)) * 2 - 1
    return PictureBatch(images, torch.arange(step * size, (step + 1) * size), step, size)


def draws(batch: PictureBatch) -> object:
    return for_step(0, batch.position)


class TestReconstruction:
    @pytest.mark.parametrize(("pixel", "expected"), [("l1", 0.5), ("l2", 0.25), ("both", 0.75)])
    def test_pixels(self, pixel: str, expected: float) -> None:
        loss = ReconstructionLoss(KLReconstruction(pixel=pixel), 1)  # type: ignore[arg-type]
        images = torch.zeros(2, 1, 4, 4)
        out = loss(images, images + 0.5, 0, nn.Parameter(torch.ones(1)))
        assert float(out.by_group[MODEL]) == pytest.approx(expected)
        assert set(out.by_group) == {MODEL}
        assert loss.groups() == {}
        # 10 log10(4 / 0.25): of pixels in [-1, 1]
        assert float(out.terms["psnr"]) == pytest.approx(12.0412, abs=1e-4)
        assert float(psnr(torch.tensor(0.04))) == pytest.approx(20.0)

    def test_features(self) -> None:
        images, made = torch.rand(2, 1, 4, 4), torch.rand(2, 1, 4, 4, requires_grad=True)
        distance = map_distance(Slopes(), images, made)
        a, b = (F.normalize(Slopes().maps((x + 1) / 2)[0], dim=1) for x in (images, made))
        assert float(distance) == pytest.approx(float(2 - 2 * (a * b).sum(1).mean()), abs=1e-5)
        assert float(map_distance(Slopes(), images, images)) == 0
        distance.backward()
        assert float(made.grad.abs().max()) > 0

    def test_a_network_without_maps_is_refused(self) -> None:
        recipe = VQReconstruction(perceptual=Pixels())
        assert "gives no maps with gradients" in recipe.check()[0]
        with pytest.raises(NotImplementedError, match="gives no maps"):
            Pixels().maps(torch.zeros(1, 1, 8, 8))
        assert VQReconstruction(perceptual=Slopes()).check() == []

    def test_the_rival_begins_late_and_learns_to_tell(self) -> None:
        recipe = VQReconstruction(
            adversarial_weight=0.5,
            adversarial_start=3,
            discriminator_size=4,
            discriminator_layers=1,
        )
        loss = ReconstructionLoss(recipe, 1)
        images = torch.rand(2, 1, 4, 4)
        made = (images * 0.5).requires_grad_()
        last = nn.Parameter(torch.ones(1))
        assert set(loss(images, made, 2, last).by_group) == {MODEL}
        out = loss(images, made, 3, last)
        rival = loss.groups()[DISCRIMINATOR]
        fooled = -rival(made).mean()
        expected = F.mse_loss(made, images) + 0.5 * fooled
        assert float(out.by_group[MODEL]) == pytest.approx(float(expected), abs=1e-6)
        # its loss does not reach the model
        assert (
            torch.autograd.grad(
                out.by_group[DISCRIMINATOR], made, allow_unused=True, retain_graph=True
            )[0]
            is None
        )
        real, fake = rival(images), rival(made)
        expected = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        assert float(out.by_group[DISCRIMINATOR]) == pytest.approx(float(expected), abs=1e-6)

    def test_the_balance_makes_both_gradients_alike(self) -> None:
        recipe = VQReconstruction(
            adversarial_weight=1.0,
            adversarial_adaptive=True,
            discriminator_size=4,
            discriminator_layers=1,
        )
        loss = ReconstructionLoss(recipe, 1)
        images, last = torch.rand(2, 1, 4, 4), nn.Parameter(torch.tensor([0.3]))
        out = loss(images, images * last, 0, last)
        balance = float(out.terms["adversarial_balance"])
        made = images * last
        pixel = torch.autograd.grad(F.mse_loss(made, images), last)[0].norm()
        rival = loss.groups()[DISCRIMINATOR]
        fooled = torch.autograd.grad(-rival(images * last).mean(), last)[0].norm()
        assert balance == pytest.approx(float(pixel / (fooled + 1e-4)), rel=1e-4)

    @pytest.mark.parametrize(
        "settings",
        [
            {"pixel": "l0"},
            {"perceptual_weight": -1},
            {"adversarial_weight": -1},
            {"adversarial_start": -1},
            {"discriminator_size": 0},
            {"vq_weight": -1.0},
            {"warmup_steps": -1},
            {"size_weight": -0.1},
            {"entropy_weight": -1.0},
            {"entropy_temperature": 0.0},
        ],
    )
    def test_settings_out_of_range(self, settings: dict[str, object]) -> None:
        with pytest.raises(ConfigError, match=r"objective\.\w+"):
            VQReconstruction(**settings)  # type: ignore[arg-type]


@pytest.mark.skipif(bool(EfficientNetLite0().check()), reason="needs the metrics extra")
def test_lite0_gives_maps_with_gradients() -> None:
    network = EfficientNetLite0(input_size=32)
    images = torch.rand(1, 1, 16, 16, requires_grad=True)
    maps = network.maps(images)
    # before each halving, and the last: the resolutions of the network
    assert [m.shape[2] for m in maps] == [16, 8, 4, 2, 1]
    sum(m.mean() for m in maps).backward()
    assert float(images.grad.abs().max()) > 0
    # of 8-bit pictures, they are what the features are pooled from
    pixels = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        last = network.maps(pixels / 255)[-1]
        net = network.network
        pooled = net._swish(net._bn1(net._conv_head(last))).mean(dim=(2, 3))
    assert torch.allclose(pooled, network(pixels)["pool"], atol=1e-5)


class TestTokenizer:
    def test_before_the_codes_start_nothing_is_quantised(self) -> None:
        model = tokenizer()
        training = VQReconstruction(warmup_steps=2, size_weight=0.0).build(model, seed=0)
        assert isinstance(training, TokenizerTraining)
        batch = pictures(0)
        out = training.losses(batch, draws(batch))  # type: ignore[arg-type]
        with torch.no_grad():
            made = model.decode(model.encode_features(batch.images))
        assert float(out.by_group[MODEL]) == pytest.approx(float(F.mse_loss(made, batch.images)))
        assert "loss_vq" not in out.terms

    def test_codes_start_after_the_last_step_without_them(self) -> None:
        training = VQReconstruction(warmup_steps=2).build(tokenizer(), seed=0)
        codes = [training.keeper.codes.clone()]
        for step in range(3):
            batch = pictures(step)
            training.losses(batch, draws(batch))  # type: ignore[arg-type]
            training.end_step(step, torch.tensor(True))
            codes.append(training.keeper.codes.clone())
        assert torch.equal(codes[0], codes[1])
        assert not torch.equal(codes[1], codes[2])  # k-means
        assert int(training.keeper.updates) == 1  # the quantiser has worked once
        counts = training.counts()
        assert set(counts) == {"usage/1x1", "usage/2x2"}

    def test_then_the_quantisers_losses_count(self) -> None:
        model = tokenizer()
        recipe = VQReconstruction(warmup_steps=0, vq_weight=0.3, size_weight=0.0)
        training = recipe.build(model, seed=0)
        batch = pictures(0)
        out = training.losses(batch, draws(batch))  # type: ignore[arg-type]
        made, quantized = model(batch.images)
        expected = F.mse_loss(made, batch.images) + 0.3 * quantized.losses.mean()
        assert float(out.by_group[MODEL]) == pytest.approx(float(expected), abs=1e-6)
        assert training.groups()[MODEL] is model

    @pytest.mark.parametrize("warmup_steps", [0, 1])
    def test_latents_are_drawn_to_a_size_of_one(self, warmup_steps: int) -> None:
        model, batch = tokenizer(), pictures(0)
        losses = []
        for weight in (0.0, 0.5):
            recipe = VQReconstruction(warmup_steps=warmup_steps, size_weight=weight)
            out = recipe.build(model, seed=0).losses(batch, draws(batch))  # type: ignore[arg-type]
            losses.append(float(out.by_group[MODEL]))
        size = model.encode_features(batch.images).square().mean().sqrt()
        assert float(out.terms["latent_size"]) == pytest.approx(float(size))
        away = float(size.log().square())
        assert losses[1] - losses[0] == pytest.approx(0.5 * away, rel=1e-4)
        assert away > 0.1

    @pytest.mark.parametrize("learned_by", ["average", "gradient"])
    def test_who_moves_the_codes(self, learned_by: str) -> None:
        model = tokenizer()
        codebook = CodebookSettings(learned_by=learned_by)
        training = VQReconstruction(warmup_steps=0, codebook=codebook).build(model, seed=0)
        batch = pictures(0)
        training.losses(batch, draws(batch)).by_group[MODEL].backward()  # type: ignore[arg-type]
        gradient = model.quantizer.embedding.weight.grad
        assert (gradient is None) == (learned_by == "average")
        assert model.encoder.conv_in.weight.grad is not None

    def test_entropy_is_missing_where_one_code_is_chosen(self) -> None:
        model = tokenizer(phi_weight=0.0)
        recipe = VQReconstruction(warmup_steps=0, entropy_weight=1.0, entropy_temperature=1e-3)
        training = recipe.build(model, seed=0)
        batch = pictures(0)
        with torch.no_grad():
            model.quantizer.embedding.weight.fill_(1e2)
            model.quantizer.embedding.weight[0] = 0.0
        features = model.encode_features(batch.images)
        missing = training._missing_entropy(features, model.quantize(features))
        assert float(missing) == pytest.approx(math.log(6), abs=1e-4)
        with torch.no_grad():  # all codes alike: the softest choice there is
            model.quantizer.embedding.weight.fill_(0.5)
        missing = training._missing_entropy(features, model.quantize(features))
        assert float(missing) == pytest.approx(0, abs=1e-5)
        model.quantizer.reset_parameters()
        with torch.no_grad():
            model.quantizer.embedding.weight.normal_()
        out = training.losses(batch, draws(batch))  # type: ignore[arg-type]
        assert float(out.terms["missing_entropy"]) > 0
        training._missing_entropy(features, model.quantize(features)).backward()
        assert float(model.encoder.conv_in.weight.grad.abs().max()) > 0

    def test_the_size_of_latents_has_the_gradient_of_its_squared_logarithm(self) -> None:
        latents = (3 * torch.randn(2, 3, 4, 4)).requires_grad_()
        deviation, size = size_deviation(latents)
        expected = latents.square().mean().sqrt().log().square()
        assert float(size) == pytest.approx(float(latents.detach().square().mean().sqrt()))
        assert float(deviation) == pytest.approx(float(expected), rel=1e-5)
        (ours,) = torch.autograd.grad(deviation, latents)
        (theirs,) = torch.autograd.grad(expected, latents)
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-7)

    def test_another_network_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="Give model=msvq"):
            VQReconstruction().build(nn.Linear(1, 1), seed=0)
        assert issubclass(VQReconstruction, ReconstructionRecipe)
        assert issubclass(ReconstructionRecipe, TrainableRecipe)


def small_kl() -> KLNetwork:
    torch.manual_seed(0)
    return KLNetwork(
        sample_size=8,
        image_channels=1,
        latent_channels=2,
        hidden_size=4,
        channel_multipliers=(1, 2),
        num_blocks=1,
        norm_groups=2,
        middle_attention=False,
    )


class TestKL:
    def test_divergence_of_known_normals(self) -> None:
        mean, log_variance = torch.full((3, 2, 1, 1), 2.0), torch.full((3, 2, 1, 1), math.log(4))
        # 0.5 (4 + 4 - 1 - log 4) for each of two numbers
        assert float(kl_from_normal(mean, log_variance)) == pytest.approx(7 - math.log(4))
        assert float(kl_from_normal(torch.zeros(1, 2), torch.zeros(1, 2))) == 0

    def test_losses(self) -> None:
        model = small_kl()
        training = KLReconstruction(kl_weight=0.1).build(model, seed=0)
        assert isinstance(training, KLTraining)
        batch = PictureBatch(torch.rand(2, 1, 8, 8), torch.arange(2), 0, 2)
        random = for_step(5, batch.position)
        out = training.losses(batch, random)
        mean, log_variance = model.moments(batch.images).chunk(2, dim=1)
        noise = random.normal(Purpose.POSTERIOR, (2, 4, 4))
        made = model.decode(mean + (0.5 * log_variance).exp() * noise)
        divergence = kl_from_normal(mean, log_variance) / 64
        expected = F.mse_loss(made, batch.images) + 0.1 * divergence
        assert float(out.by_group[MODEL]) == pytest.approx(float(expected), abs=1e-6)

    def test_its_folder_is_one_of_diffusers(self, tmp_path: Path) -> None:
        model = small_kl().eval()
        images = torch.rand(40, 1, 8, 8) * 2 - 1
        before = model.decode(model.encode(images))
        KLTraining(model, KLReconstruction()).finish(model, images)
        latents = model.encode(images).double()
        assert float(latents.mean()) == pytest.approx(0, abs=1e-5)
        assert float(latents.std()) == pytest.approx(1, abs=1e-5)
        assert torch.allclose(model.decode(model.encode(images)), before, atol=1e-5)
        model.save_pretrained(tmp_path)
        plain = KL(
            source=str(tmp_path),
            latent_channels=2,
            downsample=2,
            scale=model.scale,
            shift=model.shift,
            image_channels=1,
        )
        trained = TrainedKL(run=str(tmp_path), latent_channels=2, downsample=2, image_channels=1)
        for other in (plain, trained):
            assert other.check(encodes=True, decodes=True) == []
            assert torch.allclose(other.encode(images), model.encode(images), atol=1e-6)
        assert trained.scale == pytest.approx(model.scale)
        assert model.encoder_digest() is None

    def test_what_does_not_fit_is_refused(self, tmp_path: Path) -> None:
        small_kl().save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match=r"takes pictures of 1 channel\(s\)"):
            TrainedKL(run=str(tmp_path), latent_channels=2, downsample=2, image_channels=3)
        other = TrainedKL(run=str(tmp_path), latent_channels=4, downsample=2)
        assert "autoencoder.latent_channels=4" in other.check(encodes=True, decodes=False)[0]
        with pytest.raises(ConfigError, match="sides that are multiples of 2"):
            small_kl().moments(torch.zeros(1, 1, 7, 7))
        with pytest.raises(ConfigError, match="must divide every width"):
            KLNetwork(hidden_size=6, norm_groups=4)
        with pytest.raises(ConfigError, match="Give model=kl_small"):
            KLReconstruction().build(nn.Linear(1, 1), seed=0)
        with pytest.raises(ConfigError, match=r"objective\.kl_weight"):
            KLReconstruction(kl_weight=-1.0)
