"""Grids of pictures and reconstructions, and the numbers beside them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from genscale.autoencoders.identity import Identity
from genscale.cli.resolvers import scale_sides
from genscale.data.base import TensorImages
from genscale.errors import ConfigError
from genscale.runs import RunFolder, read_jsonl
from genscale.training.callbacks.log import TrainLog
from genscale.training.callbacks.reconstructions import (
    Reconstructions,
    reconstructed,
    save_pairs,
    some_rows,
)
from genscale.training.run_log import RunLog


class Darker(Identity):
    """An autoencoder that loses a tenth of the light."""

    def __init__(self) -> None:
        super().__init__(latent_channels=1)
        self.share = torch.nn.Parameter(torch.tensor(0.9))

    def decode(self, latents: Tensor) -> Tensor:
        return (latents + 1) * self.share - 1


PICTURES = TensorImages(torch.full((40, 1, 4, 4), 200, dtype=torch.uint8))


def test_rows_are_a_keyed_draw_in_order() -> None:
    rows = some_rows(10, 40).tolist()
    assert rows == sorted(set(rows))
    assert len(rows) == 10
    assert rows != list(range(10))
    assert rows == some_rows(10, 40).tolist()
    assert set(rows) <= set(some_rows(20, 40).tolist())  # more of them, the same ones too


def test_pictures_and_what_is_made_of_them() -> None:
    images, made = reconstructed(Darker(), PICTURES, 5)
    assert images.shape == made.shape == (5, 1, 4, 4)
    assert set(made.flatten().tolist()) == {180}


def test_every_row_of_pictures_stands_above_its_reconstructions(tmp_path: Path) -> None:
    images = torch.full((10, 1, 4, 4), 40, dtype=torch.uint8)
    save_pairs(images, images + 100, tmp_path / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "grid.png").convert("L"))
    column = grid[:, -60]  # through the last picture of a row, which the second pair lacks
    values = [int(v) for v in dict.fromkeys(column.tolist())]
    assert values == [255, 40, 140]
    first = grid[:, 120]  # through the first: four rows
    changes = [int(v) for v in first[np.r_[True, first[1:] != first[:-1]]] if v in (40, 140)]
    assert changes == [40, 140, 40, 140]


def test_grids_and_numbers_come_when_they_are_due(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    log = TrainLog(RunLog(run.metrics_file), every=1, flops_per_sample=0)
    looks = Reconstructions(
        PICTURES,
        run,
        grid_every=2,
        grid_count=6,
        metrics_every=3,
        metrics_count=4,
        log=log,
    )
    trainer: Any = SimpleNamespace(
        is_global_zero=True,
        max_steps=5,
        loggers=[],
        strategy=SimpleNamespace(barrier=lambda name: None),
    )
    for step in range(1, 6):
        module: Any = SimpleNamespace(step=step, samples_seen=8 * step, ema=Darker())
        looks.on_step(trainer, module)
    names = sorted(path.name for path in run.samples_dir.iterdir())
    assert names == [f"step-{step:08d}.png" for step in (2, 4, 5)]
    rows = read_jsonl(run.metrics_file)
    assert [row["step"] for row in rows] == [3, 5]
    # 200 becomes 180: 10 log10(255^2 / 20^2)
    assert rows[0]["eval/psnr"] == pytest.approx(22.1102, abs=1e-4)


@pytest.mark.parametrize(
    ("resolution", "expected"),
    [(16, [1, 2, 4]), (32, [1, 2, 4, 8]), (24, [1, 2, 4, 6]), (4, [1]), (None, None)],
)
def test_scales_follow_from_the_latents(resolution: int | None, expected: Any) -> None:
    assert scale_sides(resolution, 4) == expected


def test_a_resolution_that_does_not_divide() -> None:
    with pytest.raises(ConfigError, match="does not divide"):
        scale_sides(18, 4)
