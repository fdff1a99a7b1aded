"""Deliver a video as a small one and a few networks fitted to its patches, and say what is left.

python scripts/overfit_video.py VIDEO OUT [--scale 2] [--chunks 2] [--grid 4 4] [--epochs 50] \
    [--general RUN|FOLDER|FILE|bicubic] [--joint] [--hidden-size 32] [--blocks 16] [--frames 16]

VIDEO is a video file, an animated picture, an array or a folder of frames. Patches are sorted by
how well a general upscaler restores them (arXiv:2303.08331) and cut into chunks of like difficulty;
every chunk gets a WDSR. OUT receives the small frames as PNG, the networks, and which patch belongs
to which; what is printed is computed from these files. A general upscaler that is a WDSR of these
sizes is where the networks start; else they start as bicubic interpolation.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from genscale.cli.failures import report
from genscale.data.video_reader import open_video
from genscale.errors import DataError
from genscale.io.files import atomic_write, write_json
from genscale.io.images import save_png
from genscale.upscaling.base import Upscaler
from genscale.upscaling.iarn import resized
from genscale.upscaling.interpolation import Interpolation
from genscale.upscaling.loading import load_upscaler
from genscale.upscaling.overfitting import (
    Overfit,
    chunks_by_difficulty,
    cut_patches,
    fit_chunks,
    join_patches,
    pooled_psnr,
    squared_errors,
    upscale_chunks,
)
from genscale.upscaling.wdsr import WDSR

_MODELS, _INDEX = "models.safetensors", "index.json"


def read_frames(path: Path, count: int | None, grid: tuple[int, int], scale: int) -> Tensor:
    """Return frames ``(T, 3, H, W)`` in [0, 1], cropped so that small patches have whole sides."""
    with open_video(path) as reader:
        info = reader.info
        total = max(1, round(info.duration * info.frame_rate))
        times = [(i + 0.5) / info.frame_rate for i in range(min(total, count or total))]
        frames = reader.frames([min(t, info.duration * (1 - 1e-9)) for t in times])
    height, width = (
        side - side % (parts * scale) for side, parts in zip(frames.shape[2:], grid, strict=True)
    )
    if min(height, width) == 0:
        raise DataError(
            f"Frames of {frames.shape[2]}x{frames.shape[3]} are too small for a grid of "
            f"{grid[0]}x{grid[1]} patches at scale {scale}. Give a smaller grid."
        )
    return frames[:, :, :height, :width].float() / 255.0


def builder(general: Upscaler, arguments: argparse.Namespace) -> Any:
    """Return what makes the network that a chunk starts from."""
    sizes = {
        "scale": arguments.scale,
        "hidden_size": arguments.hidden_size,
        "num_blocks": arguments.blocks,
    }
    if isinstance(general, WDSR) and all(general.config[k] == v for k, v in sizes.items()):
        trained = copy.deepcopy(general).requires_grad_(True)
        return partial(copy.deepcopy, trained)
    return partial(WDSR, start="bicubic", **sizes)


@torch.no_grad()
def upscaled(network: Upscaler, patches: Tensor, scale: int) -> Tensor:
    """Return patches upscaled by one network, within [0, 1]."""
    return torch.cat([network(part, scale).clamp(0.0, 1.0) for part in torch.split(patches, 64)])


def write(out: Path, small: Tensor, weights: dict[str, Tensor], index: dict[str, Any]) -> None:
    """Write what is delivered."""
    for number, frame in enumerate(small):
        levels = torch.round(frame.clamp(0.0, 1.0) * 255.0).to(torch.uint8)
        save_png(out / "small" / f"{number:05d}.png", levels.cpu())
    with atomic_write(out / _MODELS) as temporary:
        save_file({name: w.cpu().contiguous() for name, w in weights.items()}, temporary)
    write_json(out / _INDEX, index)


def read_small(out: Path, count: int) -> Tensor:
    """Return the small frames as their files have them."""
    from PIL import Image

    frames = []
    for number in range(count):
        with Image.open(out / "small" / f"{number:05d}.png") as image:
            frames.append(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))
    return torch.stack(frames).float() / 255.0


def make(arguments: argparse.Namespace) -> dict[str, float]:
    grid, scale = (arguments.grid[0], arguments.grid[1]), arguments.scale
    frames = read_frames(arguments.video, arguments.frames, grid, scale)
    shown = (frames.shape[2], frames.shape[3])
    small = resized(frames, (shown[0] // scale, shown[1] // scale)).clamp(0.0, 1.0)
    small = torch.round(small * 255.0) / 255.0
    low = cut_patches(small, grid).to(arguments.device)
    high = cut_patches(frames, grid).to(arguments.device)
    if arguments.general == "bicubic":
        general: Upscaler = Interpolation(space="pixel", channels=3, scales=[scale])
    else:
        general, _ = load_upscaler(arguments.general)
    torch.nn.Module.to(general.eval(), arguments.device)
    before = squared_errors(upscaled(general, low, scale), high)
    chunk = chunks_by_difficulty(before, arguments.chunks)
    how = Overfit(
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        lr=arguments.lr,
        joint=arguments.joint,
        seed=arguments.seed,
    )
    torch.manual_seed(arguments.seed)  # initial weights; the order of patches is keyed
    build = builder(general, arguments)
    begin = time.perf_counter()
    weights = fit_chunks(build, low, high, chunk, how)
    seconds = time.perf_counter() - begin
    index = {"scale": scale, "grid": list(grid), "chunk": chunk.tolist(), "size": list(shown)}
    write(arguments.out, small, weights, index)

    network = torch.nn.Module.to(build().requires_grad_(False), arguments.device)
    kept = {name: w.to(arguments.device) for name, w in load_file(arguments.out / _MODELS).items()}
    delivered = cut_patches(read_small(arguments.out, len(frames)), grid).to(arguments.device)
    made = upscale_chunks(network, kept, delivered, chunk)
    after = squared_errors(torch.round(made * 255.0) / 255.0, high)
    for number, frame in enumerate(join_patches(made, grid)):
        save_png(arguments.out / "made" / f"{number:05d}.png", frame.cpu() * 2 - 1)
    print(f"{'chunk':<8}{'patches':>8}{'general':>10}{'fitted':>10}   PSNR of RGB in dB")
    for number in range(arguments.chunks):
        mine = chunk == number
        print(
            f"{number:<8}{int(mine.sum()):>8}{float(pooled_psnr(before[mine])):>10.2f}"
            f"{float(pooled_psnr(after[mine])):>10.2f}"
        )
    found = {
        "psnr_general": float(pooled_psnr(before)),
        "psnr": float(pooled_psnr(after)),
        "seconds": seconds,
        "parameters": float(sum(w.numel() for w in weights.values())),
    }
    print(
        f"{'all':<8}{len(chunk):>8}{found['psnr_general']:>10.2f}{found['psnr']:>10.2f}   "
        f"fitted in {seconds:.0f} s, {int(found['parameters']):,} parameters"
    )
    write_json(arguments.out / "summary.json", found)
    return found


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("video", type=Path, help="a video, an array, or a folder of frames")
    parser.add_argument("out", type=Path, help="folder for what is delivered")
    parser.add_argument("--general", default="bicubic", help="run, folder or file; bicubic")
    parser.add_argument("--scale", type=int, default=2)
    parser.add_argument("--chunks", type=int, default=2)
    parser.add_argument("--grid", type=int, nargs=2, default=[4, 4], help="rows and columns")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--joint", action="store_true", help="one network, hard patches more often")
    parser.add_argument("--hidden-size", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--frames", type=int, help="only so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    try:
        make(parser.parse_args(words))
    except Exception as error:
        return report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
