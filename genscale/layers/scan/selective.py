"""The selective scan of Mamba (arXiv:2312.00752): one function, float32 state, any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.layers.scan.backends import (
    Implementation,
    choose_implementation,
    mamba_obstacle,
    official_scan,
    triton_obstacle,
)
from genscale.layers.scan.recurrence import recur, recur_in_lanes, recur_reference


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    implementation: Implementation = "auto",
    chunk_size: int = 64,
    num_lanes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Run h_t = exp(Delta_t A) h_{t-1} + Delta_t B_t u_t, y_t = C_t . h_t + D u_t (Mamba, eq. 2).

    Zero-order hold on A, Euler on B, as in the official program. Computed in float32 (float64
    where an input is), under autocast too. Channels of D that follow each other belong to the same
    of G groups, which share B and C. Tensors that lie time first in memory, such as
    ``(L, B, D)`` permuted, are read without a copy; the output lies so.

    Args:
        u: ``(B, D, L)`` input.
        delta: ``(B, D, L)`` raw step sizes.
        A: ``(D, N)`` rates, negative.
        B: ``(B, G, N, L)`` or ``(B, N, L)`` input vectors, or ``(D, N)`` constant ones.
        C: output vectors, in one of the same layouts.
        D: ``(D,)`` skip.
        z: ``(B, D, L)`` gate: the result is multiplied by silu(z), after the skip.
        delta_bias: ``(D,)`` added to ``delta``.
        delta_softplus: Delta = softplus(delta + bias) instead of delta + bias.
        initial_state: ``(B, D, N)`` state before the first step; default zero.
        implementation: ``"auto"``, or a name of :mod:`genscale.layers.scan.backends`;
            ``"reference"`` alone differentiates any number of times and keeps every state.
        chunk_size: steps between the states that are kept for the backward pass (chunked).
        num_lanes: pieces of the sequence that are walked through side by side (chunked); default:
            as many as pay off for the width and the device.

    Returns:
        The output ``(B, D, L)`` in the type of ``u``, and the last state ``(B, D, N)`` in float32
        (float64). Both are differentiable in all arguments, once.

    Raises:
        ValueError: shapes or settings do not fit together.
        ConfigError: an implementation that cannot run, with the reason.
    """
    _check(u, delta, A, B, C, initial_state, chunk_size, num_lanes)
    wide = _widest(u, delta, A, B, C)
    chosen = _choose(implementation, u.device.type, wide, A.shape[1], initial_state is not None)
    if chosen == "mamba_ssm":
        return official_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    if chosen == "triton":
        return _fused(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state)
    batch, channels, _ = u.shape
    x, step = (value.permute(2, 0, 1).to(wide).contiguous() for value in (u, delta))
    if delta_bias is not None:
        step = step + delta_bias.to(wide)
    if delta_softplus:
        step = F.softplus(step)

    write, read = (_vectors_by_time(value.to(wide), batch, u.shape[2]) for value in (B, C))
    groups = max(read.shape[2], write.shape[2])  # all channels where B or C are constant
    if read.shape[2] != write.shape[2]:
        read = read.repeat_interleave(groups // read.shape[2], dim=2)
        write = write.repeat_interleave(groups // write.shape[2], dim=2)
    rates = A.to(wide).unflatten(0, (groups, -1))
    if initial_state is None:
        initial = x.new_zeros(batch, channels, A.shape[1])
    else:
        initial = initial_state.to(wide).contiguous()
    arguments = (
        x.unflatten(2, (groups, -1)),
        step.unflatten(2, (groups, -1)),
        rates,
        write,
        read,
        initial.unflatten(1, (groups, -1)),
    )
    if chosen == "reference":
        y, last = recur_reference(*arguments)
    else:
        if num_lanes is None:
            num_lanes = _choose_lanes(u.shape[2], initial.numel(), u.device)
        if num_lanes > 1:
            y, last = recur_in_lanes(*arguments, chunk_size, num_lanes)
        else:
            y, last = recur(*arguments, chunk_size)
    y = y.flatten(2)  # (L, B, D)
    if D is not None:
        y = torch.addcmul(y, x, D.to(wide))
    if z is not None:
        y = y * F.silu(z.permute(2, 0, 1).to(wide).contiguous())
    return y.to(u.dtype).permute(1, 2, 0), last.flatten(1, 2)


def _choose(
    implementation: str, device: str, wide: torch.dtype, num_states: int, initial: bool
) -> str:
    """Return what runs. The official operator is not opaque to torch.compile: not chosen there."""
    double = wide == torch.float64
    first = () if torch.compiler.is_compiling() else ("mamba_ssm",)
    return choose_implementation(
        implementation,
        {
            "triton": triton_obstacle(device, double),
            "mamba_ssm": mamba_obstacle(device, double, num_states, initial),
        },
        (*first, "triton", "chunked") if device == "cuda" else ("chunked",),
        device=device,
    )


def _fused(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Call the Triton kernel, which reads any strides, through views of its own layout."""
    from genscale.layers.scan.fused import fused_scan

    batch, _, length = u.shape

    def vectors(value: Tensor) -> Tensor:  # (B, L, G, N)
        if value.dim() == 2:  # constant: a group a channel
            return value.expand(batch, length, *value.shape)
        return (value.unsqueeze(1) if value.dim() == 3 else value).permute(0, 3, 1, 2)

    write, read = vectors(B), vectors(C)
    groups = max(write.shape[2], read.shape[2])
    write, read = (
        value.repeat_interleave(groups // value.shape[2], dim=2)
        if value.shape[2] != groups
        else value
        for value in (write, read)
    )

    def by_group(value: Tensor | None, axis: int = 0) -> Tensor | None:
        return None if value is None else value.unflatten(axis, (groups, -1))

    def steps_first(value: Tensor) -> Tensor:  # (B, L, G, D)
        return value.transpose(1, 2).unflatten(2, (groups, -1))

    y, last = fused_scan(
        steps_first(u),
        steps_first(delta),
        A.unflatten(0, (groups, -1)),
        write,
        read,
        skip=by_group(D),
        z=None if z is None else steps_first(z),
        bias=by_group(delta_bias),
        initial=by_group(initial_state, 1),
        softplus=delta_softplus,
    )
    return y.flatten(2).transpose(1, 2), last.flatten(1, 2)


def _widest(*tensors: Tensor) -> torch.dtype:
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def _vectors_by_time(value: Tensor, batch: int, length: int) -> Tensor:
    """Bring B or C into ``(L, B, G, N)``; constant vectors get a group a channel."""
    if value.dim() == 2:
        return value.expand(length, batch, *value.shape)
    if value.dim() == 3:
        value = value.unsqueeze(1)
    return value.permute(3, 0, 1, 2).contiguous()


def _choose_lanes(length: int, width: int, device: torch.device) -> int:
    """Return how many lanes pay off for sequences whose states hold ``width`` numbers in all."""
    if device.type == "cpu":
        return 1  # measured: twice the arithmetic eats up what fewer steps save
    # every step launches kernels: few steps, as long as a step stays small
    return max(1, min(length // 64, (1 << 22) // max(1, width)))


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    chunk_size: int,
    num_lanes: int | None,
) -> None:
    if u.dim() != 3 or delta.shape != u.shape or 0 in u.shape:
        raise ValueError(
            f"u and delta must both have shape (B, D, L), none of them 0, but have "
            f"{tuple(u.shape)} and {tuple(delta.shape)}. Give one step size for every input."
        )
    batch, channels, length = u.shape
    if A.dim() != 2 or len(A) != channels:
        raise ValueError(
            f"A must have shape ({channels}, N) for {channels} channels, but has "
            f"{tuple(A.shape)}. Give one row of rates a channel."
        )
    for name, value in (("B", B), ("C", C)):
        states = A.shape[1]
        groups = value.shape[1] if value.dim() == 4 else 1
        fits = {
            2: (channels, states),
            3: (batch, states, length),
            4: (batch, groups, states, length),
        }.get(value.dim())
        if tuple(value.shape) != fits or groups < 1 or channels % groups:
            raise ValueError(
                f"{name} must have shape ({batch}, G, {states}, {length}) with G dividing "
                f"{channels}, ({batch}, {states}, {length}) or ({channels}, {states}), but has "
                f"{tuple(value.shape)}. Check its layout: time comes last."
            )
    expected = (batch, channels, A.shape[1])
    if initial_state is not None and tuple(initial_state.shape) != expected:
        raise ValueError(
            f"initial_state must have shape {expected}, but has {tuple(initial_state.shape)}. "
            "Give the last state that an earlier call returned."
        )
    if chunk_size < 1 or (num_lanes is not None and num_lanes < 1):
        raise ValueError(
            f"chunk_size and num_lanes must be 1 or more, but are {chunk_size} and {num_lanes}. "
            "Leave them at their defaults."
        )
