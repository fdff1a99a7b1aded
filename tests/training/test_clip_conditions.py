"""What a training batch of clips tells the network beside its caption: frame rate and size."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from genscale.autoencoders.identity import Identity
from genscale.backbones.fit import FIT
from genscale.data.clips import ClipDataModule
from genscale.data.sprites.dataset import MovingSprites
from genscale.objectives.flow import FlowMatching
from genscale.training.ema import ConstantEMA
from genscale.training.lr_schedule import Constant
from genscale.training.module import GenerativeModule
from genscale.training.optim import AdamW


def module_of(**reads: bool) -> GenerativeModule:
    model = FIT(
        input_size=[2, 16, 16], in_channels=3, patch_size=[1, 8, 8], group_size=[2, 1, 1],
        num_latents=4, patch_width=8, latent_width=8, context_width=8, depth=1, global_depth=1,
        patch_head_size=4, latent_head_size=4, text_size=0, num_classes=0, **reads,
    )  # fmt: skip
    return GenerativeModule(
        model=model,
        autoencoder=Identity(latent_channels=3),
        objective=FlowMatching(),
        optimizer=AdamW(),
        lr_schedule=Constant(),
        ema=ConstantEMA(),
        batch_size=8,
        condition_dropout=0.9,
    )


@pytest.fixture
def batch() -> dict[str, Any]:
    films, stills = (MovingSprites(8, num_frames=n, resolution=16) for n in (2, 0))
    data = ClipDataModule(films, images=stills, image_ratio=0.5, batch_size=8)
    return next(iter(data.train_dataloader()))


def test_the_frame_rate_travels_and_is_never_dropped(batch: dict[str, Any]) -> None:
    made = module_of(reads_frame_rate=True).prepare(batch)
    assert made.clean.shape == (8, 3, 2, 16, 16)
    assert made.cond.frame_rate is not None
    assert torch.equal(made.cond.frame_rate, batch["frame_rate"])
    assert set(made.cond.frame_rate.tolist()) == {8.0, float("inf")}
    assert made.cond.size is None


def test_a_step_trains_on_clips_and_pictures_alike(batch: dict[str, Any]) -> None:
    module = module_of(reads_frame_rate=True)
    assert torch.isfinite(module.training_step(batch, 0))


def test_the_size_is_told_to_networks_that_read_it(batch: dict[str, Any]) -> None:
    cond = module_of(reads_frame_rate=True, reads_size=True).prepare(batch).cond
    assert cond.size is not None
    assert cond.size.tolist() == [[16.0, 16.0]] * 8
