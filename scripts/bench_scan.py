"""Compare the selective scan with plain ways to write it: forward and backward time on one thread.

python scripts/bench_scan.py [--width 256] [--states 16] [--repeats 3]

Three ways: ``chunked`` is genscale's default; ``loop`` walks through time-first tensors with plain
autograd (its reference implementation); ``plain`` transcribes the formula with channels first and
indexes the time axis, whose backward pass is quadratic in the length. Prints milliseconds, the
speed-up at 1024 steps and the growth of ``chunked`` from 256 to 4096 steps, and exits with 1 when
one of them misses its aim: 5 times ``plain``, 2 times ``loop``, growth by 26 (16 is linear).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from genscale.layers.scan import selective_scan

AIMS = {"plain": 5.0, "loop": 2.0}
GROWTH = 26.0


def plain_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
) -> Tensor:
    """Return the scan's output, written as one would first; shapes as in ``selective_scan``."""
    step = F.softplus(delta + delta_bias[:, None])
    decay = torch.exp(torch.einsum("bdl,dn->bdln", step, A))
    drive = torch.einsum("bdl,bnl,bdl->bdln", step, B, u)
    state, outputs = torch.zeros_like(decay[:, :, 0]), []
    for t in range(u.shape[2]):
        state = decay[:, :, t] * state + drive[:, :, t]
        outputs.append(torch.einsum("bdn,bn->bd", state, C[:, :, t]))
    return (torch.stack(outputs, dim=2) + D[:, None] * u) * F.silu(z)


def inputs(width: int, states: int, length: int) -> dict[str, Tensor]:
    """Return random arguments, with rates and steps as Mamba starts with."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    values = {
        "u": draw(1, width, length),
        "delta": 0.1 * draw(1, width, length),
        "A": -torch.arange(1.0, states + 1).repeat(width, 1),
        "B": draw(1, states, length),
        "C": draw(1, states, length),
        "D": torch.ones(width),
        "z": draw(1, width, length),
        "delta_bias": torch.full((width,), -4.6),  # softplus gives a step of 0.01
    }
    return {name: value.requires_grad_() for name, value in values.items()}


def chunked(values: dict[str, Tensor]) -> Tensor:
    return selective_scan(**values, delta_softplus=True)[0]  # type: ignore[arg-type]


def loop(values: dict[str, Tensor]) -> Tensor:
    return selective_scan(**values, delta_softplus=True, implementation="reference")[0]  # type: ignore[arg-type]


def plain(values: dict[str, Tensor]) -> Tensor:
    return plain_scan(**values)


def work(way: Callable[[dict[str, Tensor]], Tensor], values: dict[str, Tensor]) -> None:
    torch.autograd.grad(way(values).square().mean(), list(values.values()))


def best_in_turns(
    works: dict[str, Callable[[], None]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Return the least seconds of each, after a call that warms up.

    Taking turns and the best keeps what else the machine does out of the ratios.
    """
    best = dict.fromkeys(works, float("inf"))
    for turn in range(repeats + 1):
        for name, function in works.items():
            start = clock()
            function()
            if turn:
                best[name] = min(best[name], clock() - start)
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=256, help="channels D")
    parser.add_argument("--states", type=int, default=16, help="numbers of state N a channel")
    parser.add_argument("--repeats", type=int, default=5, help="runs, of which the best counts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    def jobs(*ways: Callable[[dict[str, Tensor]], Tensor], length: int) -> dict[str, Any]:
        values = inputs(arguments.width, arguments.states, length)
        return {f"{way.__name__} L={length}": partial(work, way, values) for way in ways}

    print(f"D={arguments.width} N={arguments.states}, batch 1, float32, forward and backward")
    seconds = best_in_turns(
        {
            **jobs(chunked, length=256),
            **jobs(chunked, loop, length=1024),
            **jobs(chunked, length=4096),
        },
        arguments.repeats,
    )
    seconds |= best_in_turns(jobs(plain, length=1024), 1)  # takes seconds
    for name, value in seconds.items():
        print(f"{name:<16}{value * 1e3:9.1f} ms")
    passed = True
    for name, aim in AIMS.items():
        ratio = seconds[f"{name} L=1024"] / seconds["chunked L=1024"]
        passed &= ratio >= aim
        print(f"{name} / chunked at L=1024: {ratio:.1f} (aim: at least {aim:g})")
    growth = seconds["chunked L=4096"] / seconds["chunked L=256"]
    print(f"chunked, L=4096 / L=256: {growth:.1f} (aim: at most {GROWTH:g})")
    return 0 if passed and growth <= GROWTH else 1


if __name__ == "__main__":
    sys.exit(main())
