"""What samples of another size than the data's are compared with."""

from __future__ import annotations

import pytest
import torch

from genscale.data.base import TensorImages
from genscale.data.module import ImageDataModule
from genscale.data.scenes.dataset import Scenes
from genscale.errors import DataError
from genscale.evaluation import fit_reference
from genscale.metrics.pixels import Pixels
from genscale.metrics.suite import EvaluationSuite


def scenes() -> ImageDataModule:
    return ImageDataModule(Scenes(12), Scenes(6, split="heldout"), batch_size=2)


def squares() -> ImageDataModule:
    pixels = torch.randint(0, 256, (40, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    return ImageDataModule(TensorImages(pixels.to(torch.uint8), name="squares"), batch_size=2)


def suite() -> EvaluationSuite:
    return EvaluationSuite(["fd_pixels"], [Pixels(2)])


def test_data_that_can_be_drawn_are_drawn_at_the_size_of_the_samples() -> None:
    measured, data = suite(), scenes()
    fit_reference(measured, data, (32, 48))
    measured.update(data.train.images_at(range(12), (32, 48)))
    (value,) = measured.compute()
    assert value.value == pytest.approx(0.0, abs=1e-9)
    assert measured.patch is None
    assert value.protocol is not None
    assert value.protocol.reference == "scenes-32x48-train"
    usual = suite()
    fit_reference(usual, data, (32, 32))
    usual.update(data.train.images(range(12)))
    (other,) = usual.compute()
    assert other.protocol is not None
    assert other.protocol.reference == "scenes-32-train"
    assert other.protocol.reference_sha256 == data.train.fingerprint()
    assert other.protocol.reference_sha256 != value.protocol.reference_sha256


def test_else_patches_of_the_samples_are_compared_with_the_data_as_they_are() -> None:
    measured, data = suite(), squares()
    fit_reference(measured, data, (16, 8))
    assert measured.patch == (8, 8)
    stacked = data.train.images(range(40)).unflatten(0, (20, 2)).transpose(1, 2).flatten(2, 3)
    measured.update(stacked)
    (value,) = measured.compute()
    assert value.value == pytest.approx(0.0, abs=1e-9)
    assert value.protocol is not None
    assert value.protocol.features == "pixels_2x2 of 8x8 patches"
    assert value.protocol.reference == "squares-8-train"
    with pytest.raises(DataError, match=r"Samples of 6x16 pixels .* have 8x8 and cannot be had"):
        fit_reference(suite(), data, (6, 16))
