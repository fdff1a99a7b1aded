"""The recurrence h_t = exp(Delta_t A) h_{t-1} + Delta_t B_t u_t, y_t = C_t . h_t, and its adjoint.

Everything here is laid out time first, so that one step reads contiguous memory:

    u, delta: ``(L, B, G, D)``    A: ``(G, D, N)``    B, C: ``(L, B, G, N)``    h: ``(B, G, D, N)``

with batch B, groups G that share B and C, D channels a group and N numbers of state a channel; all
float32 or all float64. :func:`recur` is opaque to ``torch.compile``, which would otherwise unroll
all L steps. It walks through the sequence in chunks, keeps of the states only those at the starts
of chunks, and computes the others again in the backward pass: memory grows with B G D L, not with
B G D L N. No exponential of a positive number is ever taken, so no length and no step size
overflows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def recur_reference(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (y, last state), one step after the other with plain autograd; shapes as above."""
    decay = torch.exp(delta.unsqueeze(-1) * A)
    drive = (delta * u).unsqueeze(-1) * B.unsqueeze(-2)
    state, states = initial, []
    # unbind, not indexing: the gradient of an index is a tensor of the whole sequence's size
    for a, b in zip(decay.unbind(0), drive.unbind(0), strict=True):
        state = torch.addcmul(b, a, state)
        states.append(state)
    return (torch.stack(states) * C.unsqueeze(-2)).sum(-1), state


def recur(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Return (y, last state); shapes as above, differentiable once in every argument.

    Args:
        u: input.
        delta: step sizes Delta, after bias and softplus.
        A: negative rates.
        B: input vectors.
        C: output vectors.
        initial: state before the first step.
        chunk_size: steps between two kept states.
    """
    y, last, _ = _forward(u, delta, A, B, C, initial, chunk_size)
    return y, last


def recur_in_lanes(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial: Tensor,
    chunk_size: int,
    lanes: int,
) -> tuple[Tensor, Tensor]:
    """Return (y, last state) of :func:`recur` with ``lanes`` pieces of the sequence side by side.

    A first walk gives what each lane adds to the state, a short carry over lanes the state at the
    start of each, a second walk the output. This is twice the arithmetic in L / lanes steps: faster
    where a step is so small that starting it costs more than computing it.
    """
    length, batch = u.shape[:2]
    steps = -(-length // lanes)
    padding = lanes * steps - length

    def fold(x: Tensor) -> Tensor:
        if padding:  # a step size of zero leaves the state as it is
            x = torch.cat((x, x.new_zeros(padding, *x.shape[1:])))
        return x.unflatten(0, (lanes, steps)).transpose(0, 1).flatten(1, 2).contiguous()

    u, delta, B, C = fold(u), fold(delta), fold(B), fold(C)
    nothing = initial.new_zeros(lanes * batch, *initial.shape[1:])
    _, ends = recur(u, delta, A, B, C, nothing, chunk_size)
    decays = torch.exp(delta.sum(0).unsqueeze(-1) * A)
    state, starts = initial, []
    for a, b in zip(decays.split(batch), ends.split(batch), strict=True):
        starts.append(state)
        state = torch.addcmul(b, a, state)
    y, _ = recur(u, delta, A, B, C, torch.cat(starts), chunk_size)
    y = y.unflatten(1, (lanes, batch)).transpose(0, 1).flatten(0, 1)
    return y[:length], state


class _Rows:
    """A buffer of T steps with a view of every step, made once for all chunks."""

    def __init__(self, like: Tensor, steps: int) -> None:
        self.all = like.new_empty(steps, *like.shape)
        self.each = self.all.unbind(0)


def _fill_states(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, decay: _Rows, states: _Rows
) -> None:
    """Write the T steps of a chunk into ``decay`` (T rows) and ``states`` (T + 1, first given)."""
    n = len(u)
    torch.mul(delta.unsqueeze(-1), A, out=decay.all[:n])
    decay.all[:n].exp_()
    torch.mul((delta * u).unsqueeze(-1), B.unsqueeze(-2), out=states.all[1 : n + 1])
    for t in range(n):
        states.each[t + 1].addcmul_(decay.each[t], states.each[t])


def _contract_state(states: Tensor, vectors: Tensor) -> Tensor:
    """Sum ``(T, B, G, D, N)`` times ``(T, B, G, N)`` over N."""
    if states.shape[-1] == 1:
        return states.squeeze(-1) * vectors
    return torch.matmul(states, vectors.unsqueeze(-1)).squeeze(-1)


def _contract_channels(values: Tensor, states: Tensor) -> Tensor:
    """Sum ``(T, B, G, D)`` times ``(T, B, G, D, N)`` over D."""
    return torch.matmul(values.unsqueeze(-2), states).squeeze(-2)


@torch.library.custom_op(
    "genscale::selective_scan",
    mutates_args=(),
    schema="(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor initial, "
    "SymInt chunk_size) -> (Tensor, Tensor, Tensor)",
)
def _forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, the last state, and the states at the starts of chunks."""
    length, chunk = len(u), min(chunk_size, len(u))
    y = torch.empty_like(u)
    kept = initial.new_empty(-(-length // chunk_size), *initial.shape)
    decay, states = _Rows(initial, chunk), _Rows(initial, chunk + 1)
    state = initial
    with torch.autocast(u.device.type, enabled=False):
        for i, start in enumerate(range(0, length, chunk_size)):
            part = slice(start, min(start + chunk_size, length))
            n = part.stop - start
            kept[i] = state
            states.each[0].copy_(kept[i])
            _fill_states(u[part], delta[part], A, B[part], decay, states)
            y[part] = _contract_state(states.all[1 : n + 1], C[part])
            state = states.each[n]
    return y, state.clone(), kept


@_forward.register_fake
def _(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    kept = initial.new_empty((u.shape[0] + chunk_size - 1) // chunk_size, *initial.shape)
    return torch.empty_like(u), torch.empty_like(initial), kept


@torch.library.custom_op(
    "genscale::selective_scan_backward",
    mutates_args=(),
    schema="(Tensor grad_y, Tensor grad_last, Tensor u, Tensor delta, Tensor A, Tensor B, "
    "Tensor C, Tensor kept, SymInt chunk_size) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad_y: Tensor,
    grad_last: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    kept: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of u, delta, A, B, C and the initial state.

    With g_t = dL/dy_t, the adjoint G_t = g_t C_t + a_{t+1} G_{t+1} runs backwards in time, and
    W_t = G_t a_t h_{t-1} is the gradient of the exponent Delta_t A.
    """
    length, chunk = len(u), min(chunk_size, len(u))
    grad_u, grad_delta = torch.empty_like(u), torch.empty_like(delta)
    grad_A = torch.zeros_like(A)
    grad_B, grad_C = B.new_empty(B.shape), C.new_empty(C.shape)
    decays, adjoints = _Rows(kept[0], chunk), _Rows(kept[0], chunk)
    all_states = _Rows(kept[0], chunk + 1)
    carry = grad_last
    with torch.autocast(u.device.type, enabled=False):
        for i in reversed(range(len(kept))):
            part = slice(i * chunk_size, min((i + 1) * chunk_size, length))
            n = part.stop - part.start
            decay, states, adjoint = decays.all[:n], all_states.all[: n + 1], adjoints.all[:n]
            states[0] = kept[i]
            _fill_states(u[part], delta[part], A, B[part], decays, all_states)
            torch.mul(grad_y[part].unsqueeze(-1), C[part].unsqueeze(-2), out=adjoint)
            adjoint[-1].add_(carry)
            for t in range(n - 2, -1, -1):
                adjoints.each[t].addcmul_(decays.each[t + 1], adjoints.each[t + 1])
            carry = decay[0] * adjoint[0]
            grad_C[part] = _contract_channels(grad_y[part], states[1:])
            grad_B[part] = _contract_channels(delta[part] * u[part], adjoint)
            along_B = _contract_state(adjoint, B[part])
            grad_u[part] = delta[part] * along_B
            exponent = decay.mul_(states[:-1]).mul_(adjoint)  # W; decay is not needed any more
            grad_delta[part] = torch.mul(exponent, A, out=adjoint).sum(-1)
            grad_delta[part].addcmul_(u[part], along_B)
            grad_A += exponent.mul_(delta[part].unsqueeze(-1)).sum((0, 1))
    return grad_u, grad_delta, grad_A, grad_B, grad_C, carry.clone()


@_backward.register_fake
def _(
    grad_y: Tensor,
    grad_last: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    kept: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    empty = [torch.empty_like(value) for value in (u, delta, A)]
    return (*empty, B.new_empty(B.shape), C.new_empty(C.shape), torch.empty_like(grad_last))  # type: ignore[return-value]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    u, delta, A, B, C, _, ctx.chunk_size = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(u, delta, A, B, C, output[2])


def _differentiate(
    ctx: Any, grad_y: Tensor | None, grad_last: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    u, delta, A, B, C, kept = ctx.saved_tensors
    grad_y = torch.zeros_like(u) if grad_y is None else grad_y.contiguous()
    grad_last = torch.zeros_like(kept[0]) if grad_last is None else grad_last.contiguous()
    return (*_backward(grad_y, grad_last, u, delta, A, B, C, kept, ctx.chunk_size), None)


_forward.register_autograd(_differentiate, setup_context=_remember)
