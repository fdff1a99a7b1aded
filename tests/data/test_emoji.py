"""Noto emoji: from the package to the prepared file to the data set, with a tiny package."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from genscale.data.emoji import NOTICE, Emoji, EmojiRecord, emoji_module, read_emoji, write_emoji
from genscale.errors import ConfigError, DataError
from scripts import prepare_emoji

CATEGORIES = ("Animals & Nature", "Food & Drink")
COUNT = 40


def _png(level: int, side: int = 64) -> bytes:
    """Red of a level on the left; nothing, that is white, on the right."""
    pixels = np.zeros((side, side, 4), dtype=np.uint8)
    pixels[:, : side // 2] = (level, 0, 0, 255)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _entry(number: int) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": f"THING {number}",
        "image": f"{number:04x}.png",
        "category": CATEGORIES[number % 2],
        "subcategory": "plant-flower",
        "has_img_google": True,
    }
    if number == 1:
        tones = {"1F3FB": "a.png", "1F3FB-1F3FF": "b.png"}
        entry["skin_variations"] = {
            tone: {"image": image, "has_img_google": True} for tone, image in tones.items()
        }
    return entry


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """The files of a package with 40 emoji, one without a picture, and two skin tones."""
    index = [*map(_entry, range(COUNT)), {**_entry(99), "has_img_google": False}]
    found = {"package.json": json.dumps({"version": "1.2.3"}).encode()}
    found["emoji.json"] = json.dumps(index).encode()
    found |= {f"img/google/64/{i:04x}.png": _png(100 + i) for i in range(COUNT)}
    return found | {"img/google/64/a.png": _png(200), "img/google/64/b.png": _png(201)}


def _pack(files: dict[str, bytes], path: Path) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def prepared(files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emoji")
    archive = _pack(files, folder / "package.tgz")
    path, emoji, variants = prepare_emoji.prepare(archive, folder / "out")
    assert (path, emoji, variants) == (folder / "out/emoji.npz", COUNT, 2)
    return path


def test_the_prepared_file_holds_pictures_on_white_with_their_records(prepared: Path) -> None:
    pixels, records = read_emoji(prepared)
    assert (pixels.shape, pixels.dtype) == ((COUNT + 2, 3, 64, 64), torch.uint8)
    assert pixels[0, :, 5, 31].tolist() == [100, 0, 0]
    assert pixels[0, :, 5, 32].tolist() == [255, 255, 255]
    assert records[0] == EmojiRecord("thing 0", "Animals & Nature", "plant-flower", "0000.png")
    assert [r.skin_tone for r in records[1:4]] == ["", "light", "light and dark"]
    assert {r.base for r in records[1:4]} == {"0001.png"}
    assert "Apache License, Version 2.0" in NOTICE
    assert prepared.with_name("NOTICE.txt").read_text() == NOTICE
    with np.load(prepared) as arrays:
        index = json.loads(arrays["index"].tobytes())
    assert (index["source"], index["notice"]) == ("emoji-datasource-google 1.2.3", NOTICE)


def test_an_unpacked_package_gives_the_same_file(
    files: dict[str, bytes], prepared: Path, tmp_path: Path
) -> None:
    for name, data in files.items():
        path = tmp_path / "package" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    for source in (tmp_path, tmp_path / "package"):
        path, _, _ = prepare_emoji.prepare(source, tmp_path / "out")
        assert path.read_bytes() == prepared.read_bytes()


def test_splits_share_no_emoji_and_together_are_all(prepared: Path) -> None:
    train, heldout = (Emoji(prepared, split) for split in ("train", "heldout"))  # type: ignore[arg-type]
    assert len(train) + len(heldout) == COUNT
    # the first byte of the SHA-256 of these file names is below 25.6
    assert list(heldout.captions) == ["thing 21", "thing 25", "thing 33", "thing 39"]
    assert not set(train.captions) & set(heldout.captions)
    assert train.class_names == heldout.class_names == CATEGORIES
    assert train.labels is not None
    assert all(
        int(c.split()[1]) % 2 == k for c, k in zip(train.captions, train.labels, strict=True)
    )


def test_skin_tones_stay_on_the_side_of_their_emoji(prepared: Path) -> None:
    train = Emoji(prepared, skin_tones=True)
    heldout = Emoji(prepared, "heldout", skin_tones=True)
    assert len(train) + len(heldout) == COUNT + 2
    side = next(each for each in (train, heldout) if "thing 1" in each.captions)
    assert {"thing 1, light skin tone", "thing 1, light and dark skin tone"} <= set(side.captions)


def test_subcategories_join_the_captions(prepared: Path) -> None:
    assert Emoji(prepared, subcategories=True).captions[0] == "thing 0, plant flower"


@pytest.mark.parametrize("resolution", [16, 64, 96])
def test_any_resolution(prepared: Path, resolution: int) -> None:
    emoji = Emoji(prepared.parent, resolution=resolution)  # the folder will do
    image = emoji.image(0)
    assert image.shape == (3, resolution, resolution)
    assert image[:, 3, 3].tolist() == [100, 0, 0]
    assert image[:, 3, -3].tolist() == [255, 255, 255]
    assert (emoji.name, emoji.num_classes) == ("emoji", 2)


def test_the_factory_builds_both_splits(prepared: Path) -> None:
    settings = {
        "root": str(prepared),
        "resolution": 16,
        "skin_tones": False,
        "subcategories": False,
    }
    settings |= {"flip": False, "num_workers": 0, "batch_size": 4, "seed": 0, "name": "emoji"}
    module = emoji_module(channels=3, num_classes=2, **settings)  # type: ignore[arg-type]
    assert (len(module.train) + len(module.heldout), module.resolution) == (COUNT, 16)
    with pytest.raises(ConfigError, match=r"data.channels=1, but emoji are RGB"):
        emoji_module(channels=1, num_classes=2, **settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"data.num_classes=10, but 'emoji' has 2 classes"):
        emoji_module(channels=3, num_classes=10, **settings)  # type: ignore[arg-type]


def test_a_missing_file_is_told_with_how_to_prepare_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"data/emoji/emoji.npz .* scripts/prepare_emoji.py"):
        Emoji()
    with pytest.raises(DataError, match=r"no file of emoji at .*other.npz"):
        Emoji(tmp_path / "other.npz")


def test_damaged_and_foreign_files_are_refused(prepared: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.npz"
    half.write_bytes(prepared.read_bytes()[:300])
    with pytest.raises(DataError, match=r"half.npz cannot be read as a file of emoji"):
        read_emoji(half)
    np.savez(tmp_path / "foreign.npz", pixels=np.zeros(3))
    with pytest.raises(DataError, match=r"foreign.npz cannot be read .*KeyError"):
        read_emoji(tmp_path / "foreign.npz")
    record = EmojiRecord("x", "y", "z", "x.png")
    write_emoji(tmp_path / "two.npz", torch.zeros(2, 3, 64, 64, dtype=torch.uint8), [record], "s")
    with pytest.raises(DataError, match=r"shape \(2, 3, 64, 64\), but .* \(1, 3, 64, 64\)"):
        read_emoji(tmp_path / "two.npz")


def test_words_outside_the_range_are_refused(prepared: Path) -> None:
    with pytest.raises(ConfigError, match=r"split='test' is unknown"):
        Emoji(prepared, "test")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"data.resolution=8 .* Choose 16 to 512"):
        Emoji(prepared, resolution=8)


def test_the_script_says_what_a_package_lacks(
    files: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(changes: dict[str, bytes | None]) -> str:
        kept = {name: data for name, data in (files | changes).items() if data is not None}
        archive = _pack(kept, tmp_path / "p.tgz")
        assert prepare_emoji.main([str(archive), "--out", str(tmp_path / "out")]) == 1
        return capsys.readouterr().err

    assert "p.tgz holds no emoji.json" in told({"emoji.json": None})
    assert "p.tgz holds no img/google/64/0003.png" in told({"img/google/64/0003.png": None})
    assert "0003.png cannot be read as a picture" in told({"img/google/64/0003.png": b"no"})
    assert "0003.png has 32x32 pixels" in told({"img/google/64/0003.png": _png(1, 32)})
    assert not (tmp_path / "out").exists()
    (tmp_path / "p.tgz").write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"p.tgz cannot be read as a .tgz or a folder"):
        prepare_emoji.prepare(tmp_path / "p.tgz", tmp_path / "out")


def test_without_npm_the_script_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"no npm .* give the .tgz as SOURCE"):
        prepare_emoji.fetch(tmp_path)
