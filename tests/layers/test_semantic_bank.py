"""What is kept of chunks long past, and which of them are read again."""

from __future__ import annotations

import torch

from genscale.layers.semantic_bank import (
    attention_mass,
    empty_bank,
    look_up,
    read_chunks,
    salient,
)


def test_the_smallest_set_with_enough_attention_is_kept() -> None:
    mass = torch.tensor([[0.1, 0.5, 0.3, 0.06, 0.04], [0.2, 0.2, 0.2, 0.2, 0.2]])
    assert salient(mass, 0.8, 1).tolist() == [
        [False, True, True, False, False],  # 0.5 + 0.3
        [True, True, True, True, False],
    ]
    assert salient(mass, 0.81, 1)[0].tolist() == [True, True, True, False, False]
    assert salient(mass, 0.4, 3)[0].tolist() == [True, True, True, False, False]  # at least three
    assert salient(mass, 1.0, 1)[0].all()
    assert torch.equal(salient(7 * mass, 0.8, 1), salient(mass, 0.8, 1))


def test_the_mass_is_the_attention_that_tokens_receive_in_their_own_chunk() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 20, 4, generator=generator) for _ in range(2))
    mass = attention_mass(q, k, [(0, 4), (4, 20)])
    assert mass.shape == (2, 20)
    torch.testing.assert_close(mass[:, :4].sum(1), torch.ones(2))
    # queries 4 and 12 of the second chunk are asked
    probed = (q[:, :, [4, 12]] @ k[:, :, 4:].transpose(2, 3) / 2).softmax(-1).mean((1, 2))
    torch.testing.assert_close(mass[:, 4:], probed)


def test_the_nearest_chunks_are_read_in_temporal_order() -> None:
    topics = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [0.0, 2.0]]]).repeat(2, 1, 1)
    bank = {"topics": topics}
    topic = torch.tensor([[1.0, 0.0], [0.0, 5.0]])
    assert look_up(bank, topic, 2).tolist() == [[0, 2], [1, 3]]
    # among equally near ones the most recent
    assert look_up(bank, topic, 1).tolist() == [[0], [3]]
    assert look_up(bank, topic, 9).tolist() == [[0, 1, 2, 3]] * 2


def test_chunks_are_read_with_the_places_of_their_tokens() -> None:
    bank = empty_bank([torch.zeros(2, 1, 4, 3, 2)], topic_size=5)
    assert bank["topics"].shape == (2, 0, 5)
    bank["keys"] = [torch.arange(12.0).view(1, 1, 3, 2, 2).expand(2, -1, -1, -1, -1)]
    bank["values"] = [-bank["keys"][0]]
    bank["cells"] = [torch.tensor([[[0, 4], [1, -1], [2, 3]]]).expand(2, -1, -1)]
    keys, values, cells = read_chunks(bank, 0, torch.tensor([[0, 2], [1, 2]]))
    assert keys[0, 0].tolist() == [[0, 1], [2, 3], [8, 9], [10, 11]]
    assert keys[1, 0].tolist() == [[4, 5], [6, 7], [8, 9], [10, 11]]
    assert torch.equal(values, -keys)
    assert cells.tolist() == [[[0, 4], [2, 3]], [[1, -1], [2, 3]]]
