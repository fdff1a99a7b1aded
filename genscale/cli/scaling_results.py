"""What a scaling study says: means with intervals, curves against every cost, one table."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genscale.report.scaling_page import interval

Z = 1.96  # of a 95 % interval


def write_study(folder: Path, settings: dict[str, Any]) -> str:
    """Write ``study.json`` and ``scaling.html`` from the cells; return the lines to print.

    Args:
        folder: of the study.
        settings: what all cells share.
    """
    from genscale.io.files import write_json
    from genscale.report.scaling_page import write_scaling_report

    cells = [json.loads(file.read_text()) for file in sorted((folder / "cells").glob("*.json"))]
    rows = summarise(cells)
    write_json(folder / "study.json", {"settings": settings, "rows": rows})
    report = write_scaling_report(folder, settings, rows)
    return "\n".join([*table(rows), f"numbers: {folder / 'study.json'}", f"report: {report}"])


def summarise(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row a method and budget, over all seeds.

    A row has for each reward the mean over samples, half the width of its 95 % interval, and the
    same of the difference to the plain sample of the same seed and prompt, which is paired.
    """
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["method"], cell["budget"]), []).append(cell)
    plain = {
        (cell["seed"], each["id"]): each
        for cell in cells
        if cell["method"] == "none"
        for each in cell["samples"]
    }
    rows = []
    for (method, budget), group in sorted(groups.items()):
        samples = [(cell["seed"], each) for cell in group for each in cell["samples"]]
        row: dict[str, Any] = {
            "method": method,
            "budget": budget,
            "seeds": len(group),
            "samples": len(samples),
            "seconds": sum(cell["seconds"] for cell in group) / len(samples),
            "cost": {
                name: sum(each["cost"][name] for _, each in samples) / len(samples)
                for name in samples[0][1]["cost"]
            },
        }
        for kind in ("rewards", "held_out"):
            row[kind] = {}
            for name in samples[0][1][kind]:
                values = [v for _, each in samples if (v := each[kind][name]) is not None]
                if not values:
                    continue
                pairs = [
                    each[kind][name] - plain[seed, each["id"]][kind][name]
                    for seed, each in samples
                    if (seed, each["id"]) in plain
                    and None not in (each[kind][name], plain[seed, each["id"]][kind][name])
                ]
                row[kind][name] = {
                    **dict(zip(("mean", "half"), mean_and_half(values), strict=True)),
                    **dict(zip(("gain", "gain_half"), mean_and_half(pairs), strict=True)),
                }
        rows.append(row)
    return rows


def mean_and_half(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the mean and half the width of its 95 % interval; None where too few are known."""
    count = len(values)
    if count == 0:
        return None, None
    mean = sum(values) / count
    if count == 1:
        return mean, None
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    return mean, Z * math.sqrt(variance / count)


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the study as lines of text."""
    lines = []
    for row in rows:
        told = [f"{row['method']:>16} {row['budget']:>4g}x  nfe {row['cost']['nfe']:8.1f}"]
        for kind in ("rewards", "held_out"):
            for name, value in list(row[kind].items())[: 1 if kind == "rewards" else None]:
                told.append(f"{name} {interval(value)}")
        lines.append("  ".join(told) + f"  {row['seconds']:.3f} s")
    return lines
