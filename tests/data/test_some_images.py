"""A part of a data set, and the checks every data set shares."""

from __future__ import annotations

import pytest
import torch

from genscale.data.base import (
    SomeImages,
    TensorImages,
    check_channels,
    check_resolution,
    row_numbers,
)
from genscale.data.module import ImageDataModule, check_num_classes
from genscale.data.transforms import with_channels
from genscale.errors import ConfigError


@pytest.fixture
def images() -> TensorImages:
    pixels = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 1, 4, 4)
    return TensorImages(
        pixels,
        torch.arange(10) // 5,
        class_names=("low", "high"),
        name="steps",
        captions=[f"number {i}" for i in range(10)],
    )


class TestSomeImages:
    def test_rows_in_the_order_given(self, images: TensorImages) -> None:
        part = SomeImages(images, torch.tensor([7, 2, 9]))
        assert len(part) == 3
        assert part.images([0, 2, 0])[:, 0, 0, 0].tolist() == [7, 9, 7]
        assert part.labels is not None
        assert part.labels.tolist() == [1, 0, 1]
        assert part.captions == ["number 7", "number 2", "number 9"]
        assert (part.name, part.class_names, part.resolution) == ("steps", ("low", "high"), 4)

    def test_rows_outside_are_refused(self, images: TensorImages) -> None:
        with pytest.raises(IndexError, match="Row 10 does not exist"):
            SomeImages(images, torch.tensor([10]))
        with pytest.raises(IndexError, match="Row 3 does not exist"):
            SomeImages(images, torch.tensor([1, 2, 3])).images([3])

    def test_another_part_has_another_fingerprint(self, images: TensorImages) -> None:
        parts = [[1, 2], [2, 1], [1, 3], [1, 2, 3]]
        prints = {SomeImages(images, torch.tensor(rows)).fingerprint() for rows in parts}
        assert len(prints | {images.fingerprint()}) == 5
        again = SomeImages(images, torch.tensor([1, 2])).fingerprint()
        assert again in prints


class TestLimit:
    def test_a_keyed_draw(self, images: TensorImages) -> None:
        drawn = [ImageDataModule(images, batch_size=2, limit=4, seed=s).train for s in (0, 0, 1)]
        rows = [part.images(range(4))[:, 0, 0, 0].tolist() for part in drawn]
        assert len(set(rows[0])) == 4
        assert rows[0] == rows[1] != rows[2]

    def test_the_stream_holds_the_part_only(self, images: TensorImages) -> None:
        module = ImageDataModule(images, batch_size=4, limit=4)
        batches = iter(module.train_dataloader())
        seen = [sorted(next(batches)["image"][:, 0, 0, 0].tolist()) for _ in range(3)]
        assert seen[0] == seen[1] == seen[2]  # one batch, by heart

    @pytest.mark.parametrize("limit", [0, 11])
    def test_out_of_range(self, images: TensorImages, limit: int) -> None:
        with pytest.raises(ConfigError, match=rf"data\.limit={limit} is outside 1 to 10"):
            ImageDataModule(images, batch_size=2, limit=limit)


class TestChecks:
    def test_rows_count_from_zero(self) -> None:
        assert row_numbers([0, 2, 2], 3).tolist() == [0, 2, 2]
        with pytest.raises(IndexError, match="Row -1 does not exist: the data set has rows 0 to 2"):
            row_numbers([-1], 3)

    def test_resolution(self) -> None:
        check_resolution(8, 8, 512, "the digits")
        with pytest.raises(ConfigError, match=r"resolution=7.*the digits\. Choose 8 to 512"):
            check_resolution(7, 8, 512, "the digits")

    def test_channels(self) -> None:
        check_channels(3)
        with pytest.raises(ConfigError, match=r"data\.channels=2 is neither 1"):
            check_channels(2)

    def test_number_of_classes(self, images: TensorImages) -> None:
        check_num_classes(images, None)
        check_num_classes(images, 2)
        with pytest.raises(ConfigError, match=r"'steps' has 2 classes\. Set data\.num_classes=2"):
            check_num_classes(images, 3)

    def test_grey_shown_in_colour_is_not_copied(self) -> None:
        grey = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4)
        colour = with_channels(grey, 3)
        assert colour.shape == (1, 3, 4, 4)
        assert colour.data_ptr() == grey.data_ptr()
