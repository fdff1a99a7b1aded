"""Nested memories follow their particles."""

from __future__ import annotations

import pytest
import torch

from genscale.objectives.memory import cat_tensors, map_tensors, put_rows, take_rows

MEMORY = {"a": torch.arange(3.0), "b": [torch.arange(6.0).view(3, 2), None], "c": None}


def test_rows_are_taken_everywhere() -> None:
    taken = take_rows(MEMORY, torch.tensor([2, 0, 0]))
    assert taken["a"].tolist() == [2.0, 0.0, 0.0]
    assert taken["b"][0].tolist() == [[4.0, 5.0], [0.0, 1.0], [0.0, 1.0]]
    assert taken["b"][1] is None
    assert taken["c"] is None


def test_joining_what_was_split_gives_it_back() -> None:
    parts = [take_rows(MEMORY, torch.tensor(rows)) for rows in ([0], [1, 2])]
    joined = cat_tensors(parts)
    assert torch.equal(joined["a"], MEMORY["a"])
    assert torch.equal(joined["b"][0], MEMORY["b"][0])


def test_put_replaces_rows_and_leaves_the_given_memory_alone() -> None:
    index = torch.tensor([2, 0])
    changed = put_rows(MEMORY, index, map_tensors(take_rows(MEMORY, index), lambda t: t + 10))
    assert changed["a"].tolist() == [10.0, 1.0, 12.0]
    assert changed["b"][0][2].tolist() == [14.0, 15.0]
    assert MEMORY["a"].tolist() == [0.0, 1.0, 2.0]


def test_memory_cannot_begin_in_some_particles_only() -> None:
    with pytest.raises(ValueError, match="Some particles were evaluated before others"):
        put_rows(None, torch.tensor([0]), torch.ones(1))
