"""The data module: batches, keyed flips, and a state that only training moves."""

from __future__ import annotations

import pickle
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from genscale.data import module as data_module
from genscale.data.base import TensorImages
from genscale.data.module import ImageDataModule
from genscale.errors import CheckpointError, ConfigError, DataError, ParallelError
from genscale.rng import Purpose, key, uniform


def small_set(count: int = 20, *, labelled: bool = True, salt: int = 0) -> TensorImages:
    """Pictures of 3 x 3 whose every pixel is ``row * 10 + column`` plus its row number."""
    grid = torch.arange(3)[:, None] * 10 + torch.arange(3)
    pixels = (grid + torch.arange(count).view(-1, 1, 1, 1) + salt).to(torch.uint8)
    labels = torch.arange(count) % 4 if labelled else None
    return TensorImages(pixels, labels, class_names=tuple("abcd") if labelled else (), name="set")


def attach(module: ImageDataModule, **state: Any) -> ImageDataModule:
    """Attach what the module reads of a trainer."""
    settings = {"global_rank": 0, "world_size": 1, "accumulate_grad_batches": 1, **state}
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    module.trainer = SimpleNamespace(strategy=strategy, **settings)  # type: ignore[assignment]
    return module


def read(module: ImageDataModule, count: int) -> list[dict[str, Tensor]]:
    return list(islice(module.train_dataloader(), count))


def same(first: list[dict[str, Tensor]], second: list[dict[str, Tensor]]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a[name], b[name])
        for a, b in zip(first, second, strict=True)
        for name in ("image", "label", "position")
    )


def test_a_batch_holds_pictures_labels_and_positions() -> None:
    module = ImageDataModule(small_set(), batch_size=6, seed=1)
    first, second = read(module, 2)
    assert first["image"].shape == (6, 1, 3, 3)
    assert {name: value.dtype for name, value in first.items()} == {
        "image": torch.uint8,
        "label": torch.int64,
        "position": torch.int64,
    }
    assert second["position"].tolist() == [6, 7, 8, 9, 10, 11]
    rows = first["image"][:, 0, 0, 0].long()  # the upper left pixel is the row number
    assert torch.equal(first["label"], rows % 4)


def test_without_labels_every_sample_has_the_null_class() -> None:
    module = ImageDataModule(small_set(labelled=False), batch_size=5)
    assert read(module, 1)[0]["label"].tolist() == [-1] * 5
    assert module.num_classes == 0


def test_flips_are_keyed_by_seed_and_position() -> None:
    plain = read(ImageDataModule(small_set(), batch_size=10, seed=3), 4)
    mirrored = read(ImageDataModule(small_set(), batch_size=10, seed=3, flip=True), 4)
    flipped = torch.zeros(40, dtype=torch.bool)
    for before, after in zip(plain, mirrored, strict=True):
        for position, a, b in zip(before["position"], before["image"], after["image"], strict=True):
            assert torch.equal(a, b) or torch.equal(a.flip(-1), b)
            flipped[position] = not torch.equal(a, b)
    assert torch.equal(flipped, uniform(key(3, torch.arange(40), Purpose.FLIP)) < 0.5)
    assert 0 < int(flipped.sum()) < 40


@pytest.mark.parametrize(("world_size", "accumulate"), [(2, 1), (1, 2), (2, 3)])
def test_the_union_over_processes_and_micro_batches_is_the_global_batch(
    world_size: int, accumulate: int
) -> None:
    whole = read(ImageDataModule(small_set(), batch_size=12, seed=2, flip=True), 3)
    parts = []
    for rank in range(world_size):
        module = ImageDataModule(small_set(), batch_size=12, seed=2, flip=True)
        attach(module, global_rank=rank, world_size=world_size, accumulate_grad_batches=accumulate)
        parts.append(read(module, 3 * accumulate))
    for step, batch in enumerate(whole):
        for name in batch:
            micro = [part[step * accumulate + m][name] for part in parts for m in range(accumulate)]
            assert torch.equal(torch.cat(micro), batch[name])


def test_a_loop_that_accumulates_by_itself_says_so() -> None:
    module = attach(ImageDataModule(small_set(), batch_size=12, accumulate=3))
    assert len(read(module, 1)[0]["label"]) == 4
    attach(module, accumulate_grad_batches=2)
    with pytest.raises(ParallelError, match=r"accumulates 2 micro-batches .* accumulate=3"):
        module.train_dataloader()


def test_a_batch_that_does_not_divide_over_processes_is_refused() -> None:
    module = attach(ImageDataModule(small_set(), batch_size=9), world_size=2)
    with pytest.raises(ParallelError, match=r"batch_size=9 .* multiple of 2, e.g. 8 or 10"):
        module.train_dataloader()


def test_reading_ahead_does_not_move_the_state() -> None:
    module = ImageDataModule(small_set(), batch_size=4)
    read(module, 5)
    assert module.state_dict()["samples_seen"] == 0


def test_a_restored_module_continues_the_stream() -> None:
    whole = read(ImageDataModule(small_set(), batch_size=6, seed=4, flip=True), 7)
    stopped = ImageDataModule(small_set(), batch_size=6, seed=4, flip=True)
    stopped.samples_seen = 3 * 6
    resumed = ImageDataModule(small_set(), batch_size=6, seed=4, flip=True)
    resumed.load_state_dict(stopped.state_dict())
    assert same(read(resumed, 4), whole[3:])


def test_other_pictures_than_those_of_the_checkpoint_are_refused() -> None:
    state = ImageDataModule(small_set(), batch_size=6).state_dict()
    with pytest.raises(DataError, match=r"trained on data with fingerprint [0-9a-f]{12}, but"):
        ImageDataModule(small_set(salt=1), batch_size=6).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"no 'samples_seen' \(found: epoch\)"):
        ImageDataModule(small_set(), batch_size=6).load_state_dict({"epoch": 1})


def test_two_workers_read_what_none_reads() -> None:
    plain = ImageDataModule(small_set(), batch_size=6, flip=True)
    ahead = ImageDataModule(small_set(), batch_size=6, flip=True, num_workers=2)
    assert same(read(plain, 6), read(ahead, 6))


def test_what_workers_receive_can_be_pickled() -> None:
    samples = ImageDataModule(small_set(), batch_size=6, flip=True).train_dataloader().dataset
    copied = pickle.loads(pickle.dumps(samples))
    assert torch.equal(copied[(7, 3)]["image"], samples[(7, 3)]["image"])


def test_loading_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    read(ImageDataModule(small_set(), batch_size=6, flip=True), 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_the_train_set_is_can_be_asked_of_the_module() -> None:
    train = small_set()
    module = ImageDataModule(train, small_set(8), batch_size=2)
    assert (module.channels, module.resolution, module.num_classes) == (1, 3, 4)
    assert module.class_names == ("a", "b", "c", "d")
    assert module.fingerprint() == train.fingerprint()
    assert module.name == "set"
    assert ImageDataModule(train, batch_size=2, name="mine").name == "mine"


def test_sets_that_do_not_belong_together_are_refused() -> None:
    pixels = torch.zeros(4, 1, 3, 3, dtype=torch.uint8)
    renamed = TensorImages(pixels, torch.zeros(4), class_names=tuple("abxd"))
    with pytest.raises(DataError, match=r"where one has 'c', the other has 'x'"):
        ImageDataModule(small_set(), renamed, batch_size=2)
    with pytest.raises(DataError, match=r"differ in channels: 1 and 3"):
        ImageDataModule(small_set(), TensorImages(pixels.expand(-1, 3, -1, -1)), batch_size=2)


def test_sizes_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"batch_size=0 is below 1"):
        ImageDataModule(small_set(), batch_size=0)
    with pytest.raises(ConfigError, match=r"data.num_workers=-1 is negative"):
        ImageDataModule(small_set(), batch_size=1, num_workers=-1)


def test_processes_that_see_different_data_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(found: list[Any], mine: tuple[int, str]) -> None:
        found[:] = [mine, (mine[0] - 1, "0" * 64)]

    monkeypatch.setattr(data_module.torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(data_module.torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(data_module.torch.distributed, "all_gather_object", gather)
    module = attach(ImageDataModule(small_set(), batch_size=4), world_size=2)
    with pytest.raises(ParallelError, match=r"rank 0: 20 pictures, .* rank 1: 19 pictures, 000000"):
        module.train_dataloader()


class Recorder(LightningModule):
    """Trains one number and writes down the positions it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[int] = []

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        self.seen += batch["position"].tolist()
        return self.weight * batch["image"].float().mean()

    def on_train_batch_end(self, *_: Any) -> None:
        # every micro-batch counts for itself here: one process
        self.trainer.datamodule.samples_seen = self.seen[-1] + 1  # type: ignore[attr-defined]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_lightning_resumes_at_the_sample_after_the_last_one_trained_on(
    tmp_path: Path, num_workers: int
) -> None:
    def fit(steps: int, checkpoint: Path | None) -> tuple[Recorder, Trainer]:
        trainer = Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            accumulate_grad_batches=2,
        )
        recorder = Recorder()
        data = ImageDataModule(small_set(), batch_size=8, num_workers=num_workers)
        trainer.fit(recorder, datamodule=data, ckpt_path=checkpoint)
        return recorder, trainer

    first, trainer = fit(3, None)
    assert first.seen == list(range(24))  # 3 steps of 8, in micro-batches of 4
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    second, _ = fit(5, tmp_path / "stopped.ckpt")
    assert second.seen == list(range(24, 40))


class TestCaptions:
    def module(self, **settings: Any) -> ImageDataModule:
        images = small_set()
        captions = [f"picture {row}" for row in range(len(images))]
        captioned = TensorImages(images.images(range(20)), captions=captions, name="set")
        return attach(ImageDataModule(captioned, batch_size=6, seed=5, **settings))

    def test_batches_carry_them_when_a_model_asks(self) -> None:
        module = self.module()
        assert "caption" not in read(module, 1)[0]
        module.with_captions = True
        for batch in read(module, 4):
            rows = batch["image"][:, 0, 0, 0].tolist()  # the first pixel is the row's number
            assert batch["caption"] == [f"picture {row}" for row in rows]

    def test_they_change_neither_order_nor_pictures(self) -> None:
        without, with_them = self.module(flip=True), self.module(flip=True)
        with_them.with_captions = True
        assert same(read(without, 4), read(with_them, 4))

    def test_a_set_without_any_carries_none(self) -> None:
        module = attach(ImageDataModule(small_set(), batch_size=6))
        module.with_captions = True
        assert "caption" not in read(module, 1)[0]

    def test_a_resumed_module_goes_on_with_the_next_ones(self) -> None:
        module = self.module()
        module.with_captions = True
        whole = read(module, 4)
        module.samples_seen = 12
        assert [b["caption"] for b in read(module, 2)] == [b["caption"] for b in whole[2:]]
