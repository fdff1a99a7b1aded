"""From stored pictures to 8-bit squares: every mode, ADM's crop, the resize."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from genscale.data.transforms import center_crop, resize, to_rgb, to_tensor
from genscale.errors import ConfigError, DataError


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Draw smooth noise: an enlarged small random picture."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def test_the_crop_halves_with_boxes_by_hand() -> None:
    # 8 x 4 in squares of 2 x 2 of (10 20 / 30 40) + 50 k: each averages to 25 + 50 k
    square = np.array([[10, 20], [30, 40]])
    rows = [np.hstack([square + 50 * k for k in line]) for line in ((0, 1, 2, 3), (3, 2, 1, 0))]
    image = Image.fromarray(np.vstack(rows).astype(np.uint8)).convert("RGB")
    # size 2: 8 x 4 halves to 4 x 2, whose shorter side is 2 already; columns 1 and 2 are the centre
    cropped = np.array(center_crop(image, 2))[..., 0]
    assert cropped.tolist() == [[75, 125], [125, 75]]


def test_the_crop_follows_the_sizes_worked_out_by_hand() -> None:
    image = picture(600, 1000)
    # to 64: 1000x600 -> 500x300 -> 250x150 -> 125x75 while the shorter side is >= 128;
    # then by 64/75 to 106.67 -> 107 x 64; (107 - 64) // 2 = 21 columns are cut off at the left
    box, bicubic = Image.Resampling.BOX, Image.Resampling.BICUBIC
    halved = image.resize((500, 300), box).resize((250, 150), box).resize((125, 75), box)
    expected = halved.resize((107, 64), bicubic).crop((21, 0, 85, 64))
    assert np.array_equal(np.array(center_crop(image, 64)), np.array(expected))
    assert not np.array_equal(
        np.array(image.resize((107, 64), bicubic).crop((21, 0, 85, 64))), np.array(expected)
    )


@pytest.mark.parametrize(
    ("height", "width"), [(64, 64), (127, 128), (20, 30), (64, 200), (999, 65), (1, 5)]
)
def test_the_crop_always_has_the_size_asked_for(height: int, width: int) -> None:
    assert center_crop(picture(height, width), 64).size == (64, 64)


def test_a_picture_of_the_right_size_is_left_as_it_is() -> None:
    image = picture(32, 32)
    assert np.array_equal(np.array(center_crop(image, 32)), np.array(image))


def pixel(image: Image.Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    converted = to_rgb(image)
    assert converted.mode == "RGB"
    value = converted.getpixel((x, y))
    assert isinstance(value, tuple)
    return value


def test_transparency_is_laid_on_white() -> None:
    # half-transparent black on white: 255 * (1 - 128/255) = 127
    assert pixel(Image.new("RGBA", (2, 2), (0, 0, 0, 128))) == (127, 127, 127)
    assert pixel(Image.new("RGBA", (2, 2), (9, 9, 9, 0))) == (255, 255, 255)
    assert pixel(Image.new("LA", (2, 2), (0, 0))) == (255, 255, 255)


def test_grey_black_and_white_and_cmyk_become_rgb() -> None:
    assert pixel(Image.new("L", (2, 2), 77)) == (77, 77, 77)
    assert pixel(Image.new("1", (2, 2), 1)) == (255, 255, 255)
    assert pixel(Image.new("CMYK", (2, 2), (0, 255, 255, 0))) == (255, 0, 0)


def test_a_palette_is_looked_up_and_its_transparent_colour_laid_on_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    assert [pixel(image, 0), pixel(image, 1)] == [(10, 20, 30), (40, 50, 60)]
    image.info["transparency"] = 1
    assert [pixel(image, 0), pixel(image, 1)] == [(10, 20, 30), (255, 255, 255)]


def test_a_colour_named_transparent_is_laid_on_white() -> None:
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (4, 5, 6))
    image.info["transparency"] = (4, 5, 6)
    assert [pixel(image, 0), pixel(image, 1)] == [(1, 2, 3), (255, 255, 255)]


def test_sixteen_bit_grey_is_scaled_not_cut_off() -> None:
    deep = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)  # 257 = 65535 / 255
    image = Image.fromarray(deep)
    assert image.mode == "I;16"
    assert [pixel(image, x)[0] for x in range(4)] == [0, 1, 128, 255]
    wide = Image.fromarray(deep.astype(np.int32))
    assert wide.mode == "I"
    assert [pixel(wide, x)[0] for x in range(4)] == [0, 1, 128, 255]


def test_values_without_a_known_range_are_refused() -> None:
    with pytest.raises(DataError, match=r"integers from 0 to 70000"):
        to_rgb(Image.fromarray(np.array([[0, 70000]], dtype=np.int32)))
    with pytest.raises(DataError, match=r"floating point values"):
        to_rgb(Image.fromarray(np.zeros((2, 2), dtype=np.float32)))


def test_the_orientation_in_exif_is_applied(tmp_path) -> None:  # type: ignore[no-untyped-def]
    image = Image.new("RGB", (4, 2), (0, 0, 0))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees clockwise to show"
    image.save(tmp_path / "turned.png", exif=exif)
    upright = to_rgb(Image.open(tmp_path / "turned.png"))
    assert upright.size == (2, 4)
    assert upright.getpixel((1, 0)) == (255, 255, 255)  # upper left went to upper right


def test_tensors_have_channels_first() -> None:
    image = Image.new("RGB", (3, 2), (10, 20, 30))
    colour = to_tensor(image, 3)
    assert colour.shape == (3, 2, 3)
    assert colour[:, 0, 0].tolist() == [10, 20, 30]
    # BT.601: 0.299 * 10 + 0.587 * 20 + 0.114 * 30 = 18.15
    assert to_tensor(image, 1).flatten().tolist() == [18] * 6


def test_resizing_keeps_flat_pictures_flat_and_rounds_half_up() -> None:
    flat = torch.full((2, 1, 5, 5), 200, dtype=torch.uint8)
    for size in (3, 5, 9):
        assert (resize(flat, size) == 200).all()
    assert resize(torch.full((1, 1, 4, 4), 127.5), 4).unique().tolist() == [128]
    assert resize(flat, 5) is flat


def test_a_step_is_enlarged_with_the_cubic_kernel_by_hand() -> None:
    # 4 -> 8: samples lie 1/4 and 3/4 between neighbours. Kernel of torch, a = -3/4, at distances
    # 5/4 1/4 3/4 7/4: w = -27/256 225/256 67/256 -9/256. Right of a step 0 0 | 128 128 the sample
    # at x = 2 - 1/4 (neighbours 0 1 2 3) is 128 (w at 1/4 + w at 5/4) = 128 * 198/256 = 99.
    step = torch.tensor([0, 0, 128, 128], dtype=torch.uint8).expand(1, 1, 4, 4)
    row = resize(step, 8)[0, 0, 3].tolist()
    assert row[4] == 99
    assert row[3] == 29  # the mirror sample: 128 - 99
    assert row[0] == 0  # overshoot below black is clipped


def test_chunks_do_not_change_a_resize(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.arange(6 * 49).remainder(256).to(torch.uint8).view(6, 1, 7, 7)
    whole = resize(images, 12)
    monkeypatch.setattr("genscale.data.transforms._CHUNK_VALUES", 200)
    assert torch.equal(resize(images, 12), whole)


def test_a_set_that_would_not_fit_into_memory_is_refused() -> None:
    # 70,000 x 512 x 512 bytes = 17.1 GiB; 4 GiB hold 70,000 pictures of 247 pixels
    images = torch.zeros(1, 1, 28, 28, dtype=torch.uint8).expand(70_000, 1, 28, 28)
    with pytest.raises(ConfigError, match=r"would take 17.1 GiB .* at most 247 pixels"):
        resize(images, 512)
