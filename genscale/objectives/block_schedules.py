"""Noise levels of clips made block by block: tables of levels, and which frame is noised how much.

A scheduling matrix has a row a network call and a column a frame (or a block of frames). Its
numbers count the steps a frame has still to go: S is pure noise, 0 is clean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from genscale.errors import ConfigError, did_you_mean
from genscale.objectives.time_sampler import shifted

Ramp = Literal["cosine", "linear"]


@dataclass(frozen=True)
class ShiftedTable:
    """The levels of a rectified flow as Self-Forcing's program tabulates them (arXiv:2506.08009).

    x_t = (1 - sigma) x_0 + sigma eps with sigma falling from 1 in N steps, moved by the shift;
    the network is fed N sigma. Timesteps are looked up by the nearest one.

    Args:
        shift: s of s sigma / (1 + (s - 1) sigma); above 1 moves levels towards noise.
        num_levels: N.
        sigma_min: where the unshifted levels end.
        extra_step: make the steps N in place of N - 1, so that ``sigma_min`` itself is left out.

    Raises:
        ConfigError: a shift that is not positive, or fewer than two levels.
    """

    shift: float = 5.0
    num_levels: int = 1000
    sigma_min: float = 0.0
    extra_step: bool = True

    def __post_init__(self) -> None:
        if not 0.0 < self.shift < math.inf or self.num_levels < 2:
            raise ConfigError(
                "A table of levels needs a positive shift and at least 2 levels, but shift="
                f"{self.shift} and num_levels={self.num_levels} were given. 5 and 1000 are usual."
            )

    @cached_property
    def sigmas(self) -> Tensor:
        """Levels ``(N,)`` float64, falling."""
        count = self.num_levels + int(self.extra_step)
        even = torch.linspace(1.0, self.sigma_min, count, dtype=torch.float64, device="cpu")
        return shifted(even[: self.num_levels], self.shift)

    @cached_property
    def timesteps(self) -> Tensor:
        """What the network is fed at each level, ``(N,)`` float64."""
        return self.sigmas * self.num_levels

    @cached_property
    def weights(self) -> Tensor:
        """Training weight of each level, ``(N,)`` float64 of sum N: a bell around the middle."""
        off = (self.timesteps - self.num_levels / 2) / self.num_levels
        bell = torch.exp(-2.0 * off**2)
        bell = bell - bell.min()
        return bell * (self.num_levels / bell.sum())

    def place(self, timestep: Tensor) -> Tensor:
        """Return the entry nearest to each timestep, int64 of the same shape."""
        timestep = timestep.to(self.timesteps)
        return (timestep[..., None] - self.timesteps).abs().argmin(-1)

    def sigma_at(self, timestep: Tensor) -> Tensor:
        """Return the level of each timestep."""
        return self.sigmas[self.place(timestep)]

    def weight_at(self, timestep: Tensor) -> Tensor:
        """Return the training weight of each timestep."""
        return self.weights[self.place(timestep)]

    def next_sigma(self, timestep: Tensor) -> Tensor:
        """Return the level one entry on; 0 behind the last."""
        behind = torch.nn.functional.pad(self.sigmas[1:], (0, 1))
        return behind[self.place(timestep)]

    def warped(self, nominal: Tensor) -> Tensor:
        """Return the timesteps at nominal ones of an unshifted table: N is the noisiest, 0 is 0."""
        return torch.nn.functional.pad(self.timesteps, (0, 1))[self.num_levels - nominal]


def pyramid(length: int, steps: int, delay: float) -> Tensor:
    """Return ``(S + int((L - 1) u) + 1, L)`` int64: each column starts u rows after the one before.

    Diffusion forcing's matrix (arXiv:2407.01392): clip(S + int(t u) - m, 0, S) in row m, column t.
    """
    starts = torch.tensor([int(t * delay) for t in range(length)], dtype=torch.int64, device="cpu")
    rows = torch.arange(steps + int((length - 1) * delay) + 1, device="cpu")
    return (steps + starts - rows[:, None]).clamp(0, steps)


def autoregressive(length: int, steps: int) -> Tensor:
    """Return the matrix in which a column starts when the one before is clean."""
    return pyramid(length, steps, steps)


def full_sequence(length: int, steps: int) -> Tensor:
    """Return the matrix ``(S + 1, L)`` in which all columns go together."""
    return pyramid(length, steps, 0.0)


def trapezoid(length: int, steps: int, delay: float, *, fixed: bool = False) -> Tensor:
    """Return the matrix in which both ends go first and the middle last.

    Args:
        length: columns L.
        steps: S.
        delay: rows u between neighbours.
        fixed: mirror the first half at the last column. parity: the official program mirrors it
            at column 0 of a ring, so that with even L the column in the middle stays at 0, and
            the last column goes with the second one.
    """
    half = (length + 1) // 2
    rows = torch.arange(steps + int(half * delay), device="cpu")
    matrix = torch.zeros(len(rows), length, dtype=torch.int64, device="cpu")
    for t in range(half):
        column = (steps + int(t * delay) - rows).clamp(0, steps)
        matrix[:, t] = column
        matrix[:, length - 1 - t if fixed else -t] = column
    return matrix


@dataclass(frozen=True, slots=True)
class Staircase:
    """Which frame is stepped at which call, as SkyReels-V2 arranges it (arXiv:2504.13074).

    Shapes:
        index: ``(M, F)`` int64 steps taken after each call: 0 not begun, T the last step, T + 1
            clean before.
        update: ``(M, F)`` bool, which frames the call steps.
        window: ``(M, 2)`` int64, the frames ``start .. end - 1`` that the network is shown.
    """

    index: Tensor
    update: Tensor
    window: Tensor


def staircase(
    num_frames: int,
    steps: int,
    *,
    delay: int,
    window: int,
    ready: int = 0,
    block_size: int = 1,
) -> Staircase:
    """Let every block start ``delay`` calls after the one before, within a window that slides.

    Args:
        num_frames: frames F, in blocks.
        steps: steps T of a frame.
        delay: calls between the starts of neighbours ("ar_step"), T at most; 0 steps all at once.
        window: frames the network is shown at a time ("base_num_frames").
        ready: frames that are clean to begin with.
        block_size: frames that go together.

    Raises:
        ConfigError: a delay so small that more blocks would be under way than the window holds.
    """
    blocks, shown, known = (n // block_size for n in (num_frames, window, ready))
    if shown < blocks:
        check_delay(delay, steps, shown, setting="delay")
    apart = min(delay, steps)
    taken = torch.zeros(blocks, dtype=torch.int64, device="cpu")
    taken[known:] = -apart * torch.arange(blocks - known, device="cpu")
    calls = torch.arange(1, steps + apart * max(blocks - known - 1, 0) + 1, device="cpu")
    if known >= blocks:
        calls = calls[:0]
    index = (calls[:, None] + taken).clamp(0, steps + 1)
    index[:, :known] = steps + 1
    update = (index > 0) & (index <= steps)
    end = (index > 0).sum(1).clamp(min(shown, blocks), blocks)
    bounds = torch.stack(((end - shown).clamp_min(0), end), dim=1)
    return Staircase(
        index.repeat_interleave(block_size, 1),
        update.repeat_interleave(block_size, 1),
        bounds * block_size,
    )


def check_delay(delay: float, steps: int, blocks: int, *, setting: str) -> None:
    """Refuse a delay at which more than ``blocks`` blocks would be under way at a time.

    Raises:
        ConfigError: naming the ``setting``.
    """
    least = math.ceil(steps / max(blocks, 1))
    if delay < least:
        raise ConfigError(
            f"{setting} must be at least {least} (steps over blocks in the window: {steps} / "
            f"{blocks}), so that the window holds every block under way, but is {delay:g}. Give "
            f"{setting}={least}, or a wider window."
        )


def ramp(length: int, low: float, high: float, kind: Ramp = "cosine") -> list[float]:
    """Return a number a chunk, rising from ``low`` towards ``high``.

    Chunk c of n has low + (high - low) c / n, or with ``"cosine"``
    low + (high - low) (1 - cos(pi c / n)) / 2 (arXiv:2511.22973).

    Raises:
        ConfigError: an unknown kind.
    """
    known = get_args(Ramp)
    if kind not in known:
        raise ConfigError(
            f"A ramp must be one of {', '.join(known)}, but is {kind!r}."
            f"{did_you_mean(str(kind), known)}"
        )
    places = [c / length for c in range(length)]
    if kind == "cosine":
        places = [0.5 * (1.0 - math.cos(math.pi * place)) for place in places]
    return [low + place * (high - low) for place in places]


def fused_snr_weights(snr: Tensor, *, clip: float = 5.0, decay: float = 0.96) -> Tensor:
    """Return weights ``(B, F)`` of v-prediction errors by the noise of a frame and of its past.

    Diffusion forcing's fused signal-to-noise ratio (arXiv:2407.01392, appendix): a frame whose
    past is clean counts as a cleaner one. With s = SNR / clip, and c the moving average of
    min(s, 1) over earlier frames, fused = 1 - (1 - decay c) (1 - s); the weight is
    clip fused' / (clip fused + 1), fused' having min(s, 1) in place of s.

    Args:
        snr: ``(B, F)`` alpha^2 / sigma^2.
        clip: the largest ratio that counts.
        decay: of the moving average.
    """
    share = snr / clip
    capped = share.clamp(max=1.0)
    past = torch.zeros_like(share[:, 0])
    history = []
    for frame in range(share.shape[1]):
        history.append(past)
        # the first frame has no average to join
        past = capped[:, 0] if frame == 0 else decay * past + (1.0 - decay) * capped[:, frame]
    kept = 1.0 - decay * torch.stack(history, dim=1)
    fused, fused_capped = 1.0 - kept * (1.0 - share), 1.0 - kept * (1.0 - capped)
    return clip * fused_capped / (clip * fused + 1.0)
