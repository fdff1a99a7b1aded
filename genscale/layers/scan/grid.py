"""Selective scans over a set of cells along several paths, whose outputs are summed."""

from __future__ import annotations

import torch
from torch import Tensor

from genscale.layers.norm import upcast
from genscale.layers.scan.backends import (
    Implementation,
    choose_implementation,
    mamba_obstacle,
    triton_obstacle,
)
from genscale.layers.scan.orders import permute_rows
from genscale.layers.scan.selective import selective_scan
from genscale.layers.scan.walk import walk

# more numbers of state than these are walked through faster side by side than one by one
MOST_WALKED_STATES = 4


def scan_grid(
    x: Tensor,
    low: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    orders: Tensor,
    inverses: Tensor,
    *,
    bias: Tensor,
    implementation: Implementation = "auto",
) -> Tensor:
    """Scan the cells along each of K paths and sum the outputs where the cells lie.

    Raw step sizes are ``weight low + bias``, a product a path. The scan is the same as putting x,
    step sizes, B and C in each path's order, a
    :func:`~genscale.layers.scan.selective.selective_scan` with softplus and a group a path,
    undoing the orders and summing. On CUDA the kernel of :mod:`genscale.layers.scan.fused`, on a
    CPU :mod:`genscale.layers.scan.walk` go along the paths instead, and nothing is reordered.

    Args:
        x: ``(B, L, E)`` cells.
        low: ``(B, L, K, R)`` low-rank step sizes.
        weight: ``(K, E, R)`` what they are multiplied by.
        A: ``(K, E, N)`` rates, negative.
        B: ``(B, L, K, N)`` input vectors.
        C: ``(B, L, K, N)`` output vectors.
        orders: ``(K, L)`` int64, the cell every step of a path visits.
        inverses: ``(K, L)``, the step that visits every cell.
        bias: ``(K, E)`` added to the product.
        implementation: see :mod:`genscale.layers.scan.backends`; ``"auto"`` prefers the kernel
            over mamba_ssm here, which needs the cells in order.

    Returns:
        ``(B, L, E)`` float32 (float64), differentiable once in all but the orders.

    Raises:
        ValueError: shapes do not fit together.
        ConfigError: an implementation that cannot run.
    """
    _check(x, low, weight, A, B, C, orders, bias)
    double = any(value.dtype == torch.float64 for value in (x, low, A, B, C))
    device, states = x.device.type, A.shape[2]
    chosen = choose_implementation(
        implementation,
        {
            "triton": triton_obstacle(device, double),
            "mamba_ssm": mamba_obstacle(device, double, states, initial=False),
        },
        ("triton", "mamba_ssm", "chunked") if device == "cuda" else ("chunked",),
        device=device,
    )
    if chosen == "chunked" and device == "cpu" and states <= MOST_WALKED_STATES:
        wide = torch.float64 if double else torch.float32
        u, narrow, factors, added, rates, write, read = (
            value.to(wide) for value in (x, low, weight, bias, A, B, C)
        )
        return walk(u, narrow, factors, added, rates, write, read, orders)
    # (K, B L, R) times (K, R, E): the paths lie one after the other in memory
    product = torch.bmm(low.permute(2, 0, 1, 3).flatten(1, 2), weight.to(low.dtype).transpose(1, 2))
    delta = product.unflatten(1, x.shape[:2]).permute(1, 2, 0, 3)  # (B, L, K, E)
    if chosen == "triton":
        from genscale.layers.scan.fused import fused_scan

        y, _ = fused_scan(
            x.unsqueeze(2), delta, A, B, C, bias=bias, paths=orders, softplus=True, wide=True
        )
        return y.sum(2)
    return _scan_in_order(
        upcast(x), delta, A, B, C, orders, inverses, bias=bias, implementation=chosen
    )


def _scan_in_order(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    orders: Tensor,
    inverses: Tensor,
    *,
    bias: Tensor,
    implementation: str,
) -> Tensor:
    """Gather everything into every path's order, scan, and gather the outputs back."""
    pairs = list(zip(orders.unbind(0), inverses.unbind(0), strict=True))

    def in_order(value: Tensor) -> Tensor:
        """Turn ``(B, L, K, ...)`` into ``(L, B, K, ...)``, a path's rows in its order."""
        rows = value.transpose(0, 1).unbind(2)
        return torch.stack(
            [permute_rows(part, *pair) for part, pair in zip(rows, pairs, strict=True)], dim=2
        )

    u = in_order(x.unsqueeze(2).expand(-1, -1, len(pairs), -1))
    delta, B, C = in_order(delta), in_order(B), in_order(C)
    y, _ = selective_scan(
        u.flatten(2).permute(1, 2, 0),
        delta.flatten(2).permute(1, 2, 0),
        A.flatten(0, 1),
        B.permute(1, 2, 3, 0),
        C.permute(1, 2, 3, 0),
        delta_bias=bias.flatten(),
        delta_softplus=True,
        implementation=implementation,  # type: ignore[arg-type]
    )
    outputs = y.permute(2, 0, 1).unflatten(2, (len(pairs), -1)).unbind(2)
    merged = permute_rows(outputs[0], inverses[0], orders[0])
    for output, (order, inverse) in zip(outputs[1:], pairs[1:], strict=True):
        merged = merged + permute_rows(output, inverse, order)
    return merged.transpose(0, 1)


def _check(
    x: Tensor,
    low: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    orders: Tensor,
    bias: Tensor,
) -> None:
    if x.dim() != 3 or A.dim() != 3 or 0 in x.shape:
        raise ValueError(
            f"x and A must have shapes (B, L, E) and (K, E, N), none of them 0, but have "
            f"{tuple(x.shape)} and {tuple(A.shape)}. Flatten the grid into cells."
        )
    (batch, length, channels), (paths, _, states) = x.shape, A.shape
    fits = {
        "low": (low, (batch, length, paths, weight.shape[-1])),
        "weight": (weight, (paths, channels, weight.shape[-1])),
        "A": (A, (paths, channels, states)),
        "B": (B, (batch, length, paths, states)),
        "C": (C, (batch, length, paths, states)),
        "orders": (orders, (paths, length)),
        "bias": (bias, (paths, channels)),
    }
    for name, (value, shape) in fits.items():
        if tuple(value.shape) != shape:
            raise ValueError(
                f"{name} must have shape {shape} for x {tuple(x.shape)} and {paths} paths, but "
                f"has {tuple(value.shape)}. Check its layout: cells come before paths."
            )
