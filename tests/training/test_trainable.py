"""What is trained with several optimizers: who learns from what, and when a step counts."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from genscale.data.base import TensorImages
from genscale.data.module import ImageDataModule
from genscale.rng import StepRandom
from genscale.training.callbacks.ema import UpdateEMA
from genscale.training.ema import ConstantEMA
from genscale.training.lr_schedule import Constant, WarmupStableDecay
from genscale.training.optim import AdamW
from genscale.training.step_module import StepModule
from genscale.training.trainable import (
    MODEL,
    GroupLosses,
    PictureBatch,
    Trainable,
    all_mean,
    all_reduce,
)
from genscale.training.trainable_module import TrainableModule

BATCH = 8


class Duel(Trainable):
    """A number that flees from a rival's number; the rival runs after it from step 2 on."""

    def __init__(self, bad: tuple[int, ...] = ()) -> None:
        super().__init__(nn.Linear(1, 1, bias=False))
        self.rival = nn.Linear(1, 1, bias=False)
        self.bad = bad
        self.ended: list[tuple[int, bool]] = []
        self.batches: list[PictureBatch] = []
        with torch.no_grad():
            self.model.weight.fill_(1.0)
            self.rival.weight.fill_(2.0)

    def groups(self) -> dict[str, nn.Module]:
        return {MODEL: self.model, "rival": self.rival}

    def losses(self, batch: PictureBatch, rng: StepRandom) -> GroupLosses:
        self.batches.append(batch)
        apart = (self.model.weight - self.rival.weight).square().sum()
        scale = float("nan") if batch.step in self.bad else batch.images.mean()
        by_group: dict[str, Tensor] = {MODEL: -apart * scale}
        if batch.step >= 2:
            by_group["rival"] = apart
        return GroupLosses(by_group, {"apart": apart.detach()})

    def end_step(self, step: int, finite: Tensor) -> None:
        self.ended.append((step, bool(finite)))

    def counts(self) -> dict[str, Tensor]:
        return {"ended": torch.tensor(float(len(self.ended)))}


def fit(duel: Trainable, steps: int, **settings: Any) -> TrainableModule:
    torch.manual_seed(0)
    pixels = torch.randint(0, 255, (32, 1, 4, 4), dtype=torch.uint8)
    module = TrainableModule(
        trainable=duel,
        optimizer=AdamW(lr=0.1, betas=(0.0, 0.0), eps=1e-12),  # steps of the gradient's sign
        lr_schedule=settings.pop("schedule", Constant()),
        ema=ConstantEMA(decay=0.5),
        batch_size=BATCH,
        **settings,
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[UpdateEMA()],
    )
    data = ImageDataModule(
        TensorImages(pixels), batch_size=BATCH, accumulate=settings.get("accumulate", 1)
    )
    trainer.fit(module, datamodule=data)
    assert data.samples_seen == module.samples_seen
    return module


def test_every_group_learns_from_its_own_loss() -> None:
    duel = Duel()
    module = fit(duel, 2)
    # the mean picture is dark: -apart * (negative) draws the model to the rival, which rests
    assert float(duel.batches[0].images.mean()) < 0
    assert float(duel.model.weight) == pytest.approx(1.2)
    assert float(duel.rival.weight) == 2.0
    module = fit(Duel(), 4)
    # from step 2 on the rival comes, too: by its own loss, not by the model's
    assert float(module.trainable.rival.weight) == pytest.approx(1.8)
    assert float(module.model.weight) == pytest.approx(1.4)


def test_a_step_is_counted_once_whatever_the_number_of_optimizers() -> None:
    duel = Duel()
    module = fit(duel, 5)
    assert module.step == 5
    assert [step for step, _ in duel.ended] == [0, 1, 2, 3, 4]
    assert float(module.counts["ended"]) == 5
    assert [batch.step for batch in duel.batches] == [0, 1, 2, 3, 4]
    assert module.terms["loss"] == -module.terms["apart"] * duel.batches[-1].images.mean()


def test_positions_are_those_of_the_step() -> None:
    duel = Duel()
    fit(duel, 3)
    for batch in duel.batches:
        first = batch.step * batch.size
        assert batch.position.tolist() == list(range(first, first + BATCH))


def test_micro_batches_add_up_to_the_batch() -> None:
    whole, split = Duel(), Duel()
    fit(whole, 3)
    module = fit(split, 3, accumulate=2)
    assert module.step == 3
    assert len(split.batches) == 6
    assert [step for step, _ in split.ended] == [0, 1, 2]
    assert torch.allclose(whole.model.weight, split.model.weight)


def test_no_group_steps_where_a_gradient_is_not_finite() -> None:
    duel = Duel(bad=(2,))
    module = fit(duel, 3)
    assert duel.ended == [(0, True), (1, True), (2, False)]
    assert not bool(torch.isfinite(module.gradient_norm))
    assert float(duel.model.weight) == pytest.approx(1.2)
    assert float(duel.rival.weight) == 2.0
    assert module.step == 3


def test_the_schedule_advances_by_optimizer_steps_for_all_groups() -> None:
    schedule = WarmupStableDecay(warmup_steps=4, decay_fraction=0.01)
    module = fit(Duel(), 3, schedule=schedule)
    # three of four steps of the warm-up are done: the next would use the peak
    rates = [o.param_groups[0]["lr"] for o in module.optimizers(use_pl_optimizer=False)]
    assert rates == pytest.approx([0.1, 0.1])
    # steps of 1/4, 2/4 and 3/4 of the peak
    assert float(module.model.weight) == pytest.approx(1 + 0.1 * (0.25 + 0.5 + 0.75))


def test_the_average_is_of_the_model_alone() -> None:
    module = fit(Duel(), 2)
    assert isinstance(module, StepModule)
    assert set(module.averages()) == {"ema"}
    # 1 -> 1.1 -> 1.2, half kept a step
    assert float(module.ema.weight) == pytest.approx(0.5 * (0.5 * 1.0 + 0.5 * 1.1) + 0.5 * 1.2)
    names = set(module.state_dict())
    assert names == {"model.weight", "ema.weight", "trainable.rival.weight"}


class Turned(Trainable):
    """A convolution of pictures whose channels lie last, and so do those of its gradient."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(8, 8, 3, padding=1, bias=False))
        with torch.no_grad():
            self.model.weight.copy_(torch.linspace(-1, 1, 576).sin().view(8, 8, 3, 3))

    def losses(self, batch: PictureBatch, rng: StepRandom) -> GroupLosses:
        factors = torch.linspace(-2, 3, 8)[:, None, None]
        wide = (batch.images * factors).contiguous(memory_format=torch.channels_last)
        return GroupLosses({MODEL: (self.model(wide) * factors.flip(0)).square().mean()})


def test_gradients_arrive_in_the_layout_of_their_parameters() -> None:
    turned = Turned()
    before = turned.model.weight.detach().clone()
    batches: list[PictureBatch] = []
    losses = turned.losses

    def watched(batch: PictureBatch, rng: StepRandom) -> GroupLosses:
        batches.append(batch)
        return losses(batch, rng)

    turned.losses = watched  # type: ignore[method-assign]
    fit(turned, 1)
    after = turned.model.weight.detach().clone()
    with torch.no_grad():
        turned.model.weight.copy_(before)
    loss = losses(batches[0], StepRandom(0, batches[0].position)).by_group[MODEL]
    (gradient,) = torch.autograd.grad(loss, turned.model.weight)
    assert gradient.stride() != turned.model.weight.stride()
    # the first step of AdamW is the gradient's sign
    assert torch.equal((before - after).sign(), gradient.sign())


def test_gradients_are_clipped_group_by_group() -> None:
    duel = Duel()
    module = fit(duel, 1, gradient_clip=1e-3)
    scale = float(duel.batches[0].images.mean())
    # the norm is that before clipping: d(-(m - r)^2 s) / dm = -2 (1 - 2) s
    assert float(module.gradient_norm) == pytest.approx(abs(2 * scale), rel=1e-6)


def test_sums_of_one_process_are_the_numbers_themselves() -> None:
    assert torch.equal(all_reduce(torch.arange(3.0)), torch.arange(3.0))
    assert torch.equal(all_mean(torch.arange(3.0)), torch.arange(3.0))
