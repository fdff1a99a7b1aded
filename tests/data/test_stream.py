"""The global stream: any start is a slice of the whole, any split a partition of it."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from genscale.data.stream import GlobalStream, StreamBatchSampler
from genscale.errors import DataError, ParallelError


def pairs(stream: GlobalStream, count: int, **settings: int) -> list[list[tuple[int, int]]]:
    return list(islice(StreamBatchSampler(stream, **settings), count))


def test_every_row_occurs_once_an_epoch() -> None:
    stream = GlobalStream(37, seed=5)
    for epoch in range(4):
        rows = stream.rows(37 * epoch, 37)
        assert sorted(rows.tolist()) == list(range(37))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    stream = GlobalStream(100, seed=5)
    assert not torch.equal(stream.rows(0, 100), stream.rows(100, 100))
    assert not torch.equal(stream.rows(0, 100), GlobalStream(100, seed=6).rows(0, 100))
    assert not torch.equal(stream.rows(0, 100), torch.arange(100))


@pytest.mark.parametrize("start", [0, 1, 9, 10, 11, 29, 30, 57])
def test_a_run_that_starts_anywhere_reads_a_slice_of_the_whole(start: int) -> None:
    whole = GlobalStream(10, seed=3).rows(0, 90)
    assert torch.equal(GlobalStream(10, seed=3).rows(start, 25), whole[start : start + 25])


def test_one_read_may_span_several_epochs() -> None:
    stream = GlobalStream(4, seed=0)
    expected = torch.cat([stream.permutation(1)[2:], stream.permutation(2), stream.permutation(3)])
    assert torch.equal(stream.rows(6, 10), expected)


def test_positions_beyond_31_bits() -> None:
    stream = GlobalStream(1000, seed=1)
    start = 2**31 - 8  # the step crosses 2**31
    [batch] = pairs(stream, 1, global_batch_size=16, start_position=start)
    assert [position for position, _ in batch] == list(range(start, start + 16))
    # 2**31 = 2147483648, so position 2**31 lies in epoch 2147483 at place 648
    assert batch[8][1] == int(stream.permutation(2147483)[648])
    [far] = pairs(stream, 1, global_batch_size=2, start_position=2**40)
    assert far[0][0] == 2**40


def test_reading_nothing_gives_nothing() -> None:
    assert GlobalStream(3, seed=0).rows(5, 0).tolist() == []


def test_an_epoch_is_counted_from_the_position() -> None:
    stream = GlobalStream(10, seed=0)
    assert [stream.epoch(k) for k in (0, 9, 10, 25)] == [0, 0, 1, 2]


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (1, 3), (2, 3), (12, 1)])
def test_ranks_and_micro_batches_partition_every_global_batch(
    world_size: int, accumulate: int
) -> None:
    steps, size, start = 5, 12, 24
    whole = pairs(GlobalStream(17, 2), steps, global_batch_size=size, start_position=start)
    parts = [
        pairs(
            GlobalStream(17, 2),
            steps * accumulate,
            global_batch_size=size,
            rank=rank,
            world_size=world_size,
            start_position=start,
            accumulate=accumulate,
        )
        for rank in range(world_size)
    ]
    for step in range(steps):
        micro = slice(step * accumulate, (step + 1) * accumulate)
        union = [pair for part in parts for batch in part[micro] for pair in batch]
        assert union == whole[step]


def test_a_process_takes_a_contiguous_slice_and_cuts_it_in_order() -> None:
    sampler = StreamBatchSampler(
        GlobalStream(50, 0), global_batch_size=8, rank=1, world_size=2, accumulate=2
    )
    assert sampler.micro_batch_size == 2
    positions = [[position for position, _ in batch] for batch in islice(sampler, 4)]
    assert positions == [[4, 5], [6, 7], [12, 13], [14, 15]]


def test_resuming_in_the_middle_equals_not_stopping() -> None:
    settings = {"global_batch_size": 6, "rank": 1, "world_size": 3}
    whole = pairs(GlobalStream(11, 7), 10, **settings)
    resumed = pairs(GlobalStream(11, 7), 6, start_position=4 * 6, **settings)
    assert resumed == whole[4:]


def test_a_sampler_can_be_read_again_from_its_start() -> None:
    sampler = StreamBatchSampler(GlobalStream(11, 7), global_batch_size=4)
    assert list(islice(sampler, 3)) == list(islice(sampler, 3))


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(
        ParallelError,
        match=r"batch_size=10 .* 4 process\(es\) times 2 .* multiple of 8, e.g. 8 or 16\.",
    ):
        StreamBatchSampler(GlobalStream(9, 0), global_batch_size=10, world_size=4, accumulate=2)
    with pytest.raises(ParallelError, match=r"batch_size=2 .* multiple of 4, e.g. 4 or 8\."):
        StreamBatchSampler(GlobalStream(9, 0), global_batch_size=2, world_size=4)


def test_impossible_ranks_counts_and_positions_are_refused() -> None:
    stream = GlobalStream(9, 0)
    with pytest.raises(ParallelError, match=r"Rank 2 does not exist among 2 processes"):
        StreamBatchSampler(stream, global_batch_size=4, rank=2, world_size=2)
    with pytest.raises(ParallelError, match=r"accumulate=0"):
        StreamBatchSampler(stream, global_batch_size=4, accumulate=0)
    with pytest.raises(DataError, match=r"num_items=0"):
        GlobalStream(0, seed=0)
    with pytest.raises(DataError, match=r"position -1 was asked for"):
        stream.rows(-1, 2)
