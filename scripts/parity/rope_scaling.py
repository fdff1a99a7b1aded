"""Parity of scaled rotary tables: Lumina-Next's by time, I-Max's with its bound."""

from __future__ import annotations

import math

import torch

from genscale.resolution.rotary import axis_angles, axis_frequencies, grid_angles
from scripts.parity import Case, Comparison


def run(case: Case) -> list[Comparison]:
    """Compare every table the case holds."""
    results: list[Comparison] = []
    for name, expected in case.group("output").items():
        if name.startswith("lumina_t"):
            time, part = name.removeprefix("lumina_t").rsplit("_", 1)
            settings = case.config["lumina"]
            frequencies = axis_frequencies(
                settings["dim"] // 2,  # channels of one of two axes
                scale=settings["scale_factor"],
                variant="time_aware",
                theta=settings["theta"],
                time=float(time),
                watershed=settings["scale_watershed"],
            )
            places = torch.arange(settings["end"])
            angles = grid_angles(places, places, frequencies, alternate=True)
        elif name.startswith("imax_"):
            part, settings = name.removeprefix("imax_"), case.config["imax"]
            places = case.group("input")["imax_pos"]
            cells = places.shape[-1] - settings["text_tokens"]
            frequencies = axis_frequencies(
                settings["dim"],
                scale=math.sqrt(cells / settings["native_tokens"]),
                variant="ntk_clip",
                theta=settings["theta"],
                ntk=settings["ntk_factor"],
            )
            angles = axis_angles(places, frequencies)
        else:
            raise KeyError(f"The case holds output/{name}, which this adapter does not know.")
        got = angles.cos() if part in ("real", "cos") else angles.sin()
        results.append(case.compare(name, got.float(), expected))
    return results
