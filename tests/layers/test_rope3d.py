"""Rotary positions in three axes."""

from __future__ import annotations

import torch

from genscale.layers.rope import rotate
from genscale.layers.rope3d import VideoRoPE, axis_pairs

ORIGIN = torch.zeros(1)


def test_frames_get_what_thirds_leave() -> None:
    assert axis_pairs(128) == (22, 21, 21)
    assert axis_pairs(12) == (2, 2, 2)
    assert axis_pairs(16) == (4, 2, 2)


def test_every_axis_turns_its_own_pairs() -> None:
    cosine, sine = VideoRoPE(12).grid_rotation(
        torch.tensor([0, 5]), torch.arange(2), torch.arange(3)
    )
    assert cosine.shape == sine.shape == (12, 6)
    angles = torch.atan2(sine, cosine)
    # frame 5, row 1, column 2; the second pair of an axis turns by 10000^(-1/2) as much
    expected = torch.tensor([5 - 2 * torch.pi, 0.05, 1.0, 0.01, 2.0, 0.02])
    torch.testing.assert_close(angles[-1], expected)
    assert not angles[0].any()


def test_scores_depend_on_distances_alone() -> None:
    q, k = torch.randn(1, 1, 1, 24), torch.randn(1, 1, 1, 24)

    def score(frame: int, other: int) -> torch.Tensor:
        places = torch.tensor([frame]), torch.tensor([other])
        rotations = [VideoRoPE(24).grid_rotation(place, ORIGIN, ORIGIN) for place in places]
        return (rotate(q, *rotations[0]) * rotate(k, *rotations[1])).sum()

    torch.testing.assert_close(score(7, 3), score(1004, 1000), rtol=1e-4, atol=1e-4)


def test_any_place_can_be_asked_for() -> None:
    frames, rows, columns = torch.tensor([[3, 0], [5, 1]]), torch.tensor([1, 0]), torch.tensor([2])
    cosine, _ = VideoRoPE(12).rotation(frames, rows, columns)
    assert cosine.shape == (2, 2, 6)
    grid = VideoRoPE(12).grid_rotation(torch.tensor([3]), torch.arange(2), torch.arange(3))[0]
    torch.testing.assert_close(cosine[0, 0], grid[5])  # row 1, column 2
