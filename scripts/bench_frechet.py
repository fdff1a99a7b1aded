"""Time the Frechet distance at FID's size against scipy.linalg.sqrtm, in one run.

OMP_NUM_THREADS=1 python scripts/bench_frechet.py [--dim 2048] [--samples 8192] [--repeats 3]

Prints seconds, the ratio, and the relative difference of the two values. Exits with 1 unless the
values agree to 1e-6 and ours is at least four times as fast.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy
import scipy.linalg
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from genscale.metrics.frechet import FrechetResult, compare_gaussians
from genscale.metrics.moments import Moments

LARGEST_DIFFERENCE = 1e-6
SMALLEST_RATIO = 4.0


def features(count: int, dim: int, seed: int) -> Tensor:
    """Return correlated, rectified features with a spectrum that decays over four decades."""
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    spectrum = torch.logspace(0, -2, dim, dtype=torch.float64)
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mixed = (latent * spectrum) @ mixing / dim**0.5 + 0.1 * latent.roll(1, dims=1)
    rectified: Tensor = (mixed + 0.05 * seed).relu()
    return rectified.float()


def legacy(first: Moments, second: Moments) -> float:
    """Return the distance as the legacy programs compute it."""
    cov_1, cov_2 = first.covariance().numpy(), second.covariance().numpy()
    root = scipy.linalg.sqrtm(cov_1 @ cov_2)
    mean = first.mean.numpy() - second.mean.numpy()
    return float(mean @ mean + np.trace(cov_1) + np.trace(cov_2) - 2 * np.trace(root.real))


def ours(first: Moments, second: Moments) -> FrechetResult:
    return compare_gaussians(first.mean, first.covariance(), second.mean, second.covariance())


def best(action: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    first, second = (
        Moments.of(features(arguments.samples, arguments.dim, seed)) for seed in (1, 2)
    )
    result = ours(first, second)  # also warms the library up
    seconds = best(lambda: ours(first, second), arguments.repeats)
    started = time.perf_counter()
    reference = legacy(first, second)
    legacy_seconds = time.perf_counter() - started
    ratio = legacy_seconds / seconds
    difference = abs(result.value - reference) / abs(reference)
    print(f"d={arguments.dim} n={arguments.samples} threads={torch.get_num_threads()}")
    print(f"genscale            {result.value:.12g}  {seconds:8.2f} s  route {result.route}")
    print(f"scipy {scipy.__version__:<8} sqrtm {reference:.12g}  {legacy_seconds:8.2f} s")
    print(f"ratio {ratio:.2f}x, relative difference {difference:.2e}")
    passed = difference <= LARGEST_DIFFERENCE and ratio >= SMALLEST_RATIO
    print("PASS" if passed else f"FAIL: wanted {LARGEST_DIFFERENCE:g} and {SMALLEST_RATIO:g}x")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
