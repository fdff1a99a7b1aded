"""The digits: counts, the split, and how scans become pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from genscale.data.digits import Digits, digits_module
from genscale.errors import ConfigError


def test_the_held_out_split_is_balanced_and_the_rest_is_trained_on() -> None:
    train, heldout = Digits("train", 8), Digits("heldout", 8)
    assert (len(train), len(heldout)) == (1437, 360)
    assert train.labels is not None
    assert heldout.labels is not None
    assert torch.bincount(heldout.labels).tolist() == [36] * 10
    # scikit-learn's 178 182 177 183 181 182 181 179 174 180, less 36 each
    expected = [142, 146, 141, 147, 145, 146, 145, 143, 138, 144]
    assert torch.bincount(train.labels).tolist() == expected


def test_the_splits_together_are_the_source_and_share_no_row() -> None:
    parts = [Digits(split, 8) for split in ("train", "heldout")]
    scans = torch.cat([part.images(range(len(part))) for part in parts]).flatten(1)
    # 8 pixels: no resizing, only 0..16 to 0..255 with a half (8/16 is 127.5) rounded up
    source = np.floor(load_digits().data * (255 / 16) + 0.5).astype(np.uint8)
    assert sorted(map(tuple, scans.tolist())) == sorted(map(tuple, source.tolist()))
    assert 128 in scans


def test_rows_keep_their_label_through_the_split() -> None:
    source = load_digits()
    label_of = {
        tuple(np.floor(scan * (255 / 16) + 0.5).astype(int)): label
        for scan, label in zip(source.data, source.target, strict=True)
    }
    heldout = Digits("heldout", 8)
    assert heldout.labels is not None
    for scan, label in zip(heldout.images(range(360)).flatten(1), heldout.labels, strict=True):
        assert label_of[tuple(scan.tolist())] == int(label)


def test_the_split_never_moves() -> None:
    # the first rows of the source that are held out; a change here changes published numbers
    heldout, source = Digits("heldout", 8), load_digits()
    scans = np.floor(source.data * (255 / 16) + 0.5).astype(np.uint8).tolist()
    found = [scans.index(scan.flatten().tolist()) for scan in heldout.images(range(6))]
    assert found == [2, 4, 11, 17, 25, 27]


@pytest.mark.parametrize(("resolution", "channels"), [(8, 3), (16, 1), (20, 3)])
def test_any_resolution_and_grey_or_colour(resolution: int, channels: int) -> None:
    digits = Digits("heldout", resolution, channels)
    images = digits.images([0, 5, 5])
    assert images.shape == (3, channels, resolution, resolution)
    assert images.dtype == torch.uint8
    assert torch.equal(images[1], images[2])
    assert torch.equal(images[:, :1].expand_as(images), images)
    assert digits.image(5).shape == (channels, resolution, resolution)


def test_a_picture_twice_as_large_averages_back_to_its_scan() -> None:
    small, large = Digits("heldout", 8), Digits("heldout", 32)
    down = torch.nn.functional.avg_pool2d(large.images(range(360)).float(), 4)
    # measured: 11.3 grey levels of sharpening; a grid half a scan pixel off gives 34.7, mirrored
    # pictures 54.6
    assert (down - small.images(range(360)).float()).abs().mean() < 15


def test_the_fingerprint_tells_split_size_and_channels_apart() -> None:
    variants = [Digits("train", 8), Digits("heldout", 8), Digits("train", 9), Digits("train", 8, 3)]
    assert len({variant.fingerprint() for variant in variants}) == 4
    assert Digits("train", 8).fingerprint() == variants[0].fingerprint()
    assert len(variants[0].fingerprint()) == 64


def test_words_outside_the_range_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"split='test' is unknown"):
        Digits("test")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"data.resolution=4 .* Choose 8 to 512"):
        Digits("train", 4)
    with pytest.raises(ConfigError, match=r"data.channels=2 is neither 1"):
        Digits("train", 8, 2)


def test_the_factory_checks_the_number_of_classes() -> None:
    settings = {"resolution": 8, "channels": 1, "flip": False, "num_workers": 0}
    module = digits_module(name="d", num_classes=10, batch_size=4, seed=0, **settings)
    assert (module.name, module.num_classes, module.resolution) == ("d", 10, 8)
    with pytest.raises(ConfigError, match=r"data.num_classes=7, but 'digits' has 10 classes"):
        digits_module(name="d", num_classes=7, batch_size=4, seed=0, **settings)
