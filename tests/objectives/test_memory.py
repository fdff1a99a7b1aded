"""Nested memories follow their particles."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from genscale.objectives.memory import (
    STEP_CACHE,
    cat_tensors,
    forget_rows,
    map_tensors,
    put_rows,
    take_rows,
)

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


class TestWhatCanBeForgotten:
    """Entries of a step cache; see ``genscale.samplers.step_cache``."""

    def cached(self, *counts: int) -> dict[str, Any]:
        rows = torch.arange(1.0, 1.0 + 2 * len(counts)).view(-1, 2)
        cache = {"evaluations": torch.tensor(counts), "features": {"a": (rows, rows + 10)}}
        return {STEP_CACHE: cache, "network": None}

    def test_rows_forget_by_their_count(self) -> None:
        memory = {"conditional": self.cached(3, 4, 5), "null": [self.cached(1, 2, 3)], "x": None}
        after = forget_rows(memory, torch.tensor([0, 2]))
        assert after["conditional"][STEP_CACHE]["evaluations"].tolist() == [0, 4, 0]
        assert after["null"][0][STEP_CACHE]["evaluations"].tolist() == [0, 2, 0]
        assert memory["conditional"][STEP_CACHE]["evaluations"].tolist() == [3, 4, 5]
        assert forget_rows(MEMORY, torch.tensor([0]))["a"] is MEMORY["a"]

    def test_parts_without_it_join_as_forgotten(self) -> None:
        joined = cat_tensors([{"own": None}, {"own": self.cached(2, 3)}], [1, 2])["own"]
        assert joined[STEP_CACHE]["evaluations"].tolist() == [0, 2, 3]
        assert joined[STEP_CACHE]["features"]["a"][1].tolist() == [[0, 0], [11, 12], [13, 14]]
        assert joined["network"] is None
        assert cat_tensors([None, None], [1, 2]) is None

    def test_rows_stand_beside_forgotten_ones(self) -> None:
        beside = put_rows(None, torch.tensor([2, 0]), self.cached(4, 5), 3)
        assert beside[STEP_CACHE]["evaluations"].tolist() == [5, 0, 4]

    def test_other_memory_is_not_made_up(self) -> None:
        network = {**self.cached(1), "network": torch.ones(1)}
        with pytest.raises(ValueError, match="Some particles were evaluated before others"):
            put_rows(None, torch.tensor([0]), network, 2)
        with pytest.raises(ValueError, match="Some particles were evaluated before others"):
            cat_tensors([None, network], [1, 1])
