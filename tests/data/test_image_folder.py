"""Folders of pictures: order, classes, damage that is named, and a split that stays."""

from __future__ import annotations

import io
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from genscale.data.image_folder import ImageFolder, image_folder_module
from genscale.data.transforms import center_crop
from genscale.errors import ConfigError, DataError


def save(path: Path, colour: int = 0, size: tuple[int, int] = (12, 10), **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, 100, 200)).save(path, **options)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes; one holds a further folder; four formats; a hidden and a foreign file."""
    folder = tmp_path / "pictures"
    save(folder / "dog/b.png", 10)
    save(folder / "dog/a.BMP", 20)
    save(folder / "cat/deep/er.webp", 30, lossless=True)
    save(folder / "cat/z.jpeg", 40, quality=100)
    save(folder / "cat/.hidden.png", 50)
    (folder / "cat/notes.txt").write_text("no picture")
    return folder


def truncate(path: Path) -> None:
    """Leave a file that opens well and breaks off in its pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG" if path.suffix == ".jpg" else "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])


def test_pictures_come_in_order_of_their_path_with_the_class_of_their_folder(root: Path) -> None:
    images = ImageFolder(root, 8)
    paths = ["cat/deep/er.webp", "cat/z.jpeg", "dog/a.BMP", "dog/b.png"]
    assert [images.path(i) for i in range(len(images))] == paths
    assert images.class_names == ("cat", "dog")
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 1, 1]
    assert (images.channels, images.resolution, images.num_classes) == (3, 8, 2)
    assert images.name == "pictures"
    batch = images.images([3, 0, 3])
    assert (batch.shape, batch.dtype) == ((3, 3, 8, 8), torch.uint8)
    assert batch[:, 0, 0, 0].tolist() == [10, 30, 10]


def test_a_picture_is_cropped_as_the_transform_does(tmp_path: Path) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (37, 51, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    images = ImageFolder(tmp_path, 16, labels="none")
    expected = np.array(center_crop(Image.fromarray(noise), 16)).transpose(2, 0, 1)
    assert np.array_equal(images.image(0).numpy(), expected)
    assert ImageFolder(tmp_path, 16, labels="none", channels=1).image(0).shape == (1, 16, 16)


def test_without_labels_any_layout_will_do(root: Path) -> None:
    save(root / "flat.png")
    images = ImageFolder(root, 8, labels="none", name="mine")
    assert (len(images), images.labels, images.num_classes, images.name) == (5, None, 0, "mine")


def test_other_files_are_counted_and_logged(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="genscale.data.image_folder"):
        ImageFolder(root, 8)
    assert "passed over files that are no pictures: 1 .txt" in caplog.text


def test_a_linked_folder_is_read_and_a_link_back_is_refused(root: Path, tmp_path: Path) -> None:
    save(tmp_path / "elsewhere/c.png")
    (root / "eel").symlink_to(tmp_path / "elsewhere")
    assert ImageFolder(root, 8).class_names == ("cat", "dog", "eel")
    (root / "dog/again").symlink_to(root / "cat")
    with pytest.raises(DataError, match=r"link to a folder that is read already"):
        ImageFolder(root, 8)


@pytest.mark.skipif(os.name != "posix", reason="file names are bytes on POSIX only")
def test_names_need_not_be_ascii(tmp_path: Path) -> None:
    save(tmp_path / "\u732b/\u00e9.png", 5)
    save(tmp_path / "dog/a.png", 6)
    images = ImageFolder(tmp_path, 8)
    assert images.class_names == ("dog", "\u732b")
    assert images.path(1) == "\u732b/\u00e9.png"
    assert len(images.fingerprint()) == 64


def test_the_layout_must_fit_the_labels(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no folder .*/nowhere"):
        ImageFolder(tmp_path / "nowhere", 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no pictures \(.png, .* or .bmp\); found: nothing"):
        ImageFolder(tmp_path / "empty", 8)
    (tmp_path / "empty/a.tiff").write_text("")
    with pytest.raises(DataError, match=r"found: 1 .tiff"):
        ImageFolder(tmp_path / "empty", 8)
    with pytest.raises(DataError, match=r"one class folder only \('pictures'\).*root=.*/pictures;"):
        ImageFolder(tmp_path, 8)
    (root / "unicorn").mkdir()
    with pytest.raises(DataError, match=r"1 class folders without pictures \(first: 'unicorn'\)"):
        ImageFolder(root, 8)
    save(root / "flat.png")
    with pytest.raises(DataError, match=r"1 pictures outside class folders \(first: flat.png\)"):
        ImageFolder(root, 8)


def test_damaged_headers_are_named_at_the_start(root: Path) -> None:
    (root / "cat/y.png").write_text("this is no picture")
    (root / "dog/void.jpg").write_bytes(b"")
    with pytest.raises(
        DataError,
        match=r"2 of 6 files .*: cat/y.png \(no PNG, JPEG, WebP or BMP header\); dog/void.jpg",
    ):
        ImageFolder(root, 8)


@pytest.mark.parametrize("name", ["dog/cut.png", "dog/cut.jpg"])
def test_truncated_files_are_named_when_read_or_by_a_full_check(root: Path, name: str) -> None:
    truncate(root / name)
    images = ImageFolder(root, 8)
    row = [images.path(i) for i in range(5)].index(name)
    with pytest.raises(DataError, match=rf"{name} cannot be read .*truncated.*data.verify=pixels"):
        images.images([0, row])
    with pytest.raises(DataError, match=rf"1 of 5 files .*: {name} \(.*truncated"):
        ImageFolder(root, 8, verify="pixels")


def test_skipping_leaves_damaged_files_out_and_says_so_once(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    truncate(root / "cat/cut.png")
    (root / "dog/bad.png").write_text("bad")
    images = ImageFolder(root, 8, verify="pixels", on_damage="skip")
    assert images.damaged == ("cat/cut.png", "dog/bad.png")
    assert len(images) == 4
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 1, 1]
    images.images(range(4))
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 1
    assert "left out 2 damaged files: cat/cut.png (" in told[0]
    assert "dog/bad.png" in told[0]


def test_a_folder_of_nothing_but_damage_is_refused(tmp_path: Path) -> None:
    for i in range(25):
        (tmp_path / f"{i:02}.png").write_text("bad")
    with pytest.raises(DataError, match=r"None of the 25 files .* and 5 more"):
        ImageFolder(tmp_path, 8, labels="none", on_damage="skip")


def test_a_file_that_is_gone_is_named(root: Path) -> None:
    images = ImageFolder(root, 8, verify="none")
    (root / "dog/b.png").unlink()
    with pytest.raises(DataError, match=r"dog/b.png cannot be read .*the file is gone"):
        images.image(3)
    with pytest.raises(DataError, match=r"dog/b.png was there at the start and is gone"):
        images.fingerprint()


def test_a_picture_of_absurd_size_is_refused_by_name(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # 12 x 10 is more than twice that
    with pytest.raises(DataError, match=r"4 of 4 files .*exceeds limit"):
        ImageFolder(root, 8)


def test_rows_outside_the_set_are_refused(root: Path) -> None:
    images = ImageFolder(root, 8)
    with pytest.raises(IndexError, match=r"Row 4 does not exist: the data set has rows 0 to 3"):
        images.image(4)
    with pytest.raises(IndexError, match=r"Row -1 does not exist"):
        images.images([0, -1])


def test_held_out_files_stay_held_out_when_files_are_added(tmp_path: Path) -> None:
    for i in range(40):
        save(tmp_path / f"{'ab'[i % 2]}/{i:02}.png", i)
    train, heldout = ImageFolder(tmp_path, 8).split(0.25)
    sides = [{part.path(i) for i in range(len(part))} for part in (train, heldout)]
    assert len(sides[0]) + len(sides[1]) == 40
    assert not sides[0] & sides[1]
    assert 3 <= len(sides[1]) <= 20  # 40 files with probability 1/4: 10 +- 3 standard deviations
    assert train.class_names == heldout.class_names == ("a", "b")
    assert heldout.labels is not None
    assert [heldout.path(i)[0] for i in range(len(heldout))] == [
        "ab"[label] for label in heldout.labels.tolist()
    ]
    assert heldout.image(0)[0, 0, 0] == int(heldout.path(0)[2:4])  # red is the file's number

    for i in range(40, 60):
        save(tmp_path / f"a/{i}.png", i)
    again = ImageFolder(tmp_path, 8).split(0.25)[1]
    assert sides[1] <= {again.path(i) for i in range(len(again))}


def test_a_split_that_leaves_a_side_empty_is_refused(root: Path) -> None:
    images = ImageFolder(root, 8)
    with pytest.raises(DataError, match=r"of 4 pictures leaves the held-out side empty"):
        images.split(1e-6)
    with pytest.raises(DataError, match=r"of 4 pictures leaves the train side empty"):
        images.split(1 - 1e-6)
    with pytest.raises(ConfigError, match=r"data.heldout_fraction=1.5 must lie between 0 and 1"):
        images.split(1.5)


def test_the_fingerprint_knows_names_sizes_crop_and_split(root: Path) -> None:
    whole = ImageFolder(root, 8)
    found = {whole.fingerprint(), ImageFolder(root, 9).fingerprint()}
    found.add(ImageFolder(root, 8, labels="none").fingerprint())
    found |= {part.fingerprint() for part in whole.split(0.5)}
    assert len(found) == 5
    assert ImageFolder(root, 8).fingerprint() in found
    save(root / "dog/b.png", 10, size=(30, 30))
    assert ImageFolder(root, 8).fingerprint() not in found


def test_a_folder_can_be_sent_to_a_worker(root: Path) -> None:
    images = ImageFolder(root, 8)
    copied = pickle.loads(pickle.dumps(images))
    assert torch.equal(copied.images([2, 1]), images.images([2, 1]))
    assert copied.fingerprint() == images.fingerprint()


def test_words_outside_the_choice_are_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.labels='yes' is unknown. Choose folders or none"):
        ImageFolder(root, 8, labels="yes")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"data.verify='all' .* headers, pixels or none"):
        ImageFolder(root, 8, verify="all")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"data.on_damage='drop' .* raise or skip"):
        ImageFolder(root, 8, on_damage="drop")  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=r"data.on_damage=skip .* data.verify=none checks nothing"
    ):
        ImageFolder(root, 8, verify="none", on_damage="skip")
    with pytest.raises(ConfigError, match=r"data.resolution=4096"):
        ImageFolder(root, 4096)


def module_of(root: Path | None, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "name": "mine",
        "root": None if root is None else str(root),
        "resolution": 8,
        "channels": 3,
        "num_classes": None,
        "labels": "folders",
        "verify": "headers",
        "on_damage": "raise",
        "heldout_root": None,
        "heldout_fraction": 0.0,
        "flip": False,
        "num_workers": 0,
        "batch_size": 2,
        "seed": 0,
    }
    return image_folder_module(**(settings | changes))


def test_the_factory_counts_classes_and_holds_out(root: Path) -> None:
    module = module_of(root)
    assert (module.num_classes, len(module.train), module.heldout) == (2, 4, None)
    halves = module_of(root, heldout_fraction=0.5)
    assert len(halves.train) + len(halves.heldout) == 4
    assert len(module_of(root, heldout_root=str(root)).heldout) == 4
    assert module_of(root, labels="none").num_classes == 0


def test_the_factory_refuses_what_contradicts_itself(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.root is not set, and data=mine needs"):
        module_of(None)
    with pytest.raises(ConfigError, match=r"data.num_classes=3, but 'mine' has 2 classes"):
        module_of(root, num_classes=3)
    with pytest.raises(ConfigError, match=r"Set one of them"):
        module_of(root, heldout_root=str(root), heldout_fraction=0.1)
