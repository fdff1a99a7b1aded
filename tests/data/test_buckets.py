"""Buckets of shapes: one size a step, keyed by its place, the same for any split and any resume."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from genscale.data.base import TensorImages, check_size
from genscale.data.buckets import BucketedStream, check_buckets, nearest_buckets
from genscale.data.image_folder import ImageFolder
from genscale.data.module import ImageDataModule
from genscale.data.scenes.dataset import Scenes
from genscale.errors import ConfigError, DataError

SIZES = [(32, 32), (24, 40), (40, 24)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty files: 36 square, 18 wide, 6 high; the level of a file is its number."""
    root = tmp_path_factory.mktemp("pictures")
    for number in range(60):
        height, width = (50, 50) if number < 36 else (30, 50) if number < 54 else (50, 30)
        pixels = np.full((height, width, 3), number, dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number:02d}.png")
    return root


def module(folder: Path, **settings: Any) -> ImageDataModule:
    images = ImageFolder(folder, 32, labels="none")
    return ImageDataModule(images, **{"batch_size": 6, "seed": 5, "buckets": SIZES, **settings})


def split(data: ImageDataModule, rank: int, world_size: int, accumulate: int) -> ImageDataModule:
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        strategy=strategy,
        global_rank=rank,
        world_size=world_size,
        accumulate_grad_batches=accumulate,
    )
    return data


def read(data: ImageDataModule, count: int) -> list[dict[str, Tensor]]:
    return list(islice(data.train_dataloader(), count))


def test_stored_pictures_come_in_the_bucket_nearest_to_their_shape(folder: Path) -> None:
    seen: dict[tuple[int, ...], set[int]] = {}
    for batch in read(module(folder), 20):
        shape = tuple(batch["image"].shape[2:])
        seen.setdefault(shape, set()).update(batch["image"][:, 0, 0, 0].tolist())
    assert seen[(32, 32)] <= set(range(36))
    assert seen[(24, 40)] == set(range(36, 54))
    assert seen[(40, 24)] == set(range(54, 60))


def test_every_picture_is_seen_equally_often(folder: Path) -> None:
    """Six, three and one batches of six a round: 36, 18 and 6 pictures, each once."""
    stream = module(folder).stream
    assert isinstance(stream, BucketedStream)
    assert stream.counts == [36, 18, 6]
    for number in range(2):
        rows = torch.cat([stream.rows(60 * number + 6 * step, 6) for step in range(10)])
        assert rows.sort().values.tolist() == list(range(60))
    orders = [[stream.bucket(60 * number + 6 * step) for step in range(10)] for number in range(4)]
    assert len({tuple(order) for order in orders}) > 1  # rounds are shuffled anew


@pytest.mark.parametrize(("world_size", "accumulate"), [(2, 1), (3, 2), (1, 3)])
def test_all_processes_share_the_bucket_of_a_step(
    folder: Path, world_size: int, accumulate: int
) -> None:
    whole = read(module(folder), 5)
    parts = [
        read(split(module(folder), rank, world_size, accumulate), 5 * accumulate)
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        mine = [part[step * accumulate + micro] for part in parts for micro in range(accumulate)]
        for name in ("image", "position"):
            assert torch.equal(torch.cat([each[name] for each in mine]), batch[name])


def test_a_resumed_run_reads_on_where_it_stopped(folder: Path) -> None:
    straight = read(module(folder), 25)
    resumed = module(folder)
    resumed.load_state_dict({**module(folder).state_dict(), "samples_seen": 6 * 13})
    for first, second in zip(straight[13:], read(resumed, 12), strict=True):
        assert torch.equal(first["image"], second["image"])
    other = module(folder, batch_size=4)
    other.samples_seen = 6
    with pytest.raises(DataError, match="Resume with the batch_size the run began with"):
        read(other, 1)
    shown_otherwise = module(folder, buckets=SIZES[:1])
    with pytest.raises(DataError, match="checkpoint was trained on data with fingerprint"):
        shown_otherwise.load_state_dict(module(folder).state_dict())


def test_drawn_pictures_suit_every_bucket_and_come_once_an_epoch() -> None:
    data = ImageDataModule(Scenes(12), batch_size=4, seed=1, buckets=[(32, 32), (24, 40)])
    batches = read(data, 6)
    shapes = [tuple(batch["image"].shape[2:]) for batch in batches]
    for start in range(0, 6, 2):  # a round is a batch of each
        assert set(shapes[start : start + 2]) == {(32, 32), (24, 40)}
    rows = torch.cat([data.stream.rows(4 * step, 4) for step in range(3)])
    assert rows.sort().values.tolist() == list(range(12))
    plain = ImageDataModule(Scenes(12), batch_size=4, seed=1)
    assert torch.equal(plain.stream.rows(0, 4), data.stream.rows(0, 4))  # the same rows in order
    assert torch.equal(
        batches[0]["image"], Scenes(12).images_at(plain.stream.rows(0, 4), shapes[0])
    )


def test_among_equal_proportions_the_largest_that_does_not_enlarge_wins() -> None:
    stored = torch.tensor([[100, 100], [64, 64], [40, 40], [20, 20], [200, 100], [90, 110]])
    sizes = [(64, 64), (32, 32), (96, 48)]
    assert nearest_buckets(stored, sizes).tolist() == [0, 0, 1, 1, 2, 0]


def test_a_file_on_its_side_is_measured_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGB", (40, 20)).save(tmp_path / "upright.png")
    images = ImageFolder(tmp_path, 16, labels="none")
    assert images.stored_sizes().tolist() == [[40, 20], [20, 40]]
    assert images.some(torch.tensor([1])).stored_sizes().tolist() == [[20, 40]]
    assert images.images_at([0, 1], (20, 12)).shape == (2, 3, 20, 12)
    assert images.reaches((20, 20))
    assert not images.reaches((24, 20))  # one file is 20 pixels high
    assert not images.reaches((4, 4))


def test_what_cannot_be_is_refused(folder: Path) -> None:
    square = TensorImages(torch.zeros(4, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(DataError, match="have 8x8 pixels, and 8x16 were asked for"):
        ImageDataModule(square, batch_size=2, buckets=[(8, 8), (8, 16)])
    assert square.stored_sizes().tolist() == [[8, 8]] * 4
    with pytest.raises(ConfigError, match=r"names \[24, 40\] twice"):
        check_buckets([(24, 40), [24, 40]], Scenes(1))
    with pytest.raises(ConfigError, match="a height and a width in pixels"):
        check_buckets([(24,)], Scenes(1))
    with pytest.raises(ConfigError, match="empty"):
        check_buckets([], Scenes(1))
    check_size((8, 16), 8, 16, "toys")
    with pytest.raises(ConfigError, match=r"a size of 8x17 .* of toys\. Choose 8 to 16 pixels"):
        check_size((8, 17), 8, 16, "toys")
    with pytest.raises(ConfigError, match="a size of 32x4 is outside the range"):
        module(folder, buckets=[(32, 4)])
