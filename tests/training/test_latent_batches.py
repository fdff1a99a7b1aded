"""From moments to latents in a training step: one draw a sample, cached or encoded on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from genscale.autoencoders.base import Autoencoder
from genscale.autoencoders.identity import Identity
from genscale.autoencoders.kl import KL
from genscale.backbones.dit import DiT
from genscale.io.images import from_uint8
from genscale.objectives.flow import FlowMatching
from genscale.rng import Purpose, integers, key, normal
from genscale.training.ema import ConstantEMA
from genscale.training.lr_schedule import Constant
from genscale.training.module import GenerativeModule
from genscale.training.optim import AdamW

SEED = 3
POSITION = torch.tensor([40, 7, 1000])
PIXELS = integers(key(0, torch.arange(3 * 3 * 256)), 256).view(3, 3, 16, 16).to(torch.uint8)


def module_of(autoencoder: Autoencoder, *, input_size: int = 8) -> GenerativeModule:
    channels = autoencoder.latent_channels
    model = DiT(input_size=input_size, in_channels=channels, hidden_size=8, depth=1, num_heads=2)
    return GenerativeModule(
        model=model,
        autoencoder=autoencoder,
        objective=FlowMatching(),
        optimizer=AdamW(),
        lr_schedule=Constant(),
        ema=ConstantEMA(),
        batch_size=3,
        seed=SEED,
    )


@pytest.fixture
def kl(tiny_vae: Path) -> KL:
    return KL(source=str(tiny_vae), downsample=2)


@pytest.fixture
def moments(kl: KL) -> Tensor:
    with torch.no_grad():
        return kl.moments(from_uint8(PIXELS))


def test_latents_are_drawn_with_noise_of_seed_and_position(kl: KL, moments: Tensor) -> None:
    batch = module_of(kl).prepare({"moments": moments, "position": POSITION})
    noise = normal(key(SEED, POSITION, Purpose.POSTERIOR), (4, 8, 8))
    mean, log_variance = moments.chunk(2, dim=1)
    expected = 0.18215 * (mean + torch.exp(0.5 * log_variance) * noise)
    torch.testing.assert_close(batch.clean, expected)
    assert torch.equal(batch.position, POSITION)


def test_the_draw_is_not_the_noise_of_the_objective() -> None:
    drawn, added = (normal(key(SEED, 40, p), (64,)) for p in (Purpose.POSTERIOR, Purpose.NOISE))
    assert abs(float((drawn * added).mean())) < 0.5
    assert not torch.equal(drawn, added)


def test_cached_moments_train_as_pictures_encoded_on_the_way(kl: KL, moments: Tensor) -> None:
    module = module_of(kl)
    online = module.prepare({"image": PIXELS, "position": POSITION})
    cached = module.prepare({"moments": moments, "position": POSITION})
    assert torch.equal(online.clean, cached.clean)
    half = module.prepare({"moments": moments.half(), "position": POSITION}).clean
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, cached.clean, rtol=2e-3, atol=1e-3)


def test_a_sample_is_drawn_alike_in_any_batch(kl: KL, moments: Tensor) -> None:
    module = module_of(kl)
    whole = module.prepare({"moments": moments, "position": POSITION}).clean
    for row in range(3):
        alone = {"moments": moments[[row]], "position": POSITION[[row]]}
        assert torch.equal(module.prepare(alone).clean, whole[[row]])


def test_cached_moments_need_no_weights(kl: KL, moments: Tensor) -> None:
    bare = module_of(KL(downsample=2))
    raw = {"moments": moments, "position": POSITION}
    assert torch.equal(bare.prepare(raw).clean, module_of(kl).prepare(raw).clean)


def test_weights_of_the_autoencoder_are_no_weights_of_the_run(kl: KL) -> None:
    module = module_of(kl)
    module.prepare({"image": PIXELS, "position": POSITION})
    assert any(True for _ in kl.parameters())
    names = set(module.state_dict())
    assert all(name.startswith(("model.", "ema.")) for name in names)


def test_pixels_stay_as_they_are() -> None:
    module = module_of(Identity(latent_channels=3), input_size=16)
    batch = module.prepare({"image": PIXELS, "position": POSITION})
    assert torch.equal(batch.clean, from_uint8(PIXELS))
