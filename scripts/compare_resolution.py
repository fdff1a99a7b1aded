"""Sample a trained run beyond its size with several presets, and measure what becomes of it.

python scripts/compare_resolution.py --run FOLDER --sizes 48 64 96 --presets none entropy sdedit ...
    [--num-samples 100] [--metrics scenes_resolution] [--out FOLDER] [evaluate.py's own overrides]

Runs ``evaluate.py size=... resolution=...`` once for each size and preset, with the same seeds and
prompts, and writes ``table.md`` and, of each size, ``<size>.png``: a row of samples of each preset.
The first row of the table is the trained size. A preset that does not fit the network is named
with its sentence and left out. What ``--out`` holds already is not measured again: the same command
goes on where an interrupted one stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("scene_count", "scene_all", "label_agreement", "fd_patch", "fd_pixels", "seams")


def evaluate(
    run: str, size: int | None, preset: str, options: argparse.Namespace, words: Sequence[str]
) -> dict[str, Any] | str:
    """Return the record of an evaluation, or the sentence by which it was refused."""
    folder = options.out / f"{size or 'trained'}_{preset}"
    record: dict[str, Any]
    if (folder / "metrics.json").exists():
        record = json.loads((folder / "metrics.json").read_text())
        return record
    command = [
        *(sys.executable, str(ROOT / "evaluate.py"), f"run={run}", f"out_dir={folder}"),
        *(f"num_samples={options.num_samples}", f"metrics={options.metrics}"),
        *("save_samples=true", f"resolution={preset}", *words),
        *(() if size is None else (f"size={size}",)),
    ]
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    print(f"{folder.name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    record = json.loads((folder / "metrics.json").read_text())
    return record


def row_of(size: str, preset: str, record: dict[str, Any], names: Sequence[str]) -> str:
    found = {each["name"]: each for each in record["metrics"]}
    cells = [_cell(found[name]) if name in found else "" for name in names]
    cells.append(f"{record['nfe_per_sample']:.0f}")
    cells.append(f"{record['seconds_per_sample']:.2f}")
    return f"| {size} | `{preset}` | " + " | ".join(cells) + " |"


def _cell(metric: dict[str, Any]) -> str:
    text = f"{metric['value']:.3f}" if metric["value"] < 10 else f"{metric['value']:.1f}"
    real = metric["details"].get("real", metric["details"].get("floor"))
    return text if real is None else f"{text} ({real:.2f})"


def draw(size: str, presets: Sequence[str], out: Path, columns: int = 8) -> None:
    """Draw the first samples of every preset, one row each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        len(presets), columns, figsize=(columns, 1.04 * len(presets)), squeeze=False
    )
    for row, preset in zip(axes, presets, strict=True):
        images = np.load(out / f"{size}_{preset}" / "samples.npz")["arr_0"]
        for axis, image in zip(row, images[:columns], strict=False):
            axis.imshow(image.squeeze(), cmap="gray", interpolation="nearest")
        for axis in row:
            axis.set_axis_off()
        row[0].set_title(preset, fontsize=7, loc="left", pad=2)
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.97, 0.04, 0.16)
    figure.savefig(out / f"{size}.png", dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Presets of resolution scaling, side by side.")
    parser.add_argument("--run", required=True)
    parser.add_argument("--sizes", nargs="+", type=int, default=[48, 64, 96])
    parser.add_argument("--presets", nargs="+", default=["none", "entropy", "sdedit", "hiflow"])
    parser.add_argument("--num-samples", type=int, default=100)
    parser.add_argument("--metrics", default="scenes_resolution")
    parser.add_argument("--out", type=Path, default=Path("outputs/compare_resolution"))
    options, words = parser.parse_known_args()
    options.out = options.out.absolute()

    trained = evaluate(options.run, None, "none", options, words)
    if isinstance(trained, str):
        raise SystemExit(trained)
    records = {("trained", "none"): trained}
    refused: list[str] = []
    for size in options.sizes:
        for preset in options.presets:
            record = evaluate(options.run, size, preset, options, words)
            if isinstance(record, str):
                refused.append(f"`{preset}` at {size}: {record}")
            else:
                records[str(size), preset] = record
    found = {each["name"] for record in records.values() for each in record["metrics"]}
    names = [name for name in NAMES if name in found]
    lines = [
        "| size | preset | " + " | ".join(names) + " | evaluations | seconds a picture |",
        "|" + "---|" * (len(names) + 4),
        *(row_of(size, preset, record, names) for (size, preset), record in records.items()),
        "",
        "In brackets: real pictures' own, or the floor of as many real ones.",
        *refused,
    ]
    (options.out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    for size in options.sizes:
        kept = [preset for preset in options.presets if (str(size), preset) in records]
        if kept:
            draw(str(size), kept, options.out)


if __name__ == "__main__":
    main()
