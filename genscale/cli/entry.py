"""Entry points of the three commands, for the scripts in the repository and the installed ones."""

from __future__ import annotations

from genscale.cli.app import main


def train() -> int:
    """``genscale-train``, ``python train.py``."""
    return main("train", "genscale.cli.train:run")


def sample() -> int:
    """``genscale-sample``, ``python sample.py``."""
    return main("sample", "genscale.cli.sample:run")


def evaluate() -> int:
    """``genscale-evaluate``, ``python evaluate.py``."""
    return main("evaluate", "genscale.cli.evaluate:run")
