"""Measure what a block-causal network remembers, and what a frame costs, as videos grow.

python scripts/bench_long_video.py [--frames 8 16 32 64 128 256] [--cache full rolling semantic]
    [--device cuda] [--plot FILE.png] [--json FILE]

A network with random weights (``model=causal_video`` at 32 pixels) makes one video of every length
with every kind of cache. Printed are the bytes of keys and values that its last state holds, the
most that any state held, and seconds a frame; with ``--plot`` they are drawn. The video itself,
12 KB a frame, grows with its length whatever the cache, and is not counted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from genscale.backbones.causal_video import CausalVideo
from genscale.conditioning.base import Conditioning
from genscale.objectives.diffusion_forcing import DiffusionForcing
from genscale.samplers.base import State
from genscale.samplers.blocks import Blocks

TRAINED, BLOCK = 8, 2


@dataclass(frozen=True)
class Measurement:
    """What a video of one length took with one kind of cache."""

    cache: str
    frames: int
    last_mb: float
    most_mb: float
    seconds_a_frame: float


def held_bytes(memory: Any) -> int:
    """Return the bytes of all tensors in a memory, each storage once."""
    storages: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for each in value.values():
                visit(each)
        elif isinstance(value, (list, tuple)):
            for each in value:
                visit(each)

    visit(memory)
    return sum(storages.values())


@torch.no_grad()
def measure(cache: str, frames: int, *, steps: int, device: torch.device) -> Measurement:
    torch.manual_seed(0)
    model = CausalVideo(
        input_size=(TRAINED, 32, 32),
        patch_size=4,
        hidden_size=192,
        depth=6,
        num_heads=6,
        mlp_size=768,
        block_size=BLOCK,
        cache=cache,
        sink=BLOCK if cache == "rolling" else 0,
    )
    view = DiffusionForcing().view(model.eval().to(device))
    sampler = Blocks(steps=steps, frames=frames, block_size=BLOCK, trained_frames=TRAINED)
    seeds = torch.zeros(1, dtype=torch.int64)
    begin = time.perf_counter()
    state: State = sampler.start(view, Conditioning(), seeds)
    most = 0
    for _ in range(sampler.num_steps):
        state = sampler.advance(view, state)
        most = max(most, held_bytes(state.memory))
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - begin) / frames
    return Measurement(cache, frames, held_bytes(state.memory) / 1e6, most / 1e6, seconds)


def draw(results: list[Measurement], path: Path) -> None:
    """Draw bytes and seconds against the length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    for cache in dict.fromkeys(each.cache for each in results):
        rows = [each for each in results if each.cache == cache]
        lengths = [each.frames for each in rows]
        axes[0].plot(lengths, [each.most_mb for each in rows], marker="o", label=cache)
        axes[1].plot(lengths, [1e3 * each.seconds_a_frame for each in rows], marker="o")
    axes[0].set_ylabel("MB of keys and values, at most")
    axes[1].set_ylabel("milliseconds a frame")
    axes[0].legend(title="cache", frameon=False)
    for each in axes:
        each.set_xlabel("frames of the video")
        each.set_xscale("log", base=2)
        each.set_ylim(bottom=0)
        each.axvline(TRAINED, color="grey", linewidth=0.8, linestyle=":")
        each.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and time of long videos.")
    parser.add_argument("--frames", nargs="+", type=int, default=[8, 16, 32, 64, 128, 256])
    parser.add_argument("--cache", nargs="+", default=["full", "rolling", "semantic"])
    parser.add_argument("--steps", type=int, default=2, help="of each block (default 2)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    results: list[Measurement] = []
    print(f"{'cache':<9} {'frames':>6} {'last MB':>8} {'most MB':>8} {'ms a frame':>10}")
    for cache in args.cache:
        for frames in args.frames:
            row = measure(cache, frames, steps=args.steps, device=torch.device(args.device))
            results.append(row)
            print(
                f"{row.cache:<9} {row.frames:>6} {row.last_mb:>8.2f} {row.most_mb:>8.2f} "
                f"{1e3 * row.seconds_a_frame:>10.1f}",
                flush=True,
            )
    if args.plot:
        draw(results, args.plot)
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in results], indent=2))


if __name__ == "__main__":
    main()
