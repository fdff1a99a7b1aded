"""Features of reference pictures are computed once, and only ever reused for the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from genscale.metrics.features import FeatureNetwork, extract
from genscale.metrics.network_reference import reference_from_images
from genscale.metrics.reference_cache import cache_folder, extract_once


class Counting(FeatureNetwork):
    """Two numbers a picture; counts the pictures it has looked at."""

    name, tap, resize = "counting", "pool", "none"
    taps = {"pool": 2}

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight), requires_grad=False)
        self.seen = 0

    @property
    def sha256(self) -> str:
        return f"{float(self.weight):.3f}"

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        self.seen += len(images)
        values = images.float().flatten(1)
        return {"pool": self.weight * torch.stack((values.mean(1), values.std(1)), dim=1)}


def pictures(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 1, 4, 4), generator=generator, dtype=torch.uint8)


def look(network: Counting, images: Tensor, folder: Path) -> Tensor:
    return extract_once(network, images, ("pool",), batch_size=4, folder=folder)["pool"]


def test_a_second_look_reads_the_same_bits_from_disk(tmp_path: Path) -> None:
    network, images = Counting(), pictures(10)
    first = look(network, images, tmp_path)
    assert torch.equal(first, extract(Counting(), images, ("pool",))["pool"])
    assert torch.equal(look(network, images, tmp_path), first)
    assert network.seen == 10
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]  # no temporary file


@pytest.mark.parametrize("change", ["pictures", "count", "weights"])
def test_whatever_changes_the_numbers_is_computed_anew(tmp_path: Path, change: str) -> None:
    look(Counting(), pictures(10), tmp_path)
    network = Counting(2.0 if change == "weights" else 1.0)
    images = {"pictures": pictures(10, seed=1), "count": pictures(10)[:9]}.get(change, pictures(10))
    found = look(network, images, tmp_path)
    assert network.seen == len(images)
    assert torch.equal(found, extract(network, images, ("pool",))["pool"])


def test_a_damaged_file_is_told_of_and_replaced(tmp_path: Path) -> None:
    first = look(Counting(), pictures(10), tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.warns(UserWarning, match="damaged: features of 10 reference pictures"):
        assert torch.equal(look(Counting(), pictures(10), tmp_path), first)
    network = Counting()
    look(network, pictures(10), tmp_path)
    assert network.seen == 0


def test_a_reference_is_described_alike_with_and_without(tmp_path: Path) -> None:
    images, outside = pictures(12), pictures(8, seed=1)
    plain = reference_from_images(Counting(), images, outside)
    for _ in range(2):
        network = Counting()
        kept = reference_from_images(network, images, outside, cache=tmp_path)
        assert torch.equal(kept.statistics["pool"].covariance, plain.statistics["pool"].covariance)
        assert kept.frechet_floor(8, 0) == plain.frechet_floor(8, 0)
    assert network.seen == 0


def test_the_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GENSCALE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path / "references"
