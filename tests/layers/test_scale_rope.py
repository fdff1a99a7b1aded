"""Rotary positions by scale: the range they span, and what a turn is."""

from __future__ import annotations

import torch

from genscale.layers.rope import rotate
from genscale.layers.scale_rope import ScaleRoPE


def angles(
    scales: tuple[tuple[int, int], ...], head_size: int = 8, **options: float
) -> torch.Tensor:
    cosine, sine = ScaleRoPE(head_size, **options).rotation(scales, torch.device("cpu"))
    return torch.atan2(sine.double(), cosine.double())


def test_every_scale_spans_the_same_range() -> None:
    scales = ((1, 1), (2, 2), (3, 5))
    # an extent of 1 keeps angles below pi: they can be read back
    places = angles(scales, extent=1.0)
    assert places.shape == (1 + 4 + 15, 4)
    assert not places[0].any()  # a lone cell lies at the beginning
    last = torch.tensor([1.0, 0.01, 1.0, 0.01], dtype=torch.float64)  # theta^(-4 / 8) = 0.01
    torch.testing.assert_close(places[4], last)
    torch.testing.assert_close(places[19], last)
    # row 1 of 3, column 3 of 5, by the row's and the column's own count
    middle = torch.tensor([3 / 4, 3 / 400, 1 / 2, 1 / 200], dtype=torch.float64)
    torch.testing.assert_close(places[5 + 1 * 5 + 3], middle)


def test_base_and_extent_are_settings() -> None:
    near, far = angles(((2, 2),), extent=0.5, theta=16.0), angles(((2, 2),), extent=1.0, theta=16.0)
    torch.testing.assert_close(2 * near, far)
    torch.testing.assert_close(far[1], torch.tensor([1.0, 0.25, 0.0, 0.0], dtype=torch.float64))


def test_scores_depend_on_distances_alone() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(8), torch.randn(8)
    cosine, sine = ScaleRoPE(8).rotation(((1, 6),), torch.device("cpu"))
    rows = [rotate(x.expand(1, 1, 6, 8), cosine, sine)[0, 0] for x in (q, k)]
    scores = rows[0] @ rows[1].T
    for distance in range(-5, 6):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert scores[0].std() > 0.1  # and do depend on them
