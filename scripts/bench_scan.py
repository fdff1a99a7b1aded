"""Compare the selective scan with plain ways to write it: forward and backward time.

python scripts/bench_scan.py [--width 256] [--states 16] [--repeats 5] [--device cpu]

On one thread of a CPU there are three ways: ``chunked`` is genscale's default there; ``loop`` walks
through time-first tensors with plain autograd (its reference implementation); ``plain`` transcribes
the formula with channels first and indexes the time axis, whose backward pass is quadratic in the
length. Prints milliseconds, the speed-up at 1024 steps and the growth of ``chunked`` from 256 to
4096 steps, and exits with 1 when one of them misses its aim: 5 times ``plain``, 2 times ``loop``,
growth by 26 (16 is linear).

``--device cuda`` times the Triton kernel, torch operations (``chunked``) and mamba_ssm, where its
operator is installed, on scans as large as LaMamba-XL's, beside the time that moving their inputs
and outputs once takes at the bandwidth of a copy on this device: no kernel can be faster.
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
from genscale.layers.scan.backends import mamba_obstacle, triton_obstacle

# batch, channels (four directions of E), steps, numbers of state: LaMamba-XL's stages at 256
# and 512 pixels, and a Mamba-1 block
CUDA_SIZES = ((32, 2560, 1024, 1), (32, 5120, 256, 1), (8, 2560, 4096, 1), (8, 2048, 2048, 16))
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


def cuda_seconds(function: Callable[[], Any], repeats: int) -> float:
    """Return the least seconds of a call on the device, after three that warm up."""
    best = float("inf")
    for turn in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        function()
        end.record()
        end.synchronize()
        if turn >= 3:
            best = min(best, start.elapsed_time(end) / 1e3)
    return best


def copy_bandwidth(repeats: int) -> float:
    """Return bytes a second that a copy of half a gigabyte reads and writes."""
    source = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / cuda_seconds(lambda: target.copy_(source), repeats)


def measure_cuda(repeats: int) -> int:
    """Print a table of all sizes; return 1 where the kernel is slower than torch operations."""
    bandwidth = copy_bandwidth(repeats)
    print(f"{torch.cuda.get_device_name()}: a copy moves {bandwidth / 1e9:.0f} GB/s")
    print("B, D, L, N; bfloat16 inputs; milliseconds, and multiples of the least possible")
    slower = False
    for batch, channels, length, states in CUDA_SIZES:
        generator = torch.Generator("cuda").manual_seed(0)

        def draw(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

        values = {
            "u": draw(batch, channels, length),
            "delta": draw(batch, channels, length) - 4.6,
            "A": -torch.arange(1.0, states + 1, device="cuda").repeat(channels, 1),
            "B": draw(batch, 4, states, length),
            "C": draw(batch, 4, states, length),
            "D": torch.ones(channels, device="cuda"),
        }
        values = {name: value.requires_grad_() for name, value in values.items()}
        obstacles = {
            "triton": triton_obstacle("cuda", double=False),
            "mamba_ssm": mamba_obstacle("cuda", double=False, num_states=states, initial=False),
            "chunked": None,
        }
        # read u, delta, B, C, write y; then read those and the gradient of y, write four more
        inputs = sum(values[name].nbytes for name in ("u", "delta", "B", "C"))
        moved = {"forward": inputs + values["u"].nbytes}
        moved["forward and backward"] = moved["forward"] + 2 * inputs + values["u"].nbytes
        print(f"{batch}, {channels}, {length}, {states}")
        for name, size in moved.items():
            floor = size / bandwidth
            line, seconds = f"  {name:<21} floor {floor * 1e3:7.2f}", {}
            for way, obstacle in obstacles.items():
                if obstacle is None:
                    job = partial(run_cuda, values, way, backward=name != "forward")
                    seconds[way] = cuda_seconds(job, repeats)
                    line += f"   {way} {seconds[way] * 1e3:8.2f} ({seconds[way] / floor:.1f} x)"
            print(line)
            slower |= seconds.get("triton", 0.0) > seconds["chunked"]
        for way, obstacle in obstacles.items():
            if obstacle is not None:
                print(f"  {way}: {obstacle}")
    return int(slower)


def run_cuda(values: dict[str, Tensor], way: str, *, backward: bool) -> None:
    with torch.set_grad_enabled(backward):
        y, _ = selective_scan(**values, delta_softplus=True, implementation=way)  # type: ignore[arg-type]
    if backward:
        torch.autograd.grad(y, list(values.values()), torch.ones_like(y))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=256, help="channels D")
    parser.add_argument("--states", type=int, default=16, help="numbers of state N a channel")
    parser.add_argument("--repeats", type=int, default=5, help="runs, of which the best counts")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device is cuda, but torch finds no CUDA device. Use --device cpu.")
        return measure_cuda(arguments.repeats)
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
