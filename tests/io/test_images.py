"""Pictures at the edge: 8 bits, PNG, grids, and ADM's npz with its refusals."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genscale.errors import DataError
from genscale.io.images import (
    channels_first,
    channels_last,
    from_uint8,
    grid_image,
    load_npz,
    save_grid,
    save_npz,
    save_png,
    to_uint8,
)

ALL = torch.arange(256, dtype=torch.uint8)


def test_eight_bits_survive_the_way_there_and_back() -> None:
    assert torch.equal(to_uint8(from_uint8(ALL)), ALL)
    assert from_uint8(ALL)[[0, 255]].tolist() == [-1.0, 1.0]
    assert from_uint8(ALL).dtype == torch.float32


def test_halves_are_rounded_up_and_values_outside_are_clipped() -> None:
    # 127.5 (x + 1): 0 -> 127.5 -> 128; -1 + 1/255 -> 0.5 -> 1; 1.1 and -7 lie outside
    values = torch.tensor([0.0, -1 + 1 / 255 + 1e-7, 1.1, -7.0, 1.0])
    assert to_uint8(values).tolist() == [128, 1, 255, 0, 255]


def test_truncation_is_adm_s_rule() -> None:
    values = torch.tensor([0.0, 0.999, -0.993, 1.0, -2.0])  # 127.5, 254.87, 0.89
    assert to_uint8(values, quantize="truncate").tolist() == [127, 254, 0, 255, 0]
    assert to_uint8(values).tolist() == [128, 255, 1, 255, 0]


def test_half_precision_is_quantised_in_float32() -> None:
    images = from_uint8(ALL).to(torch.float16)
    assert torch.equal(to_uint8(images), ALL)


def test_values_that_are_no_numbers_are_counted_and_refused() -> None:
    images = torch.zeros(2, 3)
    images[0, 1] = torch.nan
    images[1] = torch.inf
    with pytest.raises(DataError, match=r"4 of 6 pixel values are NaN or infinite"):
        to_uint8(images)


def test_types_are_not_guessed() -> None:
    with pytest.raises(ValueError, match=r"floating point, but these are torch.uint8"):
        to_uint8(ALL)
    with pytest.raises(ValueError, match=r"uint8, but these are torch.float32"):
        from_uint8(ALL.float())
    with pytest.raises(ValueError, match=r"quantize='floor' is unknown"):
        to_uint8(ALL.float(), quantize="floor")  # type: ignore[arg-type]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_holds_the_picture(tmp_path: Path, channels: int) -> None:
    image = torch.arange(channels * 12).view(channels, 3, 4).to(torch.uint8) * 7
    save_png(tmp_path / "a.png", image)
    save_png(tmp_path / "b.png", from_uint8(image)[None])
    for name in ("a.png", "b.png"):
        found = torch.from_numpy(np.array(Image.open(tmp_path / name))).view(3, 4, channels)
        assert torch.equal(found.permute(2, 0, 1), image)


def test_a_grid_has_gutters_of_four_and_whole_factors() -> None:
    images = torch.zeros(6, 1, 16, 16, dtype=torch.uint8)
    # 16 pixels are enlarged by ceil(96 / 16) = 6; 3 columns and 2 rows of 96 with 3 + 1, 2 + 1 gaps
    assert grid_image(images).size == (3 * 96 + 4 * 4, 2 * 96 + 3 * 4)
    assert grid_image(images, columns=6, scale=1).size == (6 * 16 + 7 * 4, 16 + 2 * 4)
    # a caption takes 13 + 5 pixels below each row, a title 17 + 12 above all
    assert grid_image(images, captions=["a"] * 6).size[1] == 2 * (96 + 18) + 3 * 4
    assert grid_image(images, title="t").size[1] == 2 * 96 + 3 * 4 + 29
    assert grid_image(images, row_labels=["one", "two"]).size[0] > 3 * 96 + 4 * 4
    assert grid_image(torch.zeros(2, 3, 200, 100)).size == (2 * 100 + 3 * 4, 200 + 2 * 4)
    assert grid_image(torch.zeros(80, 1, 32, 32), columns=40).size[0] <= 2048  # scale 1, not 3


@pytest.mark.parametrize(
    ("count", "columns"), [(1, 1), (2, 2), (3, 3), (7, 3), (10, 5), (16, 4), (50, 10), (64, 8)]
)
def test_columns_fill_all_rows_where_they_can(count: int, columns: int) -> None:
    grid = grid_image(torch.zeros(count, 1, 8, 8), scale=1)
    assert grid.size[0] == columns * 12 + 4
    assert grid.size[1] == -(-count // columns) * 12 + 4


def test_a_grid_shows_each_picture_in_its_place_without_smoothing() -> None:
    images = torch.arange(4).view(4, 1, 1, 1).expand(4, 3, 2, 2).to(torch.uint8) * 60
    images = images.clone()
    images[3, :, 0, 0] = 255
    grid = np.array(grid_image(images, columns=2, scale=5))
    assert (grid[4:14, 4:14] == 0).all()
    assert (grid[4:14, 18:28] == 60).all()
    assert (grid[18:28, 4:14] == 120).all()
    assert (grid[18:23, 18:23] == 255).all()
    assert (grid[23:28, 18:28] == 180).all()
    assert (grid[:4] == 255).all()  # paper


def test_captions_are_broken_between_words() -> None:
    images = torch.full((2, 1, 96, 96), 255, dtype=torch.uint8)
    words = "three small red circles left of a blue square"
    one = grid_image(images, columns=2, captions=[words, "a"])
    assert one.size[1] == 96 + 18 + 2 * 4
    several = grid_image(images, columns=2, captions=[words, "a"], caption_lines=9)
    lines = (several.size[1] - 96 - 2 * 4) // 18
    assert 3 <= lines <= 5  # some 14 characters a line
    assert grid_image(images, columns=2, captions=["a", "b"], caption_lines=9).size == one.size
    below = np.array(several)[100:]
    assert (below[:, :100] < 128).any()  # written
    assert not (below[18:, 104:] < 128).any()  # the short one takes one line


def test_captions_stay_within_their_cell() -> None:
    images = torch.zeros(2, 1, 16, 16, dtype=torch.uint8)
    grid = np.array(grid_image(images, columns=2, captions=["m" * 60, ""]))
    below = grid[4 + 96 :]
    assert (below[:, 4:100] < 128).any()  # something is written below the first,
    assert (below[:, 100:] == 255).all()  # and nothing below the second


def test_a_grid_is_written_as_png(tmp_path: Path) -> None:
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    save_grid(images, tmp_path / "new/grid.png", title="four", captions=list("abcd"))
    expected = np.array(grid_image(images, title="four", captions=list("abcd")))
    assert np.array_equal(np.array(Image.open(tmp_path / "new/grid.png")), expected)


def test_a_grid_refuses_words_that_do_not_match() -> None:
    images = torch.zeros(4, 1, 8, 8)
    with pytest.raises(ValueError, match=r"3 texts were given for 4. Give one a picture"):
        grid_image(images, captions=list("abc"))
    with pytest.raises(ValueError, match=r"3 texts were given for 2. Give one a row"):
        grid_image(images, row_labels=list("abc"))
    with pytest.raises(ValueError, match=r"these have \(0, 1, 8, 8\)"):
        grid_image(images[:0])
    with pytest.raises(ValueError, match=r"these have \(4, 2, 8, 8\)"):
        grid_image(torch.zeros(4, 2, 8, 8))


IMAGES = torch.arange(5 * 4 * 3 * 3).view(5, 4, 3, 3).to(torch.uint8)  # (n, H, W, 3)


def test_an_npz_holds_images_and_labels_in_adm_s_layout(tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    save_npz(path, IMAGES, torch.tensor([3, 1, 4, 1, 5], dtype=torch.int32))
    with np.load(path) as archive:
        assert archive.files == ["arr_0", "arr_1"]
        assert (archive["arr_0"].dtype, archive["arr_1"].dtype) == (np.uint8, np.int64)
        assert archive["arr_0"].shape == (5, 4, 3, 3)
    images, labels = load_npz(path)
    assert labels is not None
    assert torch.equal(images, IMAGES)
    assert labels.tolist() == [3, 1, 4, 1, 5]
    assert list(tmp_path.iterdir()) == [path]


def test_grey_is_repeated_and_labels_may_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    save_npz(path, IMAGES[..., :1].numpy())
    images, labels = load_npz(path)
    assert labels is None
    assert torch.equal(images, IMAGES[..., :1].expand(-1, -1, -1, 3))


def test_other_arrays_of_a_reference_file_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    np.savez(path, arr_0=IMAGES.numpy(), mu=np.array([{}], dtype=object))
    assert torch.equal(load_npz(path)[0], IMAGES)


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"images": IMAGES.numpy()}, r"no arr_0 \(found: images\)"),
        ({}, r"no arr_0 \(found: nothing\)"),
        ({"arr_0": IMAGES.float().numpy()}, r"but is float32 .* Quantise"),
        ({"arr_0": IMAGES.permute(0, 3, 1, 2)[:, :, :, :2].numpy()}, "channels come first"),
        ({"arr_0": IMAGES[..., :1].numpy()}, "Repeat grey three times"),
        ({"arr_0": IMAGES[0].numpy()}, r"of shape \(4, 3, 3\)"),
        ({"arr_0": IMAGES[:0].numpy()}, "holds no pixels"),
        ({"arr_0": np.array([{}, {}], dtype=object)}, "holds Python objects"),
        ({"arr_0": IMAGES.numpy(), "arr_1": np.zeros(4, np.int64)}, r"5 integers.* shape \(4,\)"),
        ({"arr_0": IMAGES.numpy(), "arr_1": np.zeros(5)}, "is float64 of shape"),
        ({"arr_0": IMAGES.numpy(), "arr_1": np.zeros(5, object)}, "holds Python objects"),
    ],
)
def test_other_layouts_are_refused_in_a_sentence(
    tmp_path: Path, arrays: dict[str, np.ndarray], sentence: str
) -> None:
    path = tmp_path / "samples.npz"
    np.savez(path, **arrays)
    with pytest.raises(DataError, match=sentence) as caught:
        load_npz(path)
    assert str(path) in str(caught.value)


def test_damaged_files_are_refused_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    save_npz(path, IMAGES)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"PK\x03\x04", b"no archive at all"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"samples.npz is damaged or not an npz"):
            load_npz(path)
    flipped = bytearray(whole)
    flipped[whole.index(bytes(range(60, 80)))] ^= 0xFF  # one pixel: the checksum tells
    path.write_bytes(flipped)
    with pytest.raises(DataError, match=r"damaged"):
        load_npz(path)
    for name, content in (
        ("arr_0.npy", b"\x93NUMPY\x01\x00 no header"),
        ("arr_0.npy", b"no array"),
        ("arr_0", b"no array"),
    ):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, content)
        with pytest.raises(DataError, match=r"damaged"):
            load_npz(path)


def test_a_single_array_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with open(tmp_path / "one.npz", "wb") as file:
        np.save(file, IMAGES.numpy())
    with pytest.raises(DataError, match=r"single array, and an npz archive"):
        load_npz(tmp_path / "one.npz")
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere.npz"):
        load_npz(tmp_path / "nowhere.npz")


def test_writing_refuses_what_reading_would(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"channels come first"):
        save_npz(tmp_path / "a.npz", torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(DataError, match=r"but is float32"):
        save_npz(tmp_path / "a.npz", torch.zeros(2, 8, 8, 3))
    with pytest.raises(DataError, match=r"5 integers"):
        save_npz(tmp_path / "a.npz", IMAGES, torch.zeros(4, dtype=torch.int64))
    assert list(tmp_path.iterdir()) == []


def test_an_npz_holds_clips_with_the_frames_before_the_sides(tmp_path: Path) -> None:
    clips = torch.randint(256, (2, 3, 5, 4, 6), dtype=torch.uint8)
    arrays = channels_last(clips)
    assert arrays.shape == (2, 5, 4, 6, 3)
    assert torch.equal(arrays[1, 2, 3, 4], clips[1, :, 2, 3, 4])
    save_npz(tmp_path / "clips.npz", arrays, torch.tensor([4, 2]))
    found, labels = load_npz(tmp_path / "clips.npz")
    assert torch.equal(channels_first(found), clips)
    assert labels is not None
    assert labels.tolist() == [4, 2]
    save_npz(tmp_path / "grey.npz", channels_last(clips[:, :1]))
    grey, _ = load_npz(tmp_path / "grey.npz")
    assert torch.equal(grey, channels_last(clips[:, :1].expand(-1, 3, -1, -1, -1)))
    with pytest.raises(DataError, match=r"transpose with array.transpose\(0, 2, 3, 4, 1\)"):
        save_npz(tmp_path / "wrong.npz", clips.numpy())
