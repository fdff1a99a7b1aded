"""Numbers, seeds, classes and prompts of a set of samples, in any batches on any processes."""

from __future__ import annotations

import pytest
import torch

from genscale import rng
from genscale.errors import ConfigError
from genscale.sample_set import batches_of_set


def test_batches_and_processes_divide_one_and_the_same_set() -> None:
    words = ("a dot", "a ring", "a star")

    def rows(size: int, processes: int) -> list[tuple[int, int, int, str]]:
        found = []
        for rank in range(processes):
            batches = batches_of_set(
                7,
                size,
                labels="random",
                num_classes=4,
                prompts=words,
                seed=5,
                rank=rank,
                world_size=processes,
            )
            for batch in batches:
                assert len(batch.ids) <= size
                assert batch.labels is not None
                assert batch.captions is not None
                numbers = (batch.ids.tolist(), batch.seeds.tolist(), batch.labels.tolist())
                found += list(zip(*numbers, batch.captions, strict=True))
        return found

    whole = rows(7, 1)
    assert rows(2, 1) == rows(3, 3) == whole
    assert [row[0] for row in whole] == list(range(7))
    assert [row[1] for row in whole] == rng.sample_seeds(5, 0, 7).tolist()
    assert [row[3] for row in whole] == [words[i % 3] for i in range(7)]


def test_a_model_without_classes_and_text_is_given_none() -> None:
    (batch,) = batches_of_set(3, 4, labels="balanced", num_classes=0)
    assert torch.equal(batch.ids, torch.arange(3))
    assert batch.labels is None
    assert batch.captions is None


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be positive, but 0 and 4 were given"):
        next(batches_of_set(0, 4, labels="balanced", num_classes=0))
