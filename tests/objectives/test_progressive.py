"""Scales that join during training: when, with what weight, and what the loss makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from genscale.backbones.var import VAR
from genscale.conditioning.base import Conditioning
from genscale.errors import ConfigError
from genscale.objectives.base import Batch
from genscale.objectives.next_scale import NextScale
from genscale.objectives.progressive import ProgressiveScales
from genscale.rng import for_step

# four scales join after the second, between 0.1 and 0.9 of 1000 samples: places at 200 samples each
LAW = ProgressiveScales(total_samples=1000, until=0.9, first_scale=1, start=0.1, newest_warmup=0.05)


def test_scales_join_evenly_at_the_nearest_place() -> None:
    counts = [LAW.stage(seen, 6)[0] for seen in range(0, 1001, 100)]
    #   samples:     0  100  200  300  400  500  600  700  800  900  1000
    assert counts == [2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 6]


def test_a_new_scale_counts_little_at_first() -> None:
    # the second to join does so at 100 + 1.5 * 200 samples, and counts in full 50 samples later
    assert LAW.stage(399, 6) == (3, 1.0)
    weights = [LAW.stage(seen, 6) for seen in (400, 410, 425, 450, 500)]
    assert [count for count, _ in weights] == [4] * 5
    assert [weight for _, weight in weights] == pytest.approx([0.01, 0.2, 0.5, 1.0, 1.0])
    # the first scales start in full: the learning rate warms up then
    assert LAW.stage(0, 6) == (2, 1.0)


def test_small_models_train_all_scales_at_once() -> None:
    assert LAW.stage(0, 2) == (2, 1.0)
    assert LAW.stage(0, 1) == (1, 1.0)
    at_once = ProgressiveScales(total_samples=10, until=0.5, newest_warmup=0.0)
    assert at_once.stage(4, 6) == (6, 1.0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"start": 0.9}, "needs 0 <= start < until <= 1, but start=0.9 and until=0.9"),
        ({"until": 1.5}, "until=1.5 were given"),
        ({"total_samples": 0}, "total_samples of at least 1"),
        ({"first_scale": -1}, "first_scale and newest_warmup not negative"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], sentence: str) -> None:
    settings = {"total_samples": 1000, "until": 0.9, "start": 0.1, **changes}
    with pytest.raises(ConfigError, match=sentence):
        ProgressiveScales(**settings)


def batch(seen: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(
        clean=torch.randint(0, 7, (3, 14), generator=generator),
        cond=Conditioning(labels=torch.tensor([0, 1, -1])),
        position=torch.arange(3),
        features=torch.randn(3, 14, 2, generator=generator),
        samples_seen=seen,
    )


def test_the_loss_of_a_stage_is_that_of_its_scales_over_all_tokens() -> None:
    torch.manual_seed(0)
    model = VAR(
        scales=[1, 2, 3], latent_channels=2, vocab_size=7, num_classes=2,
        hidden_size=16, depth=1, num_heads=2,
    )  # fmt: skip
    law = ProgressiveScales(
        total_samples=1000, until=1.0, first_scale=0, start=0.0, newest_warmup=0.1
    )
    inputs = batch(300)  # the second scale joined at 250, and counts half by now
    out = NextScale(progressive=law).loss(model, inputs, for_step(0, inputs.position))
    assert inputs.features is not None
    logits = model(inputs.features, inputs.cond).logits[:, :5]
    errors = F.cross_entropy(logits.mT, inputs.clean[:, :5], reduction="none")
    weights = torch.tensor([1.0, *[0.5] * 4]) / 14
    torch.testing.assert_close(out.per_sample, (errors * weights).sum(1).detach())
    torch.testing.assert_close(out.loss, (errors * weights).sum(1).mean())
    assert "loss_scale_1" in out.terms
    assert "loss_scale_2" not in out.terms
    # what is logged is the plain mean
    torch.testing.assert_close(out.terms["loss_scale_1"], errors[:, 1:].mean().detach())


def test_all_weights_have_gradients_from_the_first_stage_on() -> None:
    """Data-parallel training waits for the gradient of every weight."""
    torch.manual_seed(0)
    model = VAR(
        scales=[1, 2, 3], latent_channels=2, vocab_size=7, num_classes=2,
        hidden_size=16, depth=1, num_heads=2,
    )  # fmt: skip
    law = ProgressiveScales(total_samples=1000, until=1.0, first_scale=0)
    inputs = batch(0)
    objective = NextScale(progressive=law)
    torch.autograd.backward(objective.loss(model, inputs, for_step(0, inputs.position)).loss)
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not model.get_parameter("embed.word.weight").grad.any()  # type: ignore[union-attr]
