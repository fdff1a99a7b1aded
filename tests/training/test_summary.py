"""What is told before a run starts."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from rich.console import Console

from genscale.backbones.base import parameter_count
from genscale.backbones.dimr import DiMR
from genscale.training.summary import print_arithmetic, print_model


def console() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, width=200), text


def test_every_part_has_its_row() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [16, 8], "depths": [1, 1], "patch_sizes": [4, 2], "num_heads": 2}
    model = DiMR(input_size=8, in_channels=1, num_classes=2, kernel_sizes=3, **sizes)
    out, text = console()
    print_model(out, model, {"": 2_000_000_000, "stages.0": 500_000_000})
    lines = text.getvalue().splitlines()
    assert "DiMR, input (1, 8, 8)" in lines[0]
    (total,) = [line for line in lines if "total" in line]
    assert f"{parameter_count(model):,}" in total
    assert " 2 " in total  # 2e9 operations are 2 GFLOPs
    (first,) = [line for line in lines if "stages.0" in line]
    assert f"{parameter_count(model.stages[0]):,}" in first
    assert " 0.5 " in first
    (second,) = [line for line in lines if "stages.1" in line]
    assert " - " in second  # not counted: not told as 0


def test_the_batch_is_taken_apart() -> None:
    out, text = console()
    print_arithmetic(
        out,
        batch_size=64,
        world_size=4,
        accumulate=2,
        max_steps=1000,
        data_size=3200,
        run_dir=Path("outputs/a"),
        resume=Path("outputs/a/checkpoints/step-00000010.ckpt"),
    )
    assert text.getvalue().splitlines() == [
        "batch 64 = 4 process(es) x 2 accumulation step(s) x 8 samples; 1,000 steps = 64,000 "
        "samples = 20.0 times the 3,200 training images",
        "results go to outputs/a",
        "continuing from outputs/a/checkpoints/step-00000010.ckpt",
    ]
