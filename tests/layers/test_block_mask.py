"""Who attends to whom in a block-causal video: one table, three forms."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genscale.errors import ConfigError
from genscale.layers.block_mask import BlockCausalMask, block_spans, join_runs, masked_attention

MASKS: dict[str, dict[str, Any]] = {
    "plain": {"frames": 6},
    "window": {"frames": 8, "window": 4},
    "window and sink": {"frames": 8, "window": 5, "sink": 1},
    "short first": {"frames": 7, "independent_first_frame": True},
    "teacher": {"frames": 6, "mode": "teacher"},
    "teacher, window": {"frames": 8, "mode": "teacher", "window": 4, "sink": 2},
    "cache": {"frames": 4, "context": (0, 4, 5), "first": 6, "window": 5, "sink": 1},
}


def build(name: str, **changes: Any) -> BlockCausalMask:
    return BlockCausalMask(**{"block_size": 2, "tokens_per_frame": 3, **MASKS[name], **changes})


def tensors(mask: BlockCausalMask) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = mask.table().shape
    generator = torch.Generator().manual_seed(0)
    sizes = [rows, columns, columns]
    q, k, v = (torch.randn(2, 2, 3 * n, 8, generator=generator) for n in sizes)
    return q, k, v


def test_blocks() -> None:
    assert block_spans(6, 3) == ((0, 3), (3, 6))
    assert block_spans(7, 3, short_first=True) == ((0, 1), (1, 4), (4, 7))
    assert block_spans(1, 3, short_first=True) == ((0, 1),)


def test_the_rules_one_frame_at_a_time() -> None:
    mask = build("window and sink")
    for query, key in product(range(8), range(8)):
        end = query // 2 * 2 + 2
        seen = key < end and (key >= end - 4 or key < 1)
        assert bool(mask.table()[query, key]) == seen
    mask = build("teacher")
    for query, key in product(range(12), range(12)):
        block, own = query % 6 // 2, key % 6 // 2
        clean, noisy = key < 6 and own <= block, own < block if key < 6 else own == block
        assert bool(mask.table()[query, key]) == (clean if query < 6 else noisy)


def test_the_dense_mask_repeats_the_table_for_every_token() -> None:
    mask = build("plain")
    dense = mask.dense()
    assert dense.shape == (18, 18)
    assert torch.equal(dense[::3, ::3], mask.table())
    assert torch.equal(dense[1::3, 2::3], mask.table())


@pytest.mark.parametrize("name", MASKS)
def test_runs_of_keys_give_what_the_dense_mask_gives(name: str) -> None:
    mask = build(name)
    q, k, v = tensors(mask)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.dense())
    torch.testing.assert_close(masked_attention(q, k, v, mask), expected)


@pytest.mark.parametrize("name", ["plain", "teacher, window"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_mask_of_flex_attention_is_the_same(name: str) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    mask = build(name)
    q, k, v = tensors(mask)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.dense())
    # not compiled, which is slow and gives the same numbers
    found = flex_attention(q, k, v, block_mask=mask.flex(torch.device("cpu")))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_lengths_that_are_multiples_of_128_need_no_padding() -> None:
    # where the official program slices its padding off by [:-0] and returns nothing
    mask = build("plain", frames=4, tokens_per_frame=32)
    q = torch.randn(1, 1, 128, 8)
    assert masked_attention(q, q, q, mask).shape == q.shape
    assert mask.flex(torch.device("cpu")).shape[-2:] == (128, 128)


def test_masks_are_made_once() -> None:
    assert build("teacher").runs() is build("teacher").runs()
    assert build("teacher").table() is build("teacher").table()


def test_one_run_is_a_view() -> None:
    x = torch.randn(1, 1, 6, 2)
    assert join_runs(x, ((2, 5),)).data_ptr() == x[:, :, 2:].data_ptr()
    assert torch.equal(join_runs(x, ((0, 1), (4, 6))), x[:, :, [0, 4, 5]])


def test_frames_that_are_no_whole_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a multiple of 3, .* but 20 were given. Give 18 or 21"):
        block_spans(20, 3)
    with pytest.raises(ValueError, match=r"1 \+ a multiple of 3, .* but 20 were given. Give 19 or"):
        block_spans(20, 3, short_first=True)
    with pytest.raises(ConfigError, match="window of 3 frames has no room for 2 sink frames and"):
        BlockCausalMask(frames=4, block_size=2, window=3, sink=2)
