"""Run the Triton kernels in Triton's interpreter and print how far they are from the reference.

A process of its own, because Triton decides when it is imported whether it compiles or interprets.
Prints one JSON object: for every case the largest difference of every output and gradient,
relative to its largest entry.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from genscale.layers.scan import scan_grid, scan_orders, selective_scan
from genscale.layers.ss2d import SS2D

BATCH, STEP = 2, 3  # of the samples, of the scans' step sizes


def draw(*shape: int, seed: list[int], dtype: torch.dtype = torch.float32) -> Tensor:
    seed[0] += 1
    generator = torch.Generator().manual_seed(seed[0])
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()


def plain_scan(
    channels: int, length: int, states: int, groups: int, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    seed = [0]
    return {
        "u": draw(1, channels, length, seed=seed, dtype=dtype),
        "delta": draw(1, channels, length, seed=seed, dtype=dtype),
        "A": (-draw(channels, states, seed=seed).exp()).detach().requires_grad_(),
        "B": draw(1, groups, states, length, seed=seed, dtype=dtype),
        "C": draw(1, groups, states, length, seed=seed, dtype=dtype),
        "D": draw(channels, seed=seed),
        "z": draw(1, channels, length, seed=seed, dtype=dtype),
        "delta_bias": draw(channels, seed=seed),
        "initial_state": draw(1, channels, states, seed=seed),
    }


def outputs_and_grads(outputs: tuple[Tensor, ...], inputs: list[Tensor]) -> list[Tensor]:
    loss = sum((output.float() + 0.3).square().mean() for output in outputs)
    assert isinstance(loss, Tensor)
    return [*outputs, *torch.autograd.grad(loss, inputs)]


def differences(got: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Largest difference of every pair over the largest entry; they must be of the same type."""
    result = []
    for a, b in zip(got, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        result.append(((a - b).abs().max() / b.abs().max().clamp_min(1e-3)).item())
    return result


def compare_scan(values: dict[str, Any], **settings: Any) -> list[float]:
    inputs = [value for value in values.values() if value.requires_grad]
    results = [
        outputs_and_grads(selective_scan(**values, **settings, implementation=name), inputs)
        for name in ("triton", "reference")
    ]
    return differences(*results)


def compare_pieces() -> list[float]:
    """Two pieces, the state handed on, against the whole: outputs and gradients."""
    values = plain_scan(3, 11, 2, 1)
    inputs = list(values.values())
    whole = selective_scan(**values, delta_softplus=True, implementation="triton")
    state, parts = values["initial_state"], []
    for piece in (slice(0, 4), slice(4, 11)):
        cut = {
            name: value[..., piece] if name in ("u", "delta", "B", "C", "z") else value
            for name, value in values.items()
        }
        cut["initial_state"] = state
        y, state = selective_scan(**cut, delta_softplus=True, implementation="triton")
        parts.append(y)
    together = (torch.cat(parts, dim=-1), state)
    return differences(outputs_and_grads(together, inputs), outputs_and_grads(whole, inputs))


def compare_grid(kind: Any, height: int, width: int, states: int) -> list[float]:
    """Walking along index tables against gathering into each order."""
    seed, cells, channels = [9], height * width, 3
    inputs = [
        draw(BATCH, cells, channels, seed=seed),
        draw(BATCH, cells, 4, 2, seed=seed),
        draw(4, channels, 2, seed=seed),
        (-draw(4, channels, states, seed=seed).exp()).detach().requires_grad_(),
        draw(BATCH, cells, 4, states, seed=seed),
        draw(BATCH, cells, 4, states, seed=seed),
        draw(4, channels, seed=seed),
    ]
    tables = scan_orders(kind, height, width, torch.device("cpu"))
    results = [
        outputs_and_grads(
            (scan_grid(*inputs[:6], *tables, bias=inputs[6], implementation=name),), inputs
        )
        for name in ("triton", "reference")
    ]
    return differences(*results)


def compare_module() -> list[float]:
    """A whole SS2D whose backend comes from the environment."""
    torch.manual_seed(0)
    module = SS2D(4)
    inputs = [draw(1, 2, 3, 4, seed=[4]), *module.parameters()]
    results = []
    for name in ("triton", "reference"):
        os.environ["GENSCALE_SCAN"] = name
        results.append(outputs_and_grads((module(inputs[0]),), inputs))
    del os.environ["GENSCALE_SCAN"]
    return differences(*results)


def long_steps() -> list[float]:
    """exp(-50 x 16) underflows to zero: only the last input is left, and nothing is NaN."""
    values = plain_scan(2, 5, 2, 1)
    values = {n: v.detach() for n, v in values.items() if n not in ("z", "D", "delta_bias")}
    values["delta"] = torch.full((1, 2, 5), 50.0).requires_grad_()
    values["A"] = torch.full((2, 2), -16.0).requires_grad_()
    return compare_scan(values)


def zero_steps() -> list[float]:
    """A step of zero keeps the state, bit for bit."""
    values = {n: v.detach() for n, v in plain_scan(2, 5, 2, 1).items() if n != "delta_bias"}
    values["delta"] = torch.zeros(1, 2, 5)
    _, last = selective_scan(**values, implementation="triton")
    return [0.0 if torch.equal(last, values["initial_state"]) else 1.0]


def main() -> None:
    torch.set_num_threads(1)
    softplus = {"delta_softplus": True}
    constant = plain_scan(4, 5, 2, 1)
    constant["B"] = draw(4, 2, seed=[7])
    bare = plain_scan(2, 5, 1, 1)
    bare = {name: bare[name] for name in ("u", "delta", "A", "B", "C")}
    half = plain_scan(2, 6, 1, 1, torch.bfloat16)
    cases = {
        "one state, groups, more steps than a tile": compare_scan(
            plain_scan(4, 67, 1, 2), **softplus
        ),
        "three states, channels that fill no block": compare_scan(
            plain_scan(3, 34, 3, 1), **softplus
        ),
        "sixteen states, groups": compare_scan(plain_scan(4, 5, 16, 2), **softplus),
        "one step": compare_scan(plain_scan(2, 1, 3, 2), **softplus),
        "no softplus": compare_scan(plain_scan(2, 5, 1, 1) | {"delta": constant["delta"][:, :2]}),
        "nothing optional": compare_scan(bare, **softplus),
        "constant vectors": compare_scan(constant, **softplus),
        "long steps": long_steps(),
        "steps of zero": zero_steps(),
        "two pieces": compare_pieces(),
        "continuous grid, one state": compare_grid("continuous", 3, 5, 1),
        "cross grid, three states": compare_grid("cross", 2, 3, 3),
        "module": compare_module(),
        "bfloat16": compare_scan(half, **softplus),
    }
    print(json.dumps(cases))


if __name__ == "__main__":
    main()
