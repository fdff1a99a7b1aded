"""Keys and values in shared buffers: written in place, never over what another branch may read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from genscale.layers.scale_cache import (
    cache_dtype,
    claim,
    empty_cache,
    is_cache,
    take,
    write,
)
from genscale.objectives.memory import cat_tensors, put_rows, take_rows

LAYERS, HEADS, LENGTH, SIZE = 2, 3, 6, 4


def fresh(batch: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return empty_cache(LAYERS, batch, HEADS, LENGTH, SIZE, device="cpu", dtype=dtype)


def tokens(value: float, count: int, batch: int = 2) -> Tensor:
    return torch.full((batch, HEADS, count, SIZE), value)


def append(cache: dict[str, Any], value: float, start: int, count: int) -> dict[str, Any]:
    """Write ``count`` keys of a value, and values of its negative, to all layers."""
    rows = tokens(value, count, len(cache["filled"]))
    cache = claim(cache, start, start + count)
    for layer in range(LAYERS):
        write(cache, layer, start, rows, -rows)
    return cache


def keys(cache: dict[str, Any], row: int = 0) -> list[float]:
    """One number a token, of the last layer."""
    assert torch.equal(cache["values"][-1], -cache["keys"][-1])
    numbers: list[float] = cache["keys"][-1][row, 0, :, 0].tolist()
    return numbers


def test_tokens_go_into_one_buffer_in_order() -> None:
    cache = fresh()
    assert cache["keys"][0].shape == (2, HEADS, LENGTH, SIZE)
    assert cache["filled"].tolist() == [0, 0]
    places = [part.data_ptr() for part in (*cache["keys"], *cache["values"])]
    cache = append(append(cache, 1.0, 0, 1), 2.0, 1, 3)
    assert keys(cache) == [1, 2, 2, 2, 0, 0]
    assert cache["filled"].tolist() == [4, 4]
    # going on copies nothing
    assert [part.data_ptr() for part in (*cache["keys"], *cache["values"])] == places


def test_what_is_read_ends_with_the_new_tokens() -> None:
    cache = claim(append(fresh(), 1.0, 0, 1), 1, 3)
    k, v = write(cache, 0, 1, tokens(2.0, 2), tokens(5.0, 2))
    assert k[0, 0, :, 0].tolist() == [1, 2, 2]
    assert v[0, 0, :, 0].tolist() == [-1, 5, 5]
    assert k.data_ptr() == cache["keys"][0].data_ptr()


def test_two_branches_do_not_disturb_each_other() -> None:
    root = append(fresh(), 1.0, 0, 1)
    first, second = dict(root), dict(root)  # never copied: one buffer
    first = append(first, 2.0, 1, 2)
    second = append(second, 3.0, 1, 2)
    third = append(dict(root), 4.0, 1, 2)
    assert keys(first)[:3] == [1, 2, 2]
    assert keys(second)[:3] == [1, 3, 3]
    assert keys(third)[:3] == [1, 4, 4]
    # each goes on where it is, and only the first one where the buffer was
    assert keys(append(first, 5.0, 3, 1))[:4] == [1, 2, 2, 5]
    assert keys(append(second, 6.0, 3, 1))[:4] == [1, 3, 3, 6]
    assert first["keys"][0].data_ptr() == root["keys"][0].data_ptr()
    assert second["keys"][0].data_ptr() != root["keys"][0].data_ptr()


def test_writing_again_leaves_an_earlier_reading_alone() -> None:
    root = append(fresh(), 1.0, 0, 1)
    once = append(root, 2.0, 1, 2)
    again = append(root, 7.0, 1, 2)  # the same scale, from the same state
    assert keys(once)[:3] == [1, 2, 2]
    assert keys(again)[:3] == [1, 7, 7]


def test_selected_joined_and_replaced_rows_are_branches_of_their_own() -> None:
    root = append(fresh(3), 1.0, 0, 1)
    picked = take_rows(root, torch.tensor([2, 2]))
    picked = append(picked, 2.0, 1, 1)
    assert root["filled"].tolist() == [1, 1, 1]
    assert keys(append(root, 3.0, 1, 1), row=2)[:2] == [1, 3]
    joined = cat_tensors([picked, take_rows(root, torch.tensor([0]))])
    assert [keys(joined, row)[:2] for row in range(3)] == [[1, 2], [1, 2], [1, 3]]
    assert joined["filled"].tolist() == [2, 2, 2]
    replaced = put_rows(root, torch.tensor([1]), take_rows(picked, torch.tensor([0])))
    assert [keys(replaced, row)[:2] for row in range(3)] == [[1, 3], [1, 2], [1, 3]]
    assert keys(append(replaced, 4.0, 2, 1), row=1)[:3] == [1, 2, 4]
    assert keys(root, row=1)[:3] == [1, 3, 0]


def test_one_row_further_on_makes_all_rows_copy() -> None:
    near, far = append(fresh(1), 1.0, 0, 1), append(append(fresh(1), 1.0, 0, 1), 9.0, 1, 1)
    mixed = cat_tensors([near, far])
    branch = append(mixed, 2.0, 1, 1)
    assert branch["keys"][0].data_ptr() != mixed["keys"][0].data_ptr()
    assert keys(mixed, row=1)[:2] == [1, 9]
    assert [keys(branch, row)[:2] for row in (0, 1)] == [[1, 2], [1, 2]]


def test_tokens_left_out_are_noticed() -> None:
    with pytest.raises(ValueError, match="The cache holds 1 tokens, but 3 should come before"):
        claim(append(fresh(), 1.0, 0, 1), 3, 4)


def test_gradients_reach_all_tokens_and_no_saved_tensor_is_written_over() -> None:
    cache, total = fresh(), torch.zeros(())
    inputs = [tokens(float(i + 1), 2).requires_grad_() for i in range(3)]
    for i, rows in enumerate(inputs):
        cache = claim(cache, 2 * i, 2 * i + 2)
        k, v = write(cache, 0, 2 * i, rows, 2 * rows)
        total = total + (k * v).sum()  # multiplication saves both
    total.backward()
    # rows of scale i are seen by scales i .. 2, and d(2 x^2)/dx = 4 x
    for i, rows in enumerate(inputs):
        assert rows.grad is not None
        torch.testing.assert_close(rows.grad, 4 * rows.detach() * (3 - i))


def test_buffers_keep_their_own_type() -> None:
    cache = claim(fresh(dtype=torch.bfloat16), 0, 1)
    k, _ = write(cache, 0, 0, tokens(1.0, 1), tokens(1.0, 1))
    assert k.dtype == torch.bfloat16


def test_the_type_is_autocasts_or_the_weights() -> None:
    weight, cpu = torch.zeros(1, dtype=torch.float64), torch.device("cpu")
    assert cache_dtype(cpu, weight) == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cache_dtype(cpu, weight) == torch.bfloat16
    assert cache_dtype(torch.device("meta"), weight) == torch.float64


def test_consecutive_rows_share_the_buffers_and_are_told_apart() -> None:
    whole = append(fresh(3), 1.0, 0, 1)
    part = take(whole, torch.tensor([1, 2]))
    assert part["keys"][0].data_ptr() == whole["keys"][0][1:].data_ptr()
    append(part, 2.0, 1, 1)
    assert whole["filled"].tolist() == [1, 2, 2]
    branch = append(whole, 3.0, 1, 1)  # has one token in every row: it must not write over the 2
    assert [keys(branch, row)[:2] for row in range(3)] == [[1, 3]] * 3
    assert keys(part, row=0)[:2] == [1, 2]


def test_rows_elsewhere_are_copied_as_far_as_they_are_written() -> None:
    whole = append(fresh(3), 1.0, 0, 2)
    whole["keys"][0][..., 4, :] = 7.0  # never written by anyone
    copies = take(whole, torch.tensor([2, 0, 2]))
    assert is_cache(copies)
    assert copies["filled"].tolist() == [2, 2, 2]
    assert keys(copies, row=1) == [1, 1, 0, 0, 0, 0]
    append(copies, 5.0, 2, 1)
    assert whole["filled"].tolist() == [2, 2, 2]


def test_a_second_axis_of_branches_changes_nothing() -> None:
    whole = append(fresh(4), 1.0, 0, 2)
    paired = {
        "filled": whole["filled"].view(2, 2),
        "keys": [rows.unflatten(0, (2, 2)) for rows in whole["keys"]],
        "values": [rows.unflatten(0, (2, 2)) for rows in whole["values"]],
    }
    picked = take_rows(paired, torch.tensor([1, 0]))
    torch.testing.assert_close(picked["keys"][0], paired["keys"][0].flip(0))
