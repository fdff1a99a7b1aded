"""A cache of frames keeps what its policy says, and branches of a trajectory do not disturb it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from genscale.layers.video_cache import (
    VIDEO_CACHE,
    Cache,
    CachePolicy,
    claim,
    commit_frames,
    empty_cache,
    frame_numbers,
    frames_committed,
    frames_held,
    frames_provisional,
    write,
    write_salience,
)
from genscale.objectives.memory import cat_tensors, put_rows, take_rows

TOKENS, SIZE = 3, 4


def begin(policy: CachePolicy, batch: int = 2, frames: int = 4) -> Cache:
    return empty_cache(
        policy,
        num_layers=2,
        batch=batch,
        num_heads=1,
        tokens_per_frame=TOKENS,
        head_size=SIZE,
        frames=frames,
        device="cpu",
        dtype=torch.float32,
        topic_size=2,
    )


def see(cache: Cache, values: list[float]) -> Cache:
    """Write one provisional frame for each value, whose keys and values are filled with it."""
    cache = claim(cache, len(values))
    batch = len(cache["counts"])
    frames = torch.tensor(values).repeat_interleave(TOKENS).view(1, 1, -1, 1)
    frames = frames.expand(batch, 1, -1, SIZE)
    for layer in range(2):
        write(cache, layer, frames, -frames)
        if "bank" in cache:
            mass = torch.ones(batch, len(values) * TOKENS)
            write_salience(cache, layer, mass, torch.tensor([1.0, 0.0]).expand(batch, 2))
    return cache


def commit(cache: Cache, frames: int) -> Cache:
    kept: Cache = commit_frames({VIDEO_CACHE: cache}, frames)[VIDEO_CACHE]
    return kept


def contents(cache: Cache) -> list[float]:
    """What the held frames of the first particle were filled with."""
    held = frames_held(cache)
    keys, values = cache["keys"][1][0, 0, :held, 0, 0], cache["values"][1][0, 0, :held, 0, 0]
    assert torch.equal(keys, -values)
    return keys.tolist()


def grow(policy: CachePolicy, blocks: int, **settings: Any) -> Cache:
    cache = begin(policy, **settings)
    for block in range(blocks):
        numbers = [float(block * 2), float(block * 2 + 1)]
        cache = commit(see(cache, numbers), 2)
    return cache


# policies


def test_a_full_cache_keeps_all_and_grows() -> None:
    cache = grow(CachePolicy("full", block_size=2), 5)
    assert contents(cache) == list(range(10))
    assert frame_numbers(cache) == list(range(10))


# with window w a block sees w frames, its own included: w - block - sink recent ones stay
@pytest.mark.parametrize(
    ("window", "sink", "kept"),
    [(6, 0, [6, 7, 8, 9]), (6, 2, [0, 1, 8, 9]), (5, 1, [0, 8, 9]), (2, 0, [])],
)
def test_a_rolling_cache_keeps_the_sink_and_the_last_frames(
    window: int, sink: int, kept: list[int]
) -> None:
    cache = grow(CachePolicy("rolling", block_size=2, window=window, sink=sink), 5)
    assert contents(cache) == kept
    assert frame_numbers(cache) == kept
    assert frames_committed(cache) == 10


def test_a_rolling_cache_needs_the_same_memory_for_any_length() -> None:
    policy = CachePolicy("rolling", block_size=2, window=6, sink=2)

    def numbers(blocks: int) -> int:
        cache = grow(policy, blocks, frames=6)
        tensors = [*cache["keys"], *cache["values"], cache["ids"], cache["counts"]]
        return sum(tensor.numel() for tensor in tensors)

    assert numbers(2) == numbers(40)


def test_a_semantic_cache_keeps_the_sink_and_the_last_chunks_whole() -> None:
    cache = grow(CachePolicy("semantic", block_size=2, sink=2, local=1), 5)
    assert contents(cache) == [0, 1, 8, 9]
    assert cache["bank"]["first"].tolist() == [[2, 4, 6]] * 2
    # equal mass: 97 % of 6 tokens are all of them
    assert cache["bank"]["cells"][0][0].tolist() == [[0, 1, 2, 3, 4, 5]] * 3
    assert cache["bank"]["keys"][0][0, 0, :, :, 0].tolist() == [
        [f] * 3 + [f + 1] * 3 for f in (2.0, 4.0, 6.0)
    ]


def test_a_short_first_chunk_is_banked_alone() -> None:
    cache = begin(CachePolicy("semantic", block_size=2, independent_first_frame=True))
    cache = commit(see(cache, [0.0]), 1)
    for start in (1.0, 3.0):
        cache = commit(see(cache, [start, start + 1]), 2)
    assert cache["bank"]["first"][0].tolist() == [0, 1][: cache["bank"]["first"].shape[1]]
    assert cache["bank"]["cells"][0][0, 0].tolist()[:3] == [0, 1, 2]
    assert contents(cache) == [3, 4]


# provisional frames


def test_provisional_frames_are_written_over_until_they_are_committed() -> None:
    cache = grow(CachePolicy("full", block_size=2), 1)
    first = see(cache, [7.0, 8.0])
    second = see(first, [9.0, 10.0])
    assert (frames_held(second), frames_provisional(second)) == (2, 2)
    assert frame_numbers(second) == [0, 1, 2, 3]
    assert contents(commit(second, 2)) == [0, 1, 9, 10]


def test_the_first_of_several_provisional_frames_can_be_committed_alone() -> None:
    cache = commit(see(begin(CachePolicy("full", block_size=1)), [1.0, 2.0, 3.0]), 1)
    assert (contents(cache), frames_provisional(cache)) == ([1], 0)


def test_caches_are_found_however_they_are_nested() -> None:
    caches = [see(begin(CachePolicy()), [1.0]) for _ in range(3)]
    memory = {
        "conditional": {VIDEO_CACHE: caches[0], "text": None},
        "null": [{VIDEO_CACHE: caches[1]}, ({VIDEO_CACHE: caches[2]}, torch.ones(2))],
    }
    kept = commit_frames(memory, 1)
    found = [kept["conditional"], kept["null"][0], kept["null"][1][0]]
    assert [contents(part[VIDEO_CACHE]) for part in found] == [[1], [1], [1]]
    assert kept["null"][1][1] is memory["null"][1][1]
    assert commit_frames(None, 1) is None


def test_more_frames_than_were_written_cannot_be_committed() -> None:
    with pytest.raises(ValueError, match="3 frames were to be committed, but 1 have been written"):
        commit(see(begin(CachePolicy()), [1.0]), 3)


# branches


def test_a_branch_does_not_write_over_what_another_has_committed() -> None:
    root = grow(CachePolicy("full", block_size=2), 1, frames=8)
    left = commit(see(root, [5.0, 6.0]), 2)
    right = commit(see(root, [7.0, 8.0]), 2)
    assert (contents(left), contents(right)) == ([0, 1, 5, 6], [0, 1, 7, 8])
    assert contents(root) == [0, 1]
    # whoever simply goes on copies nothing
    assert commit(see(left, [9.0]), 1)["keys"][0] is left["keys"][0]


def test_an_eviction_leaves_older_states_their_history() -> None:
    policy = CachePolicy("rolling", block_size=2, window=4)
    old = grow(policy, 1)
    new = commit(see(old, [2.0, 3.0]), 2)
    see(new, [4.0, 5.0])
    assert (contents(old), contents(new)) == ([0, 1], [2, 3])


def test_frames_that_another_call_wrote_over_cannot_be_committed() -> None:
    root = begin(CachePolicy(), frames=4)
    left = see(root, [1.0])
    see(root, [2.0])
    with pytest.raises(ValueError, match="written over by another call with the same memory"):
        commit(left, 1)


def test_particles_take_their_frames_along() -> None:
    cache = begin(CachePolicy("full", block_size=1), batch=3)
    cache = claim(cache, 1)
    frames = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, TOKENS, SIZE)
    for layer in range(2):
        write(cache, layer, frames, -frames)
    memory = {VIDEO_CACHE: cache}
    picked = take_rows(memory, torch.tensor([2, 0, 2]))
    kept = commit_frames(picked, 1)[VIDEO_CACHE]
    assert kept["keys"][0][:, 0, 0, 0, 0].tolist() == [2, 0, 2]
    assert kept["policy"] == cache["policy"]
    joined = cat_tensors([memory, picked])[VIDEO_CACHE]
    assert joined["keys"][1][:, 0, 0, 0, 0].tolist() == [0, 1, 2, 2, 0, 2]
    replaced = put_rows(memory, torch.tensor([1]), take_rows(memory, torch.tensor([2])))
    assert replaced[VIDEO_CACHE]["keys"][0][:, 0, 0, 0, 0].tolist() == [0, 2, 2]
    # copies are independent of where they came from
    see(commit(cache, 1), [9.0])
    assert frames_committed(kept) == 1
    assert contents(commit(see(kept, [5.0]), 1))[1] == 5


def test_particles_at_different_frames_are_not_read_together() -> None:
    policy = CachePolicy("full", block_size=1)
    one = {VIDEO_CACHE: commit(see(begin(policy, batch=1), [1.0]), 1)}
    two = {VIDEO_CACHE: commit(see(one[VIDEO_CACHE], [1.0]), 1)}
    with pytest.raises(ValueError, match=r"hold \[1, 2\] frames cannot be read together"):
        claim(cat_tensors([one, two])[VIDEO_CACHE], 1)


# gradients


def test_gradients_flow_through_new_frames_and_later_writes_do_not_break_them() -> None:
    cache = claim(grow(CachePolicy("full", block_size=2), 1), 2)
    new: Tensor = torch.ones(2, 1, 2 * TOKENS, SIZE, requires_grad=True)
    keys, _ = write(cache, 0, new, new)
    loss = keys.square().sum()
    with torch.no_grad():
        write(claim(cache, 2), 0, 5 * new, 5 * new)
    loss.backward()
    assert torch.equal(new.grad, torch.full_like(new, 2.0))
