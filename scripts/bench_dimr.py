"""Compare DiMR's fused feature upsampler with the plain way: time and peak memory.

python scripts/bench_dimr.py [--device cuda] [--batch N] [--dtype bfloat16] [--json FILE]

Measured are the upsampler alone at the shape of DiMR-XL/2R (40 features of width 960 on 256
positions plus the class token -> 4 x 480), in training (forward and backward, a time a sample)
and in sampling (forward, one shared time); and a whole training step with recomputed blocks, as
in the published recipe (DiMR-XL/2R on a GPU, a slim one of the same depth on a CPU). Memory
counts from before the forward pass: weights and inputs are not in it, all gradients are.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from genscale.backbones.dimr import DiMR
from genscale.backbones.dimr_blocks import FeatureUpsampler
from genscale.conditioning.base import Conditioning

NUM_FEATURES, COARSE_SIZE, HIDDEN_SIZE, GRID = 40, 960, 480, 16
SLIM = {"hidden_sizes": [192, 96], "num_heads": 4}


@dataclass(frozen=True)
class Measurement:
    """Seconds a run, and the largest number of bytes alive at once, counted from its start."""

    seconds: float
    bytes: int


def peak_bytes(work: Callable[[], None], device: torch.device) -> int:
    """Return the peak of memory allocated during ``work``, minus what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        work()
    current = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    return peak


def compare(
    works: dict[str, Callable[[], None]], device: torch.device, repeats: int
) -> dict[str, Measurement]:
    """Measure memory once (which also warms up), then time in turns and keep each one's best.

    Taking turns and the best keeps what else the machine does out of the ratio.
    """
    peaks = {name: peak_bytes(work, device) for name, work in works.items()}
    best = dict.fromkeys(works, float("inf"))
    for _ in range(repeats):
        for name, work in works.items():
            best[name] = min(best[name], elapsed(work, device))
    return {name: Measurement(best[name], peaks[name]) for name in works}


def elapsed(work: Callable[[], None], device: torch.device) -> float:
    """Return the seconds that ``work`` takes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def precision(device: torch.device, dtype: str) -> AbstractContextManager[Any]:
    """Return autocast for half-precision types, nothing for float32."""
    if dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, dtype))


def upsampler_work(
    *, fused: bool, training: bool, batch: int, device: torch.device, dtype: str
) -> Callable[[], None]:
    """Return one pass of the upsampler at DiMR-XL/2R's shape, with its backward in training."""
    torch.manual_seed(0)
    module = FeatureUpsampler(NUM_FEATURES, COARSE_SIZE, HIDDEN_SIZE, 2, fused=fused).to(device)
    rows = batch if training else 1
    sizes = [NUM_FEATURES * COARSE_SIZE] * 2 + [HIDDEN_SIZE] * 2
    vectors = [torch.randn(rows, size, device=device).requires_grad_() for size in sizes]
    features = [
        torch.randn(batch, GRID**2 + 1, COARSE_SIZE, device=device).requires_grad_()
        for _ in range(NUM_FEATURES)
    ]
    leaves: list[Tensor] = [*features, *vectors, *module.parameters()]

    def work() -> None:
        with precision(device, dtype), torch.set_grad_enabled(training):
            y = module(features, GRID, GRID, iter(vectors))
        if training:
            torch.autograd.grad(y.float().square().mean(), leaves)

    return work


def training_work(
    *, fused: bool, batch: int, device: torch.device, dtype: str, settings: dict[str, Any]
) -> Callable[[], None]:
    """Return one training step's forward and backward pass of a whole model."""
    torch.manual_seed(0)
    with torch.device(device):
        model: DiMR = DiMR(**settings, fused_upsample=fused, checkpoint_stages=[0, 1])
        x, t = torch.randn(batch, 4, 32, 32), torch.rand(batch) * 8 - 4
        cond = Conditioning(labels=torch.arange(batch))
    leaves = list(model.parameters())

    def work() -> None:
        with precision(device, dtype):
            pyramid = model(x, t, cond).aux["pyramid"]
        loss = torch.stack([prediction.float().square().mean() for prediction in pyramid]).sum()
        torch.autograd.grad(loss, leaves, materialize_grads=True)

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--batch", type=int, help="default: 4 on a CPU, 64 on a GPU")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, help="default: 2 on a CPU, 10 on a GPU")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    arguments = parser.parse_args()
    device: torch.device = arguments.device
    on_cpu = device.type == "cpu"
    batch = arguments.batch or (4 if on_cpu else 64)
    dtype = arguments.dtype or ("float32" if on_cpu else "bfloat16")
    repeats = arguments.repeats or (2 if on_cpu else 10)
    settings = SLIM if on_cpu else {}

    cases: dict[str, Callable[[bool], Callable[[], None]]] = {
        "upsampler, training": lambda fused: upsampler_work(
            fused=fused, training=True, batch=batch, device=device, dtype=dtype
        ),
        "upsampler, sampling": lambda fused: upsampler_work(
            fused=fused, training=False, batch=batch, device=device, dtype=dtype
        ),
        f"training step, {'slim' if on_cpu else 'XL/2R'}": lambda fused: training_work(
            fused=fused, batch=batch, device=device, dtype=dtype, settings=settings
        ),
    }
    print(f"{device}, batch {batch}, {dtype}, {torch.get_num_threads()} threads")
    print(f"{'':<28}{'plain s':>10}{'fused s':>10}{'ratio':>8}", end="")
    print(f"{'plain MB':>12}{'fused MB':>12}{'ratio':>8}")
    results: dict[str, Any] = {}
    for name, make in cases.items():
        found = compare({"plain": make(False), "fused": make(True)}, device, repeats)
        plain, fused = found["plain"], found["fused"]
        time_ratio, memory_ratio = fused.seconds / plain.seconds, fused.bytes / plain.bytes
        print(
            f"{name:<28}{plain.seconds:>10.4f}{fused.seconds:>10.4f}{time_ratio:>8.2f}"
            f"{plain.bytes / 1e6:>12.1f}{fused.bytes / 1e6:>12.1f}{memory_ratio:>8.2f}",
            flush=True,
        )
        results[name] = {
            "plain": asdict(plain),
            "fused": asdict(fused),
            "time_ratio": time_ratio,
            "memory_ratio": memory_ratio,
        }
    if arguments.json:
        header = {"device": str(device), "batch": batch, "dtype": dtype}
        arguments.json.write_text(json.dumps({**header, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
