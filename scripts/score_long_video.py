"""Judge long videos of moving sprites over time: inside blocks, across their borders, late.

python sample.py run=RUN num_samples=64 sampler.frames=80 format=npz out_dir=FOLDER
python scripts/score_long_video.py FOLDER --block 2 --trained 8 [--plot FILE.png]

Every two neighbouring frames are judged by the tracker of ``data=moving_sprites`` against the
caption. Pairs of one block are compared with pairs of two, in and after the trained length.
Printed are means over videos and pairs, and the ratio of borders to insides.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from genscale.data.sprites.agreement import track_score

RESULTS = ("count", "colour", "shape", "direction", "steady", "all", "mean")

Series = dict[str, NDArray[np.float64]]


def series_of(folder: Path) -> tuple[Series, NDArray[np.int64]]:
    """Return results by name, ``(videos, pairs)``, and the first frame of each pair."""
    record = json.loads((folder / "samples.json").read_text())
    videos = np.load(folder / "samples.npz")["arr_0"]  # (N, T, H, W, 3)
    captions = record["prompts"]
    rows: dict[str, list[tuple[float, ...]]] = {name: [] for name in RESULTS}
    starts: tuple[int, ...] = ()
    for number, video in enumerate(videos):
        clip = torch.from_numpy(video).permute(3, 0, 1, 2)
        caption = captions[number % len(captions)]
        score = track_score(clip, caption, 2, frame_rate=record.get("frame_rate") or 8.0)
        starts = score.starts
        for name in RESULTS:
            rows[name].append(score.series(name))
    return {name: np.array(values) for name, values in rows.items()}, np.array(starts)


def draw(series: Series, starts: NDArray[np.int64], trained: int, path: Path) -> None:
    """Draw the mean of each result against time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 3), constrained_layout=True)
    for name in ("colour", "shape", "direction", "all"):
        axis.plot(starts, np.nanmean(series[name], axis=0), label=name)
    axis.axvline(trained - 1, color="grey", linewidth=0.8, linestyle=":")
    axis.text(trained, 0.02, "trained length", fontsize=8, color="grey")
    axis.set(xlabel="frame", ylabel="as the caption says", ylim=(0, 1.02))
    axis.legend(frameon=False, ncols=4, loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Long videos of sprites over time.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--block", type=int, required=True, help="frames of a block")
    parser.add_argument("--trained", type=int, required=True, help="frames of the trained clips")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()

    series, starts = series_of(args.folder)
    border = (starts + 1) % args.block == 0
    late = starts >= args.trained
    print(f"{'':<10} {'inside':>8} {'borders':>8} {'ratio':>7} {'early':>8} {'late':>8}")
    for name in RESULTS:
        values = np.nanmean(series[name], axis=0)
        inside, across = np.nanmean(values[~border]), np.nanmean(values[border])
        early = np.nanmean(values[~late])
        after = np.nanmean(values[late]) if late.any() else np.nan
        ratio = across / inside if inside else np.nan
        print(f"{name:<10} {inside:8.3f} {across:8.3f} {ratio:7.3f} {early:8.3f} {after:8.3f}")
    if args.plot:
        draw(series, starts, args.trained, args.plot)


if __name__ == "__main__":
    main()
