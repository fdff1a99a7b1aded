"""Clips as data: the set in memory, and the module that mixes still pictures in."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from genscale.data.base import TensorImages
from genscale.data.clips import STILL, ClipDataModule, ClipDataset, SomeClips, TensorClips
from genscale.data.module import ImageDataModule, mirrored
from genscale.errors import ConfigError, DataError

T, SIDE = 3, 4


def pixels(count: int, first: int = 0) -> Tensor:
    """Clips whose pixels tell their row; the left column tells the side."""
    rows = torch.arange(first, first + count, dtype=torch.uint8)
    clips = rows.view(-1, 1, 1, 1, 1).expand(count, 3, T, SIDE, SIDE).clone()
    clips[..., 0] = 255
    return clips


class Sided(TensorClips):
    """Clips that training reads backwards, and whose captions name a side."""

    def clips(self, indices: Any, keys: Tensor) -> tuple[Tensor, Tensor]:
        assert keys.shape == (len(indices),)
        return self.images(indices).flip(2), self.frame_rate(indices)

    def mirrored_caption(self, caption: str) -> str:
        return caption.replace("left", "right")


def clips(count: int = 20) -> Sided:
    data = pixels(count)
    data[:, :, -1, :, 1:] += 100  # the last frame is another
    rates = torch.arange(1.0, count + 1)
    return Sided(data, rates, captions=[f"{i} left" for i in range(count)], name="rows")


def pictures(count: int = 10) -> TensorImages:
    return TensorImages(
        pixels(count, first=200)[:, :, 0], captions=[f"{i} a picture, left" for i in range(count)]
    )


def batches(module: ClipDataModule, count: int) -> list[dict[str, Any]]:
    module.with_captions = True
    loader = iter(module.train_dataloader())
    return [next(loader) for _ in range(count)]


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        name: torch.cat([part[name] for part in parts])
        if isinstance(parts[0][name], Tensor)
        else [each for part in parts for each in part[name]]
        for name in parts[0]
    }


class TestSets:
    def test_the_contract(self) -> None:
        data = clips()
        assert (len(data), data.num_frames, data.resolution, data.channels) == (20, T, SIDE, 3)
        assert data.images([3, 3]).shape == (2, 3, T, SIDE, SIDE)
        assert data.frame_rate([3, 0]).tolist() == [4.0, 1.0]
        assert data.usual_frame_rate == 1.0
        assert "20 clips, 3x3x4x4" in repr(data)
        assert TensorImages(pixels(2)[:, :, 0]).num_frames == 0
        with pytest.raises(IndexError, match="Row 20"):
            data.frame_rate([20])

    def test_some_rows_are_a_set_of_clips_too(self) -> None:
        part = clips().some(torch.tensor([7, 2, 9])).some(torch.tensor([2, 0]))
        assert isinstance(part, SomeClips)
        assert isinstance(part, ClipDataset)
        assert (part.num_frames, part.captions) == (T, ["9 left", "7 left"])
        assert part.frame_rate([0, 1]).tolist() == [10.0, 8.0]
        assert torch.equal(part.images([1])[0], clips().image(7))
        backwards, rates = part.clips([0], torch.zeros(1, dtype=torch.int64))
        assert torch.equal(backwards[0], clips().image(9).flip(1))
        assert rates.tolist() == [10.0]
        assert part.mirrored_caption("left") == "right"

    def test_a_set_without_a_choice_gives_its_fixed_clips(self) -> None:
        data = TensorClips(pixels(2), 8.0)
        taken, rates = data.clips([1], torch.zeros(1, dtype=torch.int64))
        assert torch.equal(taken, data.images([1]))
        assert rates.tolist() == [8.0]
        assert data.mirrored_caption("left") == "left"

    def test_the_fingerprint_tells_later_frames_and_frame_rates(self) -> None:
        other = pixels(2)
        other[1, 0, -1, 0, 0] = 7
        prints = {
            TensorClips(data, rate).fingerprint()
            for data, rate in ((pixels(2), 8.0), (pixels(2), 9.0), (other, 8.0))
        }
        assert len(prints) == 3

    @pytest.mark.parametrize(
        ("data", "rate", "sentence"),
        [
            (pixels(2)[:, :, 0], 8.0, r"shape \(n, C, T, H, H\)"),
            (pixels(2).float(), 8.0, r"torch.float32"),
            (pixels(2), 0.0, r"one number above 0"),
            (pixels(2), torch.ones(3), r"one for each of 2 clips"),
        ],
    )
    def test_what_is_no_clip_is_refused(self, data: Tensor, rate: Any, sentence: str) -> None:
        with pytest.raises(DataError, match=sentence):
            TensorClips(data, rate)


class TestModule:
    def test_a_batch_of_clips(self) -> None:
        module = ClipDataModule(clips(), batch_size=6)
        (batch,) = batches(module, 1)
        assert batch["image"].shape == (6, 3, T, SIDE, SIDE)
        assert batch["frame_rate"].dtype == torch.float32
        assert batch["position"].tolist() == list(range(6))
        assert batch["label"].tolist() == [-1] * 6
        assert (module.num_frames, module.frame_rate) == (T, 1.0)
        assert ImageDataModule(pictures(), batch_size=2).num_frames == 0
        for image, rate, caption in zip(
            batch["image"], batch["frame_rate"], batch["caption"], strict=True
        ):
            row = int(image[0, -1, 0, 1])  # training reads these clips backwards
            assert (caption, float(rate)) == (f"{row} left", row + 1)

    def test_still_pictures_are_a_keyed_share(self) -> None:
        module = ClipDataModule(
            clips(), images=pictures(), image_ratio=0.25, batch_size=100, seed=3
        )
        batch = joined(batches(module, 8))
        assert math.isinf(STILL)
        still = batch["frame_rate"] == STILL
        assert 150 < int(still.sum()) < 250
        shown = batch["image"][still]
        assert torch.equal(shown, shown[:, :, :1].expand_as(shown))
        rows = shown[:, 0, 0, 0, 1].tolist()
        assert set(rows) == set(range(200, 210))
        captions = [c for c, s in zip(batch["caption"], still.tolist(), strict=True) if s]
        assert captions == [f"{row - 200} a picture, left" for row in rows]

    def test_positions_decide_however_the_run_is_split(self) -> None:
        def drawn(batch_size: int, seen: int, count: int, seed: int = 3) -> dict[str, Any]:
            module = ClipDataModule(
                clips(), images=pictures(), image_ratio=0.5, batch_size=batch_size, seed=seed
            )
            module.samples_seen = seen
            return joined(batches(module, count))

        whole, resumed = drawn(12, 0, 4), drawn(6, 24, 4)
        for name in ("image", "frame_rate", "position"):
            assert torch.equal(whole[name][24:], resumed[name])
        assert whole["caption"][24:] == resumed["caption"]
        assert not torch.equal(whole["frame_rate"], drawn(12, 0, 4, seed=4)["frame_rate"])

    def test_pictures_alone(self) -> None:
        module = ClipDataModule(clips(), images=pictures(), image_ratio=1.0, batch_size=8)
        assert bool((joined(batches(module, 3))["frame_rate"] == STILL).all())

    def test_a_mirrored_clip_has_its_mirrored_caption(self) -> None:
        module = ClipDataModule(
            clips(), images=pictures(), image_ratio=0.5, batch_size=32, flip=True, seed=1
        )
        batch = joined(batches(module, 2))
        flipped = mirrored(1, batch["position"])
        assert 15 < int(flipped.sum()) < 50
        # the marked column of all frames went to the other side
        sides = (batch["image"][..., -1] == 255).flatten(1).all(1)
        assert torch.equal(sides, flipped)
        assert [c.endswith("right") for c in batch["caption"]] == flipped.tolist()

    def test_a_limit_takes_few_clips_as_they_are_and_as_many_pictures(self) -> None:
        module = ClipDataModule(clips(), images=pictures(), image_ratio=0.5, batch_size=40, limit=4)
        assert (len(module.train), len(module.images or ())) == (4, 4)
        batch = joined(batches(module, 2))
        moving = batch["image"][batch["frame_rate"] != STILL]
        rows = set(moving[:, 0, 0, 0, 1].tolist())  # forwards: no key chooses
        assert len(rows) == 4
        assert rows <= set(range(20))

    def test_pictures_are_part_of_what_a_run_was_trained_on(self) -> None:
        def module(ratio: float) -> ClipDataModule:
            return ClipDataModule(clips(), images=pictures(), image_ratio=ratio, batch_size=2)

        assert module(0.0).fingerprint() == clips().fingerprint()
        assert module(0.5).fingerprint() != clips().fingerprint()
        with pytest.raises(DataError, match="The checkpoint was trained on data"):
            module(0.25).load_state_dict(module(0.5).state_dict())
        module(0.5).load_state_dict(module(0.5).state_dict())

    def test_labels_of_both_kinds(self) -> None:
        names = ("cat", "dog")
        films = TensorClips(pixels(4), 8.0, torch.tensor([0, 1, 0, 1]), class_names=names)
        stills = TensorImages(
            pixels(4, first=200)[:, :, 0], torch.tensor([1, 1, 0, 0]), class_names=names
        )
        module = ClipDataModule(films, images=stills, image_ratio=0.5, batch_size=32)
        (batch,) = batches(module, 1)
        for image, label in zip(batch["image"], batch["label"].tolist(), strict=True):
            row = int(image[0, 0, 0, 1])
            assert label == ([1, 1, 0, 0][row - 200] if row >= 200 else row % 2)

    def test_worker_processes_get_no_trainer(self) -> None:
        module = ClipDataModule(clips(), batch_size=2)
        module.trainer = lambda: None  # type: ignore[assignment] # cannot be pickled
        with pytest.raises((AttributeError, pickle.PicklingError)):
            pickle.dumps(module.trainer)
        samples = pickle.loads(pickle.dumps(module.samples()))
        assert len(samples) == 20
        assert samples[(0, 5)]["frame_rate"].item() == 6.0

    def test_what_does_not_fit_together_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"data.image_ratio=0.5 .* has no still pictures"):
            ClipDataModule(clips(), image_ratio=0.5, batch_size=2)
        with pytest.raises(ConfigError, match=r"data.image_ratio=1.5 must lie in 0 to 1"):
            ClipDataModule(clips(), images=pictures(), image_ratio=1.5, batch_size=2)
        with pytest.raises(DataError, match=r"holds clips of 3 frames, and still pictures"):
            ClipDataModule(clips(), images=clips(), batch_size=2)
        with pytest.raises(DataError, match=r"differ in resolution: 4 and 2"):
            ClipDataModule(clips(), images=TensorImages(pixels(2)[:, :, 0, :2, :2]), batch_size=2)
        with pytest.raises(DataError, match=r"differ in num_frames: 3 and 2"):
            ClipDataModule(clips(), TensorClips(pixels(2)[:, :, :2]), batch_size=2)
        labelled = TensorImages(pixels(1)[:, :, 0], torch.zeros(1), class_names=("cat",))
        with pytest.raises(DataError, match=r"have other classes"):
            ClipDataModule(clips(), images=labelled, batch_size=2)
