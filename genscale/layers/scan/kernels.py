"""Bodies of the Triton kernels of the selective scan; :mod:`genscale.layers.scan.fused` runs them.

    Delta = softplus(raw + bias),  h_t = exp(Delta_t A) h_{t-1} + Delta_t B_t u_t,
    y_t = (C_t . h_t + skip u_t) silu(z_t)

A program owns BLOCK channels of one group of one sample and goes through the sequence in tiles of
STEPS steps. Inside a tile the recurrence is an associative scan of the pairs (decay, drive); the
state between tiles is added to the drive of the first step. ``h`` is ``(STEPS, BLOCK, STATES)`` in
registers, with the numbers of state padded to a power of two. Every tile starts from a state that
the forward kernel keeps and the backward kernel reads, so that only one tile is computed again at
a time. No two programs write the same address: sums over blocks and samples are made afterwards.

``paths`` says which cell a step visits, for every group; inputs are read from and outputs written
to where cells lie. Steps beyond the end have a step size of zero, which keeps the state.

Triton is imported by ``fused``, which puts ``tl`` and the compiled helpers into this module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import triton.language as tl


def then(
    decay_1: tl.tensor, drive_1: tl.tensor, decay_2: tl.tensor, drive_2: tl.tensor
) -> tl.tensor:
    """Compose h -> decay h + drive with a second such step."""
    return decay_1 * decay_2, decay_2 * drive_1 + drive_2


def softplus(x: tl.tensor) -> tl.tensor:
    """log(1 + exp(x)), exact for small exponentials: log1p(e) = log(w) e / (w - 1), w = 1 + e."""
    e = tl.exp(tl.minimum(x, 20.0))
    w = 1.0 + e
    small = w == 1.0
    log1p = tl.where(small, e, tl.log(w) * (e / tl.where(small, 1.0, w - 1.0)))
    return tl.where(x > 20.0, x, log1p)


def load_tile(
    pointer: tl.tensor,
    strides: tl.tuple,
    sample: tl.tensor,
    group: tl.tensor,
    cells: tl.tensor,
    columns: tl.tensor,
    mask: tl.tensor,
) -> tl.tensor:
    """Read ``(cells, columns)`` of a tensor ``(B, L, G, columns)`` as float32."""
    base = pointer + sample * strides[0] + group.to(tl.int64) * strides[2]
    where = base + cells[:, None] * strides[1] + columns[None, :] * strides[3]
    return tl.load(where, mask=mask, other=0.0).to(tl.float32)


def find_cells(
    paths_ptr: tl.tensor,
    group: tl.tensor,
    step: tl.tensor,
    length: tl.tensor,
    HAS_PATHS: tl.constexpr,
) -> tl.tensor:
    """Return the cells that steps visit."""
    cells = step
    if HAS_PATHS:
        cells = tl.load(paths_ptr + group * length + step, mask=step < length, other=0)
    return cells.to(tl.int64)


def scan_tile(
    decay: tl.tensor, drive: tl.tensor, state: tl.tensor, STEPS: tl.constexpr
) -> tl.tensor:
    """Return all states h ``(STEPS, BLOCK, STATES)`` after a state ``(BLOCK, STATES)``."""
    first = (tl.arange(0, STEPS) == 0)[:, None, None]
    drive += tl.where(first, decay * state[None, :, :], 0.0)
    _, h = tl.associative_scan((decay, drive), 0, then)
    return h


def scan_tile_backwards(
    decay: tl.tensor, source: tl.tensor, carry: tl.tensor, STEPS: tl.constexpr
) -> tl.tensor:
    """Return the adjoint G_t = source_t + a_{t+1} G_{t+1}; ``carry`` ends the tile."""
    row = tl.arange(0, STEPS)
    source += tl.where((row == STEPS - 1)[:, None, None], carry[None, :, :], 0.0)
    following = tl.broadcast_to(tl.minimum(row + 1, STEPS - 1)[:, None, None], decay.shape)
    _, adjoint = tl.associative_scan(
        (tl.gather(decay, following, 0), source), 0, then, reverse=True
    )
    return adjoint


def scan_forward(
    u_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    A_ptr: tl.tensor,
    B_ptr: tl.tensor,
    C_ptr: tl.tensor,
    skip_ptr: tl.tensor,
    z_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    initial_ptr: tl.tensor,
    paths_ptr: tl.tensor,
    y_ptr: tl.tensor,
    last_ptr: tl.tensor,
    kept_ptr: tl.tensor,
    u_s: tl.tuple,
    delta_s: tl.tuple,
    B_s: tl.tuple,
    C_s: tl.tuple,
    z_s: tl.tuple,
    length: tl.tensor,
    channels: tl.tensor,
    states: tl.tensor,
    HAS_SKIP: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_PATHS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    STATES: tl.constexpr,
) -> None:
    """Write y ``(B, L, G, D)``, the last state ``(B, G, D, N)`` and the state before each tile.

    ``u``, ``delta``, ``z`` ``(B, L, G, D)`` and ``B``, ``C`` ``(B, L, G, N)`` have any strides;
    everything else is contiguous: ``A`` ``(G, D, N)``, ``skip``, ``bias`` ``(G, D)``, ``initial``
    ``(B, G, D, N)``, ``paths`` ``(G, L)``, kept states ``(tiles, B, G, D, N)``.
    """
    group, groups = tl.program_id(1), tl.num_programs(1)
    sample, samples = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    d, n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, STATES)
    row = tl.arange(0, STEPS)
    in_d, in_n = d < channels, n < states
    in_dn = in_d[:, None] & in_n[None, :]
    place = group * channels + d  # the channel, over all groups
    of_state = place[:, None] * states + n[None, :]
    state_size = groups * channels * states
    rates = tl.load(A_ptr + of_state, mask=in_dn, other=0.0)
    state = tl.zeros([BLOCK, STATES], tl.float32)
    if HAS_INITIAL:
        state += tl.load(initial_ptr + sample * state_size + of_state, mask=in_dn, other=0.0)
    bias, skip = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + place, mask=in_d, other=0.0)
    if HAS_SKIP:
        skip += tl.load(skip_ptr + place, mask=in_d, other=0.0)
    for tile in range(0, tl.cdiv(length, STEPS)):
        tl.store(kept_ptr + (tile * samples + sample) * state_size + of_state, state, mask=in_dn)
        step = tile * STEPS + row
        cells = find_cells(paths_ptr, group, step, length, HAS_PATHS)
        in_ld = (step < length)[:, None] & in_d[None, :]
        in_ln = (step < length)[:, None] & in_n[None, :]
        u = load_tile(u_ptr, u_s, sample, group, cells, d, in_ld)
        delta = load_tile(delta_ptr, delta_s, sample, group, cells, d, in_ld) + bias[None, :]
        if SOFTPLUS:
            delta = softplus(delta)
        delta = tl.where(in_ld, delta, 0.0)
        write = load_tile(B_ptr, B_s, sample, group, cells, n, in_ln)
        read = load_tile(C_ptr, C_s, sample, group, cells, n, in_ln)
        decay = tl.exp(delta[:, :, None] * rates[None, :, :])
        h = scan_tile(decay, (delta * u)[:, :, None] * write[:, None, :], state, STEPS)
        state = tl.sum(tl.where((row == STEPS - 1)[:, None, None], h, 0.0), axis=0)
        y = tl.sum(h * read[:, None, :], axis=2) + skip[None, :] * u
        if HAS_Z:
            z = load_tile(z_ptr, z_s, sample, group, cells, d, in_ld)
            y = y * (z * tl.sigmoid(z))
        where = (sample * length + cells[:, None]) * (groups * channels) + place[None, :]
        tl.store(y_ptr + where, y.to(y_ptr.dtype.element_ty), mask=in_ld)
    tl.store(last_ptr + sample * state_size + of_state, state, mask=in_dn)


def scan_backward(
    grad_y_ptr: tl.tensor,
    grad_last_ptr: tl.tensor,
    u_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    A_ptr: tl.tensor,
    B_ptr: tl.tensor,
    C_ptr: tl.tensor,
    skip_ptr: tl.tensor,
    z_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    paths_ptr: tl.tensor,
    kept_ptr: tl.tensor,
    grad_u_ptr: tl.tensor,
    grad_delta_ptr: tl.tensor,
    grad_z_ptr: tl.tensor,
    part_A_ptr: tl.tensor,
    part_B_ptr: tl.tensor,
    part_C_ptr: tl.tensor,
    part_skip_ptr: tl.tensor,
    part_bias_ptr: tl.tensor,
    grad_initial_ptr: tl.tensor,
    y_s: tl.tuple,
    u_s: tl.tuple,
    delta_s: tl.tuple,
    B_s: tl.tuple,
    C_s: tl.tuple,
    z_s: tl.tuple,
    length: tl.tensor,
    channels: tl.tensor,
    states: tl.tensor,
    HAS_LAST: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_PATHS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    STATES: tl.constexpr,
) -> None:
    """Write the gradients of all inputs; layouts as in :func:`scan_forward`.

    With g = dL/dy, the adjoint G_t = g_t C_t + a_{t+1} G_{t+1} is scanned backwards in time, and
    W_t = G_t a_t h_{t-1} is the gradient of the exponent Delta_t A. Gradients of ``u``, ``delta``
    and ``z`` are ``(B, L, G, D)``; those of ``B`` and ``C`` come as one summand a block of
    channels, ``(blocks, B, L, G, N)``; those of ``A``, ``skip`` and ``bias`` as one a sample.
    """
    block, group, groups = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    sample, samples = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    d, n = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, STATES)
    row = tl.arange(0, STEPS)
    first = (row == 0)[:, None, None]
    in_d, in_n = d < channels, n < states
    in_dn = in_d[:, None] & in_n[None, :]
    place = group * channels + d
    of_state = place[:, None] * states + n[None, :]
    state_size = groups * channels * states
    rates = tl.load(A_ptr + of_state, mask=in_dn, other=0.0)
    bias, skip = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + place, mask=in_d, other=0.0)
    if HAS_SKIP:
        skip += tl.load(skip_ptr + place, mask=in_d, other=0.0)
    carry = tl.zeros([BLOCK, STATES], tl.float32)  # gradient of the state after the tile
    if HAS_LAST:
        carry += tl.load(grad_last_ptr + sample * state_size + of_state, mask=in_dn, other=0.0)
    sum_A = tl.zeros([BLOCK, STATES], tl.float32)
    sum_skip, sum_bias = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    tiles = tl.cdiv(length, STEPS)
    for back in range(0, tiles):
        tile = tiles - 1 - back
        kept = kept_ptr + (tile * samples + sample) * state_size
        state = tl.load(kept + of_state, mask=in_dn, other=0.0)
        step = tile * STEPS + row
        cells = find_cells(paths_ptr, group, step, length, HAS_PATHS)
        in_ld = (step < length)[:, None] & in_d[None, :]
        in_ln = (step < length)[:, None] & in_n[None, :]
        u = load_tile(u_ptr, u_s, sample, group, cells, d, in_ld)
        raw = load_tile(delta_ptr, delta_s, sample, group, cells, d, in_ld) + bias[None, :]
        delta = raw
        if SOFTPLUS:
            delta = softplus(raw)
        delta = tl.where(in_ld, delta, 0.0)
        driven = delta * u
        write = load_tile(B_ptr, B_s, sample, group, cells, n, in_ln)
        read = load_tile(C_ptr, C_s, sample, group, cells, n, in_ln)
        decay = tl.exp(delta[:, :, None] * rates[None, :, :])
        h = scan_tile(decay, driven[:, :, None] * write[:, None, :], state, STEPS)

        g = load_tile(grad_y_ptr, y_s, sample, group, cells, d, in_ld)
        where = (sample * length + cells[:, None]) * (groups * channels) + place[None, :]
        if HAS_Z:
            z = load_tile(z_ptr, z_s, sample, group, cells, d, in_ld)
            gate = tl.sigmoid(z)
            y = tl.sum(h * read[:, None, :], axis=2) + skip[None, :] * u
            tl.store(grad_z_ptr + where, g * y * gate * (1.0 + z * (1.0 - gate)), mask=in_ld)
            g = g * (z * gate)
        adjoint = scan_tile_backwards(decay, g[:, :, None] * read[:, None, :], carry, STEPS)
        carried = decay * adjoint
        carry = tl.sum(tl.where(first, carried, 0.0), axis=0)
        previous = tl.broadcast_to(tl.maximum(row - 1, 0)[:, None, None], h.shape)
        exponent = carried * tl.where(first, state[None, :, :], tl.gather(h, previous, 0))  # W

        along_B = tl.sum(adjoint * write[:, None, :], axis=2)
        slope = tl.sum(exponent * rates[None, :, :], axis=2) + u * along_B
        if SOFTPLUS:
            slope = slope * tl.sigmoid(raw)
        slope = tl.where(in_ld, slope, 0.0)
        tl.store(grad_u_ptr + where, delta * along_B + skip[None, :] * g, mask=in_ld)
        tl.store(grad_delta_ptr + where, slope, mask=in_ld)
        part = (block * samples + sample) * length + cells[:, None]
        part = (part * groups + group) * states + n[None, :]
        tl.store(part_B_ptr + part, tl.sum(adjoint * driven[:, :, None], axis=1), mask=in_ln)
        tl.store(part_C_ptr + part, tl.sum(h * g[:, :, None], axis=1), mask=in_ln)
        sum_A += tl.sum(exponent * delta[:, :, None], axis=0)
        sum_skip += tl.sum(g * u, axis=0)
        sum_bias += tl.sum(slope, axis=0)
    tl.store(grad_initial_ptr + sample * state_size + of_state, carry, mask=in_dn)
    tl.store(part_A_ptr + sample * state_size + of_state, sum_A, mask=in_dn)
    if HAS_SKIP:
        tl.store(part_skip_ptr + sample * (groups * channels) + place, sum_skip, mask=in_d)
    if HAS_BIAS:
        tl.store(part_bias_ptr + sample * (groups * channels) + place, sum_bias, mask=in_d)
