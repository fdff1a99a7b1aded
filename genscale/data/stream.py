"""The global stream: which picture stands at which place of an endless, shuffled sequence.

Global position k holds row ``perm(epoch)[k mod n]`` with epoch ``k div n`` and one keyed
permutation an epoch. The stream has no state: where a run stands is the one number
``samples_seen``, so a resumed run, and a run on another number of processes, read the same
pictures at the same positions. Positions also key all randomness of a training step.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from genscale.errors import DataError, ParallelError
from genscale.rng import Purpose, key, permutation


class GlobalStream:
    """An endless sequence of row numbers in which every row occurs once an epoch.

    Args:
        num_items: rows of the data set, n.
        seed: the run's seed.

    Raises:
        DataError: if there are no rows.
    """

    def __init__(self, num_items: int, seed: int) -> None:
        if num_items < 1:
            raise DataError(
                f"A stream needs at least one picture, but num_items={num_items}. "
                "Check the data folder."
            )
        self.num_items = num_items
        self.seed = seed
        self._cached: tuple[int, Tensor] | None = None

    def epoch(self, position: int) -> int:
        """Return the epoch that global position ``position`` lies in, counted from 0."""
        return position // self.num_items

    def permutation(self, epoch: int) -> Tensor:
        """Return the order of an epoch: ``(n,)`` int64, every row once."""
        if self._cached is None or self._cached[0] != epoch:
            order = permutation(key(self.seed, epoch, Purpose.SHUFFLE), self.num_items)
            self._cached = (epoch, order)
        return self._cached[1]

    def rows(self, start: int, count: int) -> Tensor:
        """Return the rows at global positions ``start .. start + count - 1``: int64 ``(count,)``.

        Raises:
            DataError: if ``start`` is negative.
        """
        if start < 0:
            raise DataError(
                f"Global positions count from 0, but position {start} was asked for. "
                "Check samples_seen of the checkpoint."
            )
        parts = []
        while count > 0:
            offset = start % self.num_items
            taken = min(count, self.num_items - offset)
            parts.append(self.permutation(self.epoch(start))[offset : offset + taken])
            start, count = start + taken, count - taken
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


class StreamBatchSampler(Sampler[list[tuple[int, int]]]):
    """Yields one process's share of every global batch, endlessly.

    Optimizer step s covers positions ``start + s * B`` to ``start + (s + 1) * B - 1``. Rank r
    takes the r-th of ``world_size`` contiguous slices and cuts it into ``accumulate`` contiguous
    micro-batches. Which split is chosen changes who computes a sample, never which samples a
    step has or what their positions are.

    Args:
        stream: the sequence of rows.
        global_batch_size: samples of one optimizer step, over all processes and micro-batches, B.
        rank: this process, from 0.
        world_size: number of processes.
        start_position: global position to start at (``samples_seen``).
        accumulate: micro-batches of one optimizer step on each process.

    Yields:
        Lists of (global position, row) pairs, one list a micro-batch.

    Raises:
        ParallelError: if the batch does not divide, or ``rank`` is not below ``world_size``.
    """

    def __init__(
        self,
        stream: GlobalStream,
        *,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start_position: int = 0,
        accumulate: int = 1,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ParallelError(
                f"Rank {rank} does not exist among {world_size} processes. "
                f"Ranks count from 0 to {world_size - 1}."
            )
        if accumulate < 1:
            raise ParallelError(
                f"A step must have at least one micro-batch, but accumulate={accumulate}. "
                "Give 1 or more."
            )
        slices = world_size * accumulate
        if global_batch_size < 1 or global_batch_size % slices:
            near = max(1, global_batch_size // slices) * slices
            raise ParallelError(
                f"batch_size={global_batch_size} is the batch of one optimizer step and must "
                f"divide over {world_size} process(es) times {accumulate} accumulated "
                f"micro-batch(es). Give a multiple of {slices}, e.g. {near} or {near + slices}."
            )
        self.stream = stream
        self.global_batch_size = global_batch_size
        self.rank = rank
        self.world_size = world_size
        self.start_position = start_position
        self.accumulate = accumulate

    @property
    def micro_batch_size(self) -> int:
        """Samples of one forward pass on one process."""
        return self.global_batch_size // (self.world_size * self.accumulate)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.global_batch_size // self.world_size
        begin = self.start_position + self.rank * share
        while True:
            for offset in range(0, share, self.micro_batch_size):
                first = begin + offset
                rows = self.stream.rows(first, self.micro_batch_size).tolist()
                yield list(enumerate(rows, start=first))
            begin += self.global_batch_size
