"""Training of rescalers for any factor, and of rescalers with a second latent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from genscale import rng
from genscale.errors import ConfigError
from genscale.training.arbitrary_rescaling import ArbitraryRescaling, ArbitraryRescalingTraining
from genscale.training.rescaling import Rescaling
from genscale.training.super_resolution import SuperResolution
from genscale.training.trainable import MODEL, PictureBatch
from genscale.training.upscaling import reduced
from genscale.upscaling.iarn import IARN, resized
from genscale.upscaling.irn import IRN
from genscale.upscaling.loading import facts_of, load_upscaler, save_upscaler
from genscale.upscaling.rescaling_losses import quantise
from genscale.upscaling.wdsr import WDSR


def batch(step: int = 0, side: int = 12) -> PictureBatch:
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(2, 3, side, side, generator=generator) * 2 - 1
    return PictureBatch(images, torch.arange(2) + 2 * step, step, 2)


def losses(training: Any, given: PictureBatch) -> dict[str, Tensor]:
    out = training.losses(given, rng.for_step(7, given.position))
    torch.autograd.backward(out.by_group[MODEL])
    return out.terms


def iarn() -> IARN:
    return IARN(num_blocks=1, growth=4)


def test_every_step_draws_a_size_within_the_interval() -> None:
    recipe = ArbitraryRescaling(least_scale=1.5, largest_scale=3.0, asymmetric=0.5)
    training = recipe.build(iarn(), seed=1)
    assert isinstance(training, ArbitraryRescalingTraining)
    sizes = [training.small_size((60, 90), step) for step in range(60)]
    assert all(20 <= h <= 40 and 30 <= w <= 60 for h, w in sizes)
    assert sizes == [training.small_size((60, 90), step) for step in range(60)]  # keyed
    apart = sum(abs(60 / h - 90 / w) > 0.1 for h, w in sizes)
    assert 15 <= apart <= 40  # half of them, and few of these are alike by chance
    assert min(h for h, _ in sizes) <= 22
    assert max(h for h, _ in sizes) >= 37
    equal = ArbitraryRescaling(asymmetric=0.0).build(iarn(), seed=1)
    assert all(h == w for h, w in (equal.small_size((24, 24), step) for step in range(20)))


def test_the_loss_of_a_new_network_is_that_of_bicubic_resizing() -> None:
    recipe = ArbitraryRescaling(fit_weight=0.0)
    training = recipe.build(iarn(), seed=1)
    given = batch(step=3)
    terms = losses(training, given)
    x = given.images / 2 + 0.5
    size = training.small_size((12, 12), 3)
    small = quantise(resized(resized(resized(x, size), (12, 12)), size))
    errors = ((resized(small, (12, 12)) - x).square() + 1e-6).sqrt().flatten(1).sum(1).mean()
    torch.testing.assert_close(terms["loss_reconstruction"], errors)
    assert terms["loss_fit"] == 0
    gradient = training.model.operations[0].F.conv5.weight.grad
    assert gradient is not None
    assert gradient.abs().max() > 0


def test_pictures_go_there_and_back_through_8_bits() -> None:
    training = ArbitraryRescaling().build(iarn(), seed=1)
    images = batch().images
    made = training.enlarge(training.model, images, 3)
    small = quantise(training.model.downscale(images / 2 + 0.5, (4, 4)))
    expected = training.model.enlarge(small, (12, 12)).clamp(0, 1) * 2 - 1
    assert torch.equal(made, expected)
    assert set(training.baselines(images, 3)) == {"bicubic"}


def test_a_second_latent_is_held_near_zero() -> None:
    settings = {"scale": 2, "num_blocks": [1], "growth": 4}
    torch.manual_seed(0)
    model = IRN(extra_latent_channels=1, **settings)
    terms = losses(Rescaling(extra_weight=2.0).build(model, seed=1), batch())
    # a new network's second latent comes from the draws alone: 4 normal numbers a square, added
    assert 0.5 * 2 * 4 * 144 < terms["loss_extra"] < 2 * 2 * 4 * 144
    plain = losses(Rescaling().build(IRN(**settings), seed=1), batch())
    assert plain["loss_extra"] == 0


def test_folders_of_the_new_networks_are_read_back(tmp_path) -> None:
    networks = {
        "iarn": iarn(),
        "wdsr": WDSR(hidden_size=4, num_blocks=1),
        "dual": IRN(scale=2, num_blocks=[1], growth=4, extra_latent_channels=2),
    }
    x = torch.rand(1, 3, 4, 5)
    for name, network in networks.items():
        save_upscaler(network, tmp_path / name, facts_of(network))
        again, facts = load_upscaler(tmp_path / name)
        assert facts.scales == network.scales
        with torch.no_grad():
            assert torch.equal(again(x, 2), network(x, 2))


def test_wdsr_is_trained_as_other_upscalers_of_pictures() -> None:
    training = SuperResolution().build(WDSR(hidden_size=4, num_blocks=1), seed=1)
    assert losses(training, batch())["psnr"] > 0
    assert training.enlarge(training.model, batch().images, 2).shape == (2, 3, 12, 12)
    assert reduced(batch().images, 2).shape == (2, 3, 6, 6)


def test_what_cannot_be_is_told() -> None:
    with pytest.raises(ConfigError, match="least_scale must be at least 1"):
        ArbitraryRescaling(least_scale=0.5)
    with pytest.raises(ConfigError, match=r"objective\.asymmetric is how often"):
        ArbitraryRescaling(asymmetric=1.5)
    with pytest.raises(ConfigError, match=r"objective\.fit_weight must be 0 or more"):
        ArbitraryRescaling(fit_weight=-1.0)
    with pytest.raises(ConfigError, match=r"the model is WDSR\. Give model=iarn"):
        ArbitraryRescaling().build(WDSR(hidden_size=4, num_blocks=1), seed=0)
    with pytest.raises(ConfigError, match="the model is IARN"):
        SuperResolution().build(iarn(), seed=0)
