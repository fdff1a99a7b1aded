"""Which blocks of a video are under way at each step of sampling, and which become clean."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor

from genscale.layers.block_mask import block_spans
from genscale.objectives.block_schedules import autoregressive, full_sequence, pyramid

BlockScheduleName = Literal["autoregressive", "pyramid", "staircase", "full_sequence"]


@dataclass(frozen=True, slots=True)
class BlockStep:
    """What one step does; frames are counted from the beginning of the video.

    Attributes:
        first: the first frame under way; those before are clean and in the network's memory.
        end: the frame after the last one under way.
        finished: the frame after the last one that is clean after the step.
        refreshes: some become clean, and others will be made after them.
    """

    first: int
    end: int
    finished: int
    refreshes: bool


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """The steps of a whole video.

    Attributes:
        sizes: frames of each block.
        left: ``(M + 1, F)`` int64 on the CPU, steps that each frame has still to go before each
            of the M steps and at the end.
        steps: what each of the M does.
        refreshes_before: refreshes before each of them, and in all.
    """

    sizes: tuple[int, ...]
    left: Tensor
    steps: tuple[BlockStep, ...]
    refreshes_before: tuple[int, ...]

    @property
    def num_frames(self) -> int:
        """Frames of the video."""
        return sum(self.sizes)

    @property
    def most_under_way(self) -> int:
        """Frames that the network is given at most at once."""
        return max(step.end - step.first for step in self.steps)


@lru_cache(maxsize=32)
def block_plan(
    schedule: BlockScheduleName,
    frames: int,
    steps: int,
    *,
    block_size: int,
    delay: float = 1.0,
    independent_first_frame: bool = False,
) -> BlockPlan:
    """Return the plan of a video of ``frames``.

    Args:
        schedule: ``autoregressive`` makes a block after the other; in a ``pyramid`` or a
            ``staircase`` each starts ``delay`` steps after the one before; in ``full_sequence``
            all go together.
        frames: F.
        steps: steps S of a block.
        block_size: frames k a block.
        delay: see ``schedule``; S at most, as no step is idle.
        independent_first_frame: the first frame is a block of its own.

    Raises:
        ValueError: frames that do not divide into blocks.
    """
    spans = block_spans(frames, block_size, short_first=independent_first_frame)
    sizes = [stop - start for start, stop in spans]
    if schedule == "autoregressive":
        matrix = autoregressive(len(sizes), steps)
    elif schedule == "full_sequence":
        matrix = full_sequence(len(sizes), steps)
    else:
        matrix = pyramid(len(sizes), steps, min(delay, steps))
    ends = [0, *accumulate(sizes)]
    rows = []
    for now, then in pairwise(matrix):
        moving = (then < now).nonzero()[:, 0]
        first, last = int(moving[0]), int(moving[-1]) + 1
        finished = int((then == 0).sum())
        refreshes = finished > first and finished < len(sizes)
        rows.append(BlockStep(ends[first], ends[last], ends[finished], refreshes))
    return BlockPlan(
        sizes=tuple(sizes),
        left=matrix.repeat_interleave(torch.tensor(sizes), dim=1),
        steps=tuple(rows),
        refreshes_before=(0, *accumulate(int(row.refreshes) for row in rows)),
    )
