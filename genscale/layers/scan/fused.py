"""The selective scan as two Triton kernels, registered as operators that torch.compile keeps whole.

:mod:`genscale.layers.scan.kernels` holds their bodies. This module launches them and adds up the
partial sums they leave; Triton is imported on the first launch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genscale.layers.scan import kernels

HELPERS = ("then", "softplus", "load_tile", "find_cells", "scan_tile", "scan_tile_backwards")


def fused_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    skip: Tensor | None = None,
    z: Tensor | None = None,
    bias: Tensor | None = None,
    initial: Tensor | None = None,
    paths: Tensor | None = None,
    softplus: bool = False,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scan G groups of D channels along their paths; sums are float32 throughout.

    The first five and ``z`` may have any strides and half precision.

    Args:
        u: ``(B, L, G, D)`` input, or ``(B, L, 1, D)``: the same for all groups.
        delta: ``(B, L, G, D)`` raw step sizes.
        A: ``(G, D, N)`` rates.
        B: ``(B, L, G, N)`` input vectors.
        C: ``(B, L, G, N)`` output vectors.
        skip: ``(G, D)`` factors of ``u`` added to the output.
        z: ``(B, L, G, D)`` gates.
        bias: ``(G, D)`` added to ``delta``.
        initial: ``(B, G, D, N)`` state before the first step.
        paths: ``(G, L)`` the cell that every step of a group visits; default cell by cell.
        softplus: Delta = softplus(delta + bias) instead of delta + bias.
        wide: return the output in float32 instead of the type of ``u``.

    Returns:
        The output ``(B, L, G, D)``, where the cells lie, and the last state ``(B, G, D, N)`` in
        float32; differentiable once.
    """
    parameters = (None if value is None else value.float() for value in (skip, bias, initial))
    skip, bias, initial = parameters
    y, last, _ = _forward(u, delta, A.float(), B, C, skip, z, bias, initial, paths, softplus, wide)
    return y, last


class _Tiling(NamedTuple):
    """Steps, channels and padded numbers of state of a tile, powers of two; warps of a program."""

    steps: int
    block: int
    states: int
    warps: int

    @classmethod
    def of(cls, length: int, channels: int, states: int) -> _Tiling:
        """Choose tiles of 8 (16) numbers a thread: with more the backward kernel spills registers.

        Longer tiles keep fewer states, wider ones leave fewer partial sums.
        """
        padded = _power_above(states)
        steps = min(64 if padded <= 2 else 32 if padded == 4 else 16, _power_above(length))
        size = 1024 if padded == 1 else 2048 if padded <= 32 else 4096
        block = max(1, min(16, size // (steps * padded), _power_above(channels)))
        return cls(steps, block, padded, 4 if padded == 1 else 8)


def _power_above(number: int) -> int:
    return 1 << (number - 1).bit_length()


@lru_cache(maxsize=1)
def _compiled() -> tuple[Any, Any]:
    """Return both kernels, ready to launch."""
    import triton
    import triton.language

    setattr(kernels, "tl", triton.language)  # noqa: B010 - a name that only type checkers import
    for name in HELPERS:  # kernels look them up in their own module
        setattr(kernels, name, triton.jit(getattr(kernels, name)))
    return triton.jit(kernels.scan_forward), triton.jit(kernels.scan_backward)


def _shared(u: Tensor, groups: int) -> Tensor:
    """Return ``u`` for every group: a view whose groups lie on top of each other."""
    return u.expand(-1, -1, groups, -1)


def _or_nothing(value: Tensor | None, like: Tensor) -> Tensor:
    """Return a tensor whose address a kernel can be given; it does not read it."""
    return like if value is None else value


@torch.library.custom_op(
    "genscale::fused_scan",
    mutates_args=(),
    schema="(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? skip, Tensor? z, "
    "Tensor? bias, Tensor? initial, Tensor? paths, bool softplus, bool wide) "
    "-> (Tensor, Tensor, Tensor)",
)
def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    skip: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    initial: Tensor | None,
    paths: Tensor | None,
    softplus: bool,
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, the last state, and the states before every tile."""
    kernel, _ = _compiled()
    (batch, length, groups, channels), states = delta.shape, A.shape[2]
    tiling = _Tiling.of(length, channels, states)
    u = _shared(u, groups)
    y, last, kept = _empty_outputs(u, delta, A, wide)
    optional = [
        None if value is None else value.contiguous() for value in (skip, bias, initial, paths)
    ]
    skip, bias, initial, paths = optional
    with torch.cuda.device_of(u):
        kernel[(-(-channels // tiling.block), groups, batch)](
            *(u, delta, A.contiguous(), B, C, _or_nothing(skip, u), _or_nothing(z, u)),
            *(_or_nothing(bias, u), _or_nothing(initial, u), _or_nothing(paths, u)),
            *(y, last, kept),
            *(value.stride() for value in (u, delta, B, C, _or_nothing(z, u))),
            *(length, channels, states),
            HAS_SKIP=skip is not None,
            HAS_Z=z is not None,
            HAS_BIAS=bias is not None,
            HAS_INITIAL=initial is not None,
            HAS_PATHS=paths is not None,
            SOFTPLUS=softplus,
            STEPS=tiling.steps,
            BLOCK=tiling.block,
            STATES=tiling.states,
            num_warps=tiling.warps,
            enable_fp_fusion=True,
        )
    return y, last, kept


def _empty_outputs(
    u: Tensor, delta: Tensor, A: Tensor, wide: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return memory for y, the last state and the kept states."""
    batch, length, _, channels = delta.shape
    steps = _Tiling.of(length, channels, A.shape[2]).steps
    y = delta.new_empty(delta.shape, dtype=torch.float32 if wide else u.dtype)
    last = A.new_empty(batch, *A.shape)
    return y, last, A.new_empty((length + steps - 1) // steps, *last.shape)


@_forward.register_fake
def _(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    skip: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    initial: Tensor | None,
    paths: Tensor | None,
    softplus: bool,
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_outputs(u, delta, A, wide)


@torch.library.custom_op(
    "genscale::fused_scan_backward",
    mutates_args=(),
    schema="(Tensor grad_y, Tensor? grad_last, Tensor u, Tensor delta, Tensor A, Tensor B, "
    "Tensor C, Tensor? skip, Tensor? z, Tensor? bias, Tensor? paths, Tensor kept, bool softplus) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad_y: Tensor,
    grad_last: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    skip: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    paths: Tensor | None,
    kept: Tensor,
    softplus: bool,
) -> tuple[Tensor, ...]:
    """Return the gradients of u, delta, A, B, C, skip, z, bias and the initial state, in float32.

    Those of inputs that were not given are empty.
    """
    _, kernel = _compiled()
    (batch, length, groups, channels), states = delta.shape, A.shape[2]
    tiling = _Tiling.of(length, channels, states)
    blocks = -(-channels // tiling.block)
    wide_u = _shared(u, groups)
    # made of A: float32
    grad_u, grad_delta = (A.new_empty(delta.shape) for _ in range(2))
    grad_z = A.new_empty(delta.shape if z is not None else 0)
    part_A, grad_initial = (A.new_empty(batch, *A.shape) for _ in range(2))
    part_B, part_C = (A.new_empty(blocks, *B.shape) for _ in range(2))
    part_skip, part_bias = (
        A.new_empty((batch, *A.shape[:2]) if value is not None else (0,)) for value in (skip, bias)
    )
    optional = [
        None if value is None else value.contiguous() for value in (grad_last, skip, bias, paths)
    ]
    grad_last, skip, bias, paths = optional
    with torch.cuda.device_of(u):
        kernel[(blocks, groups, batch)](
            *(grad_y, _or_nothing(grad_last, A), wide_u, delta, A.contiguous(), B, C),
            *(_or_nothing(value, u) for value in (skip, z, bias, paths)),
            *(kept, grad_u, grad_delta, grad_z, part_A, part_B, part_C),
            *(part_skip, part_bias, grad_initial),
            *(t.stride() for t in (grad_y, wide_u, delta, B, C, _or_nothing(z, wide_u))),
            *(length, channels, states),
            HAS_LAST=grad_last is not None,
            HAS_SKIP=skip is not None,
            HAS_Z=z is not None,
            HAS_BIAS=bias is not None,
            HAS_PATHS=paths is not None,
            SOFTPLUS=softplus,
            STEPS=tiling.steps,
            BLOCK=tiling.block,
            STATES=tiling.states,
            num_warps=tiling.warps,
            enable_fp_fusion=True,
        )
    if u.shape[2] != groups:
        grad_u = grad_u.sum(2, keepdim=True)
    sums = (part_A.sum(0), part_B.sum(0), part_C.sum(0), part_skip.sum(0), part_bias.sum(0))
    grad_A, grad_B, grad_C, grad_skip, grad_bias = sums
    return (
        *(grad_u, grad_delta, grad_A, grad_B, grad_C),
        *(grad_skip, grad_z, grad_bias, grad_initial),
    )


@_backward.register_fake
def _(
    grad_y: Tensor,
    grad_last: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    skip: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    paths: Tensor | None,
    kept: Tensor,
    softplus: bool,
) -> tuple[Tensor, ...]:
    def empty(value: Tensor | None) -> Tensor:  # a sum over the batch of nothing is a number
        return A.new_empty(() if value is None else value.shape)

    grad_z = A.new_empty(0 if z is None else z.shape)
    return (
        *(empty(value) for value in (u, delta, A, B, C, skip)),
        *(grad_z, empty(bias), A.new_empty(kept.shape[1:])),
    )


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    u, delta, A, B, C, skip, z, bias, initial, paths, ctx.softplus, _ = inputs
    ctx.initial_given = initial is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(u, delta, A, B, C, skip, z, bias, paths, output[2])


def _differentiate(
    ctx: Any, grad_y: Tensor | None, grad_last: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    u, delta, A, B, C, skip, z, bias, paths, kept = ctx.saved_tensors
    if grad_y is None:
        grad_y = A.new_zeros(()).expand(delta.shape)
    given = (u, delta, A, B, C, skip, z, bias, kept if ctx.initial_given else None)
    grads = _backward(
        grad_y, grad_last, u, delta, A, B, C, skip, z, bias, paths, kept, ctx.softplus
    )
    matched = (
        None if value is None else grad.to(value.dtype)
        for value, grad in zip(given, grads, strict=True)
    )
    return (*matched, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_remember)
