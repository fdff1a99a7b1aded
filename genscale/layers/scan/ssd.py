"""The scan of Mamba-2 (arXiv:2405.21060): one decay a head, computed as matrix products."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.layers.norm import no_autocast, upcast
from genscale.layers.scan.selective import selective_scan


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] | None = None,
    initial_state: Tensor | None = None,
    implementation: Literal["chunked", "reference"] = "chunked",
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Run h_t = exp(Delta_t A) h_{t-1} + Delta_t x_t B_t^T, y_t = h_t C_t + D x_t in every head.

    This is :func:`~genscale.layers.scan.selective.selective_scan` with H P channels, where all P
    channels of a head share step size and rate. Computed in float32 (float64 where an input is).

    Args:
        x: ``(B, L, H, P)`` input; heads that follow each other belong to the same of G groups.
        dt: ``(B, L, H)`` raw step sizes.
        A: ``(H,)`` rates, negative.
        B: ``(B, L, G, N)`` input vectors.
        C: ``(B, L, G, N)`` output vectors.
        D: ``(H,)`` or ``(H, P)`` skip.
        z: ``(B, L, H, P)`` gate: the result is multiplied by silu(z), after the skip.
        dt_bias: ``(H,)`` added to ``dt``.
        dt_softplus: Delta = softplus(dt + bias) instead of dt + bias.
        dt_limit: Delta is clamped between these two.
        initial_state: ``(B, H, P, N)`` state before the first step; default zero.
        implementation: ``"chunked"``, or ``"reference"``: the sequential scan.
        chunk_size: steps that are computed as one matrix; default 32 up to 512 steps and 64
            beyond. It changes rounding only.

    Returns:
        The output ``(B, L, H, P)`` in the type of ``x``, and the last state ``(B, H, P, N)`` in
        float32 (float64); both differentiable in all arguments.

    Raises:
        ValueError: shapes or settings do not fit together.
    """
    _check(x, dt, A, B, C, initial_state, chunk_size)
    if implementation not in ("chunked", "reference"):
        raise ValueError(
            f"implementation must be 'chunked' or 'reference', but is {implementation!r}. "
            "Use 'chunked'; the other is its reference."
        )
    # matrix products would be rounded to half precision under autocast
    with no_autocast(x.device):
        wide = upcast(x).dtype
        values, step = x.to(wide), dt.to(wide)
        if dt_bias is not None:
            step = step + dt_bias.to(wide)
        if dt_softplus:
            step = F.softplus(step)
        if dt_limit is not None:
            step = step.clamp(*dt_limit)
        if initial_state is None:
            initial = values.new_zeros(len(x), *x.shape[2:], B.shape[3])
        else:
            initial = initial_state.to(wide)
        arguments = (values, step, A.to(wide), B.to(wide), C.to(wide), initial)
        if implementation == "reference":
            y, last = _sequential(*arguments)
        else:
            y, last = _chunked(*arguments, chunk_size or (32 if x.shape[1] <= 512 else 64))
        if D is not None:
            y = y + values * D.to(wide).view(x.shape[2], -1)
        if z is not None:
            y = y * F.silu(z.to(wide))
        return y.to(x.dtype), last


def _sequential(
    x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the scan as a Mamba-1 scan over all H P channels."""
    heads, size = x.shape[2:]
    y, last = selective_scan(
        x.flatten(2).transpose(1, 2),
        step.repeat_interleave(size, dim=2).transpose(1, 2),
        A.repeat_interleave(size).unsqueeze(1).expand(-1, B.shape[3]),
        B.permute(0, 2, 3, 1),
        C.permute(0, 2, 3, 1),
        initial_state=initial.flatten(1, 2),
        implementation="reference",
    )
    return y.transpose(1, 2).unflatten(2, (heads, size)), last.unflatten(1, (heads, size))


def _chunked(
    x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Compute chunks of T steps as masked T x T matrices and carry the state between them."""
    batch, length, heads, _ = x.shape
    groups = B.shape[2]
    size = min(chunk_size, length)
    padding = -length % size
    if padding:  # a step size of zero leaves the state as it is
        x, B, C = (F.pad(value, (0, 0, 0, 0, 0, padding)) for value in (x, B, C))
        step = F.pad(step, (0, 0, 0, padding))

    # b batch, c chunk, g group, r head of the group, t s step of the chunk, p n state
    x = x.unflatten(2, (groups, -1)).unflatten(1, (-1, size)).permute(0, 1, 3, 4, 2, 5)  # bcgrtp
    step = step.unflatten(2, (groups, -1)).unflatten(1, (-1, size)).permute(0, 1, 3, 4, 2)  # bcgrt
    B = B.unflatten(1, (-1, size)).permute(0, 1, 3, 2, 4)  # bcgtn
    C = C.unflatten(1, (-1, size)).permute(0, 1, 3, 2, 4)
    total = (step * A.view(groups, -1, 1)).cumsum(-1)  # S_t: log of the decay since the start
    # exp(S_t - S_s) for s <= t only: masked before the exponential, which the rest would overflow
    future = torch.ones(size, size, dtype=torch.bool, device=x.device).triu(1)
    decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(future, -torch.inf).exp()
    mixing = (C @ B.transpose(-1, -2)).unsqueeze(3) * decay * step.unsqueeze(-2)  # bcgrts
    y = mixing @ x

    to_end = (torch.exp(total[..., -1:] - total) * step).unsqueeze(-1)
    added = (x * to_end).transpose(-1, -2) @ B.unsqueeze(3)  # bcgrpn
    whole = total[..., -1].exp().unsqueeze(-1).unsqueeze(-1)
    state, starts = initial.unflatten(1, (groups, -1)), []
    for a, b in zip(whole.unbind(1), added.unbind(1), strict=True):
        starts.append(state)
        state = torch.addcmul(b, a, state)
    carried = C.unsqueeze(3) @ torch.stack(starts, dim=1).transpose(-1, -2)  # bcgrtp
    y = torch.addcmul(y, carried, total.exp().unsqueeze(-1))
    y = y.permute(0, 1, 4, 2, 3, 5).reshape(batch, length + padding, heads, -1)
    return y[:, :length], state.flatten(1, 2)


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    chunk_size: int | None,
) -> None:
    if x.dim() != 4 or 0 in x.shape or dt.shape != x.shape[:3] or A.shape != x.shape[2:3]:
        raise ValueError(
            "x, dt and A must have shapes (B, L, H, P), (B, L, H) and (H,), none of them 0, but "
            f"have {tuple(x.shape)}, {tuple(dt.shape)} and {tuple(A.shape)}. Give one step size "
            "and one rate a head."
        )
    groups = B.shape[2] if B.dim() == 4 else 0
    if B.shape != C.shape or groups < 1 or B.shape[:2] != x.shape[:2] or x.shape[2] % groups:
        raise ValueError(
            f"B and C must have shape ({x.shape[0]}, {x.shape[1]}, G, N) with G dividing "
            f"{x.shape[2]} heads, but have {tuple(B.shape)} and {tuple(C.shape)}. "
            "Check their layout: the state comes last."
        )
    expected = (x.shape[0], *x.shape[2:], B.shape[3])
    if initial_state is not None and tuple(initial_state.shape) != expected:
        raise ValueError(
            f"initial_state must have shape {expected}, but has {tuple(initial_state.shape)}. "
            "Give the last state that an earlier call returned."
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(
            f"chunk_size must be 1 or more, but is {chunk_size}. Leave it at its default."
        )
