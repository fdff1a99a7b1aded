"""Scales: how they are written, where their tokens lie, and how the running latent is seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from genscale.errors import ConfigError
from genscale.layers.scales import as_scales, features_at, scale_spans


def test_a_number_stands_for_a_square() -> None:
    assert as_scales([1, [2, 3], (4, 4)]) == ((1, 1), (2, 3), (4, 4))


@pytest.mark.parametrize(
    ("scales", "sentence"),
    [
        ([], "Scales must grow"),
        ([2, 1], r"Scales must grow from coarse to fine, but \[2, 1\]"),
        ([[1, 3], [2, 2]], "Scales must grow"),
        ([0, 1], r"A scale must be a side or \[height, width\] of at least 1, but 0"),
        ([[1, 2, 3]], r"A scale must be a side .*, but \[1, 2, 3\]"),
    ],
)
def test_scales_that_do_not_grow_are_refused(scales: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        as_scales(scales)


def test_tokens_lie_scale_after_scale() -> None:
    assert scale_spans(((1, 1), (2, 3), (4, 4))) == [(0, 1), (1, 7), (7, 23)]


def test_features_are_means_over_areas_row_by_row() -> None:
    latent = torch.arange(16.0).view(1, 1, 4, 4)
    assert features_at(latent, (2, 2))[0, :, 0].tolist() == [2.5, 4.5, 10.5, 12.5]
    assert features_at(latent, (1, 2))[0, :, 0].tolist() == [6.5, 8.5]
    assert features_at(latent, (4, 4))[0, :, 0].tolist() == list(range(16))
    # where sides do not divide, areas overlap: rows 0-1, 1-2 and 2-3 of 4
    column = features_at(latent, (3, 1))[0, :, 0]
    assert column.tolist() == [3.5, 7.5, 11.5]
