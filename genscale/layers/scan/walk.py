"""The recurrence along several paths over one set of cells, for a CPU.

    h_t = exp(Delta_t A) h_{t-1} + Delta_t B_t u_t,  y(cell) = sum over paths of C . h(cell)

Nothing is put in order: a path decides which row of a buffer a step reads and which it writes, so
that inputs are read and outputs are written where their cells lie. Batch and channels are cut into
blocks whose buffers stay in the processor's cache while all passes go over them; step sizes are
multiplied out there too. Only Delta is kept for the backward pass; it computes the states again.

Shapes, float32 or float64: u ``(B, L, E)``; low-rank steps ``(B, L, K, R)`` and their weight
``(K, E, R)``; Delta ``(K, L, B, E)``; A ``(K, E, N)``; B, C ``(B, L, K, N)``; paths ``(K, L)``,
each the cells in the order of its steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# numbers in a buffer a thread, if steps do not get smaller by it than the next number
BLOCK_SIZE = 1 << 17
# numbers in a step, at the least: fewer cost as much time as these
STEP_SIZE = 1 << 10


def walk(
    u: Tensor,
    low: Tensor,
    weight: Tensor,
    bias: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    paths: Tensor,
) -> Tensor:
    """Return y ``(B, L, E)``, with Delta = softplus(weight low + bias); differentiable once.

    Args:
        u: input.
        low: low-rank step sizes.
        weight: what they are multiplied by.
        bias: ``(K, E)`` added to the product.
        A: negative rates.
        B: input vectors.
        C: output vectors.
        paths: permutations of the cells, int64.
    """
    return _forward(u, low, weight, bias, A, B, C, paths)[0]


def _blocks(batch: int, length: int, channels: int) -> Iterator[tuple[slice, slice]]:
    """Cut batch and channels so that a buffer of all steps has about the size it should."""
    step = max(STEP_SIZE, BLOCK_SIZE * torch.get_num_threads() // length)
    rows, width = max(1, step // channels), min(step, channels)
    for i in range(0, batch, rows):
        for j in range(0, channels, width):
            yield slice(i, i + rows), slice(j, j + width)


class _Rows:
    """A block's numbers ``(L, b, e)`` in a buffer, with a view of every cell's row."""

    def __init__(self, memory: Tensor) -> None:
        self.all = memory
        self.each = memory.unbind(0)


class _Memory:
    """Buffers that blocks use one after the other; those at the edges may be smaller."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.made: dict[tuple[int, ...], list[_Rows]] = {}

    def take(self, count: int, *shape: int) -> list[_Rows]:
        """Return ``count`` buffers of this shape, the same ones every time."""
        if shape not in self.made:
            self.made[shape] = [_Rows(self.like.new_empty(shape)) for _ in range(count)]
        return self.made[shape]


def _fill_states(
    drive: Tensor, delta: Tensor, A: Tensor, B: Tensor, path: list[int], decay: _Rows, h: _Rows
) -> None:
    """Write exp(Delta A) and h, a row a cell."""
    torch.mul(delta, A, out=decay.all).exp_()
    torch.mul(drive, B, out=h.all[: len(path)])
    for before, cell in pairwise(path):
        h.each[cell].addcmul_(decay.each[cell], h.each[before])


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """Add a product, or write it where there is nothing yet."""
    if first:
        torch.mul(a, b, out=total)
    else:
        total.addcmul_(a, b)


def _steps_first(value: Tensor, rows: slice, *index: slice | int) -> Tensor:
    """Return a block of a ``(B, L, ...)`` tensor as a view with the steps first."""
    return value[(rows, slice(None), *index)].transpose(0, 1)


@torch.library.custom_op(
    "genscale::walk",
    mutates_args=(),
    schema="(Tensor u, Tensor low, Tensor weight, Tensor bias, Tensor A, Tensor B, Tensor C, "
    "Tensor paths) -> (Tensor, Tensor)",
)
def _forward(
    u: Tensor,
    low: Tensor,
    weight: Tensor,
    bias: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    paths: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return y and Delta."""
    y, delta, memory = u.new_empty(u.shape), _empty_delta(u, paths), _Memory(u)
    with torch.autocast(u.device.type, enabled=False):
        for rows, columns in _blocks(*u.shape):
            x, out = _steps_first(u, rows, columns), _steps_first(y, rows, columns)
            decay, states, drive = memory.take(3, *x.shape)
            for k, path in enumerate(paths.tolist()):
                narrow = _steps_first(low, rows, k).flatten(0, 1)
                factors = weight[k, columns].T
                torch.addmm(bias[k, columns], narrow, factors, out=drive.all.flatten(0, 1))
                step = delta[k, :, rows, columns]
                torch.ops.aten.softplus.out(drive.all, out=step)
                torch.mul(step, x, out=drive.all)
                for n in range(A.shape[2]):
                    write, read = (_steps_first(v, rows, k, slice(n, n + 1)) for v in (B, C))
                    rates = A[k, columns, n]
                    _fill_states(drive.all, step, rates, write, path, decay, states)
                    _add_product(out, states.all, read, first=k == n == 0)
    return y, delta


def _empty_delta(u: Tensor, paths: Tensor) -> Tensor:
    batch, length, channels = u.shape
    return u.new_empty(paths.shape[0], length, batch, channels)


@_forward.register_fake
def _(
    u: Tensor,
    low: Tensor,
    weight: Tensor,
    bias: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    paths: Tensor,
) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), _empty_delta(u, paths)


@torch.library.custom_op(
    "genscale::walk_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor u, Tensor low, Tensor weight, Tensor delta, Tensor A, Tensor B, "
    "Tensor C, Tensor paths) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor,
    u: Tensor,
    low: Tensor,
    weight: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    paths: Tensor,
) -> tuple[Tensor, ...]:
    """Return the gradients of u, low, weight, bias, A, B and C.

    With g = dL/dy, the adjoint G_t = g_t C_t + a_{t+1} G_{t+1} runs along the path backwards, and
    W_t = G_t a_t h_{t-1} is the gradient of the exponent Delta_t A.
    """
    length, memory, grad_u = u.shape[1], _Memory(u), u.new_empty(u.shape)
    grad_low, grad_weight, grad_A, grad_B, grad_C = (
        value.new_zeros(value.shape) for value in (low, weight, A, B, C)
    )
    grad_bias = A.new_zeros(A.shape[:2])
    before = torch.full_like(paths, length)  # the first step comes from nowhere: a row of zeros
    before.scatter_(1, paths[:, 1:], paths[:, :-1])
    with torch.autocast(u.device.type, enabled=False):
        for rows, columns in _blocks(*u.shape):
            x, g = _steps_first(u, rows, columns), _steps_first(grad, rows, columns)
            grad_x = _steps_first(grad_u, rows, columns)
            decay, adjoint, earlier, drive, along_B, slope = memory.take(6, *x.shape)
            (states,) = memory.take(1, length + 1, *x.shape[1:])
            states.each[length].zero_()
            for k, path in enumerate(paths.tolist()):
                step = delta[k, :, rows, columns]
                torch.mul(step, x, out=drive.all)
                for n in range(A.shape[2]):
                    write, read = (_steps_first(v, rows, k, slice(n, n + 1)) for v in (B, C))
                    rates = A[k, columns, n]
                    _fill_states(drive.all, step, rates, write, path, decay, states)
                    torch.mul(g, read, out=adjoint.all)
                    for cell, previous in pairwise(reversed(path)):
                        adjoint.each[previous].addcmul_(decay.each[cell], adjoint.each[cell])
                    torch.index_select(states.all, 0, before[k], out=earlier.all)
                    exponent = decay.all.mul_(earlier.all).mul_(adjoint.all)  # W
                    grad_A[k, columns, n] += torch.mul(exponent, step, out=earlier.all).sum((0, 1))
                    _add_product(slope.all, exponent, rates, first=n == 0)
                    _add_product(along_B.all, adjoint.all, write, first=n == 0)
                    grad_C[rows, :, k, n] += states.all[:length].mul_(g).sum(-1).T
                    grad_B[rows, :, k, n] += adjoint.all.mul_(drive.all).sum(-1).T
                _add_product(grad_x, step, along_B.all, first=k == 0)
                slope.all.addcmul_(x, along_B.all)
                # times the derivative of softplus, 1 - exp(-Delta), without cancellation; minus
                slope.all.mul_(torch.neg(step, out=earlier.all).expm1_())
                steep = slope.all.flatten(0, 1)
                narrow = _steps_first(low, rows, k).flatten(0, 1)
                grad_bias[k, columns] -= steep.sum(0)
                grad_weight[k, columns].addmm_(steep.T, narrow, alpha=-1)
                into = _steps_first(grad_low, rows, k)
                into -= torch.mm(steep, weight[k, columns]).view(into.shape)
    return grad_u, grad_low, grad_weight, grad_bias, grad_A, grad_B, grad_C


@_backward.register_fake
def _(
    grad: Tensor,
    u: Tensor,
    low: Tensor,
    weight: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    paths: Tensor,
) -> tuple[Tensor, ...]:
    before, after = (u, low, weight), (A, B, C)
    empty = [value.new_empty(value.shape) for value in (*before, *after)]
    return (*empty[:3], A.new_empty(A.shape[:2]), *empty[3:])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    u, low, weight, _, A, B, C, paths = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(u, low, weight, output[1], A, B, C, paths)


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    return (*_backward(grad, *ctx.saved_tensors), None)


_forward.register_autograd(_differentiate, setup_context=_remember)
