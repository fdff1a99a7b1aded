"""Compare our DiT with diffusers' and LaMamba with DiT: how fast, and how cost grows with the grid.

python scripts/bench_backbones.py [--device cuda] [--batch N] [--repeats N] [--image FILE]

First part: DiT-S/2 on latents of 32, ours and diffusers' DiTTransformer2DModel with the same
weights and inputs; a forward pass, forward and backward, and a training step (with AdamW), without
drop-out of classes. float32 on a CPU; on a GPU bfloat16 autocast, plain and compiled. diffusers
keeps a copy of the time and class embedding in every block, which its optimizer has to step too.
Two numbers of it differ from the official program's and are set right before outputs are compared:
its sinusoid divides by 127, not 128, and its second norm has eps 1e-5, not 1e-6.

Second part (CPU, one thread): DiT and LaMamba of equally many parameters on patches of side 1, time
a sample as the grid grows from 16 to 64 cells a side, with the exponents of the number of tokens
over the upper half of the range; drawn with --image.

Times are the best of several runs that take turns; on one thread of a CPU they are processor time,
which other programs disturb less. Exits with 1 where ours takes more than 1.05 times as long as
diffusers', or where outputs differ.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from genscale.backbones.base import Backbone, parameter_count
from genscale.backbones.dit import DiT
from genscale.backbones.lamamba import LaMamba
from genscale.conditioning.base import Conditioning
from genscale.io.converters.dit import diffusers_config, to_diffusers
from scripts.bench_scan import best_in_turns

SLOWEST = 1.05  # ours over diffusers'
CLOSEST = 1e-4  # of outputs of size 1, in float32
SIZE = {"hidden_size": 384, "depth": 12, "num_heads": 6, "learn_sigma": True}
GRIDS = (16, 24, 32, 48, 64)
FITTED_FROM = 32  # smaller grids are ruled by fixed costs

Forward = Callable[[], Tensor]


def pair(device: torch.device) -> tuple[DiT, nn.Module]:
    """Return our DiT-S/2 with random weights, and diffusers' with the same, both in eval mode."""
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    torch.manual_seed(0)
    ours: DiT = DiT(**SIZE)
    with torch.no_grad():  # a fresh network predicts zero
        for parameter in ours.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    theirs = DiTTransformer2DModel(**diffusers_config(ours.config))
    theirs.load_state_dict(to_diffusers(ours.state_dict(), ours.config))
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6
    nn.Module.to(ours, device)
    return ours.eval(), theirs.eval().to(device)


def forwards(
    ours: nn.Module, theirs: nn.Module, batch: int, device: torch.device
) -> dict[str, Forward]:
    """Return both forward passes of one batch; the names are the rows of the table."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, 32, 32, generator=generator).to(device)
    t = torch.randint(1000, (batch,), generator=generator).float().to(device)
    labels = torch.arange(batch, device=device)

    def run_ours() -> Tensor:
        output = ours(x, t, Conditioning(labels=labels))
        return torch.cat((output.sample, output.aux["variance"]), dim=1)

    def run_theirs() -> Tensor:
        sample: Tensor = theirs(x, timestep=t, class_labels=labels).sample
        return sample

    return {"ours": run_ours, "diffusers": run_theirs}


def sampling_work(forward: Forward, device: torch.device) -> None:
    with autocast(device), torch.inference_mode():
        forward()
    finish(device)


def training_work(
    forward: Forward, optimizer: torch.optim.Optimizer, device: torch.device, *, step: bool
) -> None:
    with autocast(device):
        loss = forward().float().square().mean()
    torch.autograd.backward(loss)
    if step:
        optimizer.step()
    optimizer.zero_grad()
    finish(device)


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    if device.type == "cpu":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def clock(device: torch.device) -> Callable[[], float]:
    """Return processor time where one thread does it all, else the time that passes."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare_with_diffusers(batch: int, device: torch.device, repeats: int) -> bool:
    """Print times, ratios and the largest difference; return whether the aims are met."""
    ours, theirs = pair(device)
    with torch.inference_mode():
        both = [run() for run in forwards(ours, theirs, batch, device).values()]
    difference = float((both[0] - both[1]).abs().max())
    size = float(both[1].abs().max())
    print(f"DiT-S/2, batch {batch}, {device}, {torch.get_num_threads()} threads")
    print(f"largest difference of outputs: {difference:.2e}, of size {size:.2f}")
    passed = difference <= CLOSEST * max(size, 1.0)
    print(f"{'':<28}{'ours ms':>12}{'diffusers ms':>14}{'ratio':>8}")
    for compiled in (False, True) if device.type == "cuda" else (False,):
        networks: list[Any] = [torch.compile(net) if compiled else net for net in (ours, theirs)]
        runs = forwards(networks[0], networks[1], batch, device)
        suffix = ", compiled" if compiled else ""
        optimizers = [
            torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True) for net in (ours, theirs)
        ]
        works: dict[str, dict[str, Callable[[], None]]] = {
            "forward": {name: partial(sampling_work, run, device) for name, run in runs.items()}
        }
        for row, step in (("forward and backward", False), ("training step", True)):
            works[row] = {
                name: partial(training_work, run, optimizer, device, step=step)
                for (name, run), optimizer in zip(runs.items(), optimizers, strict=True)
            }
        for row, pairs in works.items():
            passed &= _row(f"{row}{suffix}", best_in_turns(pairs, repeats, clock(device)))
    return passed


def _row(name: str, seconds: dict[str, float]) -> bool:
    ratio = seconds["ours"] / seconds["diffusers"]
    print(
        f"{name:<28}{seconds['ours'] * 1e3:>12.1f}{seconds['diffusers'] * 1e3:>14.1f}{ratio:>8.3f}",
        flush=True,
    )
    return ratio <= SLOWEST


def grown(grid: int) -> dict[str, Backbone]:
    """Return both networks for a grid; at 16 they have equally many parameters within 3 %."""
    torch.manual_seed(0)
    shared: dict[str, Any] = {"input_size": grid, "num_classes": 10, "patch_size": 1}
    lamamba = LaMamba(
        **shared,
        hidden_sizes=[16, 32, 64, 64],
        depths=[1, 1, 1, 1],
        bottleneck_depth=1,
        num_heads=2,
        window_size=4,
    )
    return {
        "DiT": DiT(**shared, hidden_size=96, depth=6, num_heads=4).eval(),
        "LaMamba": lamamba.eval(),
    }


def growth(repeats: int) -> dict[str, list[float]]:
    """Return seconds a sample of both networks on all grids, best of ``repeats``, one thread."""
    seconds: dict[str, list[float]] = {}
    sizes = {name: parameter_count(net) for name, net in grown(GRIDS[0]).items()}
    print("\nparameters: " + ", ".join(f"{name} {count:,}" for name, count in sizes.items()))
    print(f"{'grid':>6}{'tokens':>8}{'DiT ms':>12}{'LaMamba ms':>12}{'ratio':>8}")
    for grid in GRIDS:
        x, t = torch.randn(1, 4, grid, grid), torch.full((1,), 0.5)
        cond = Conditioning(labels=torch.zeros(1, dtype=torch.int64))

        works: dict[str, Callable[[], None]] = {
            name: partial(_once, network, x, t, cond) for name, network in grown(grid).items()
        }
        for name, value in best_in_turns(works, repeats, clock(torch.device("cpu"))).items():
            seconds.setdefault(name, []).append(value)
        dit, lamamba = seconds["DiT"][-1], seconds["LaMamba"][-1]
        print(
            f"{grid:>6}{grid * grid:>8}{dit * 1e3:>12.1f}{lamamba * 1e3:>12.1f}"
            f"{dit / lamamba:>8.2f}",
            flush=True,
        )
    for name, values in seconds.items():
        print(f"{name}: time ~ tokens^{exponent(values):.2f} from grid {FITTED_FROM}")
    return seconds


def _once(network: Backbone, x: Tensor, t: Tensor, cond: Conditioning) -> None:
    with torch.inference_mode():
        network(x, t, cond)


def exponent(seconds: list[float]) -> float:
    """Return the slope of log time by log tokens, by least squares over the larger grids."""
    points = [
        (2.0 * math.log(grid), math.log(value))
        for grid, value in zip(GRIDS, seconds, strict=True)
        if grid >= FITTED_FROM
    ]
    x_mean, y_mean = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = math.fsum((x - x_mean) ** 2 for x, _ in points)
    return math.fsum((x - x_mean) * (y - y_mean) for x, y in points) / spread


def draw(seconds: dict[str, list[float]], path: Path) -> None:
    """Draw time by tokens on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tokens = [grid * grid for grid in GRIDS]
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for (name, values), color in zip(seconds.items(), ("#c44e52", "#4c72b0"), strict=True):
        label = f"{name}: tokens$^{{{exponent(values):.2f}}}$"
        axes.plot(tokens, [1e3 * value for value in values], "o-", color=color, label=label)
        power = 1 if name == "LaMamba" else 2  # of the guide that ends where the curve does
        guide = [1e3 * values[-1] * (count / tokens[-1]) ** power for count in tokens[2:]]
        text = "linear" if power == 1 else "quadratic"
        axes.plot(tokens[2:], guide, ":", color=color, alpha=0.7, label=text)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="tokens (grid from 16 x 16 to 64 x 64)",
        ylabel="ms a sample, forward, one CPU thread",
        title="Networks of 1 M parameters, patches of side 1",
    )
    axes.set_xticks(tokens, [str(count) for count in tokens])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(title=f"exponents from grid {FITTED_FROM}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--batch", type=int, help="default: 4 on a CPU, 64 on a GPU")
    parser.add_argument("--repeats", type=int, default=15, help="runs, of which the best counts")
    parser.add_argument("--image", type=Path, help="draw the second part here (PNG)")
    arguments = parser.parse_args()
    batch = arguments.batch or (4 if arguments.device.type == "cpu" else 64)
    passed = compare_with_diffusers(batch, arguments.device, arguments.repeats)
    torch.set_num_threads(1)
    seconds = growth(arguments.repeats)
    if arguments.image:
        draw(seconds, arguments.image)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
