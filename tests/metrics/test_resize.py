"""The three resizings of published Inception numbers, on pictures worked out by hand."""

import numpy as np
import torch
from PIL import Image

from genscale.metrics.resize import (
    inception_input,
    resize_pil_bicubic,
    resize_tf1_bilinear,
)
from genscale.rng import integers, key


def _pictures(n: int, side: int) -> torch.Tensor:
    keys = key(1, torch.arange(n * 3 * side * side))
    return integers(keys, 256).view(n, 3, side, side).to(torch.uint8)


def test_tf1_reads_at_i_times_in_over_out_without_half_pixels() -> None:
    row = torch.tensor([0.0, 10.0, 20.0, 30.0]).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    # 4 -> 8: positions 0, 0.5, 1, ... 3.5, the last clamped to the edge
    wide = resize_tf1_bilinear(row, 8)
    assert wide[0, 0, 0].tolist() == [0, 5, 10, 15, 20, 25, 30, 30]
    # 4 -> 2: every second pixel, nothing is averaged
    assert resize_tf1_bilinear(row, 2)[0, 0, 0].tolist() == [0, 20]
    assert torch.equal(resize_tf1_bilinear(row.mT, 8), wide.mT)


def test_tf1_shifts_a_picture_where_half_pixels_do_not() -> None:
    images = _pictures(1, 16)
    tf1 = inception_input(images, "tf1")
    half_pixel = inception_input(images, "pytorch_fid")
    assert tf1.shape == half_pixel.shape == (1, 3, 299, 299)
    assert (tf1 - half_pixel).abs().mean() > 0.02


def test_ranges_of_the_modes() -> None:
    white = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    assert inception_input(white, "tf1").unique().item() == 127 / 128
    assert inception_input(white, "clean").unique().item() == 127 / 128
    half_pixel = inception_input(white, "pytorch_fid")  # interpolation weights sum to 1 +- 1e-7
    torch.testing.assert_close(half_pixel, torch.ones(1, 3, 299, 299), rtol=0, atol=1e-6)


def test_clean_is_pillow_on_each_channel_clipped_and_not_rounded() -> None:
    images = _pictures(2, 20)
    resized = resize_pil_bicubic(images, 9)
    plane = Image.fromarray(images[1, 2].numpy().astype(np.float32))
    expected = np.asarray(plane.resize((9, 9), Image.Resampling.BICUBIC)).clip(0, 255)
    np.testing.assert_array_equal(resized[1, 2].numpy(), expected)
    assert (resized != resized.round()).any()
