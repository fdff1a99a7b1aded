"""Time attention forward and backward in bfloat16 and in float32 on this CPU, a table of both.

    python scripts/bench_attention.py [--threads 1] [--repeats 5]

genscale.layers.attention.attend computes short attention in float32 where training in bfloat16 on a
CPU would be slower. This shows at which lengths that holds here.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from genscale.layers.attention import SHORT

# (B, h, N, M, d): samples, heads, queries, keys, channels of a head
SHAPES = (
    (32, 6, 32, 64, 32),
    (32, 8, 64, 16, 16),
    (32, 6, 64, 64, 32),
    (8, 6, 128, 128, 32),
    (32, 6, 256, 256, 32),
    (4, 6, 1024, 1024, 64),
)


def milliseconds(shape: tuple[int, ...], dtype: torch.dtype, repeats: int) -> float:
    """Return the least time of forward and backward, casts from and to bfloat16 among them."""
    batch, heads, queries, keys, size = shape

    def draw(tokens: int) -> Tensor:
        return torch.randn(batch, heads, tokens, size, dtype=torch.bfloat16, requires_grad=True)

    q, k, v = draw(queries), draw(keys), draw(keys)
    best = float("inf")
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        y = F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype)).bfloat16()
        torch.autograd.backward(y.sum())
        best = min(best, time.perf_counter() - begin)
    return 1e3 * best


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    if given.threads < 1 or given.repeats < 1:
        parser.error("--threads and --repeats must be at least 1")
    torch.set_num_threads(given.threads)
    print(f"torch {torch.__version__}, {given.threads} thread(s); attend: float32 up to {SHORT}")
    print(f"{'B, h, N, M, d':<24} {'bfloat16':>10} {'float32':>10} {'ratio':>6}")
    for shape in SHAPES:
        low, wide = (milliseconds(shape, d, given.repeats) for d in (torch.bfloat16, torch.float32))
        words = ", ".join(map(str, shape))
        print(f"{words:<24} {low:>7.1f} ms {wide:>7.1f} ms {low / wide:>6.2f}", flush=True)


if __name__ == "__main__":
    main()
