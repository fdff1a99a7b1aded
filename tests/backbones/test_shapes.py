"""What transformers on patches check, each check on its own."""

from __future__ import annotations

import pytest
import torch

from genscale.backbones.base import Backbone, BackboneOutput, register_to_config
from genscale.backbones.shapes import (
    check_choice,
    check_heads,
    check_inputs,
    check_positive,
    class_rows,
    mlp_width,
    trained_grid,
)
from genscale.errors import ConfigError


class Plain(Backbone):
    """The least that has a config."""

    @register_to_config
    def __init__(self, *, input_size: object = 8, in_channels: int = 2, patch_size: int = 2):
        super().__init__()

    def forward(self, x, t, cond, memory=None) -> BackboneOutput:
        check_inputs(self, x, t, cond.labels)
        return BackboneOutput(sample=x)


def test_counts_must_be_positive_and_classes_may_be_none() -> None:
    check_positive({"depth": 1, "num_classes": 0}, "depth")
    with pytest.raises(ConfigError, match=r"model.depth must be an integer of at least 1, .* 1.5"):
        check_positive({"depth": 1.5, "num_classes": 0}, "depth")
    with pytest.raises(ConfigError, match=r"model.num_classes must be an integer of at least 0"):
        check_positive({"num_classes": -1})


def test_a_misspelt_word_is_answered_by_the_closest() -> None:
    check_choice("attention", "nala", ["softmax", "nala"])
    with pytest.raises(ConfigError, match="Did you mean 'softmax'"):
        check_choice("attention", "sofmax", ["softmax", "nala"])


def test_heads_divide_the_width() -> None:
    check_heads(12, 3)
    for heads in (0, 5):
        with pytest.raises(ConfigError, match=f"which model.num_heads={heads} heads do not divide"):
            check_heads(12, heads)


def test_the_inner_width_is_rounded_down() -> None:
    assert mlp_width(10, 2.55) == 25
    with pytest.raises(ConfigError, match=r"model.mlp_ratio must be positive, but is -1"):
        mlp_width(10, -1)


def test_the_trained_grid_is_the_input_in_patches() -> None:
    assert trained_grid(Plain(), 8, 2) == (4, 4)
    model = Plain(input_size=(4, 8))
    assert trained_grid(model, (4, 8), 2) == (2, 4)
    assert model.config["input_size"] == [4, 8]
    assert type(model.config["input_size"]) is list
    with pytest.raises(ConfigError, match=r"model.input_size is 8 x 9"):
        trained_grid(model, (8, 9), 2)


def test_null_labels_and_missing_ones_are_the_last_row() -> None:
    device = torch.device("cpu")
    assert class_rows(torch.tensor([0, -1, 3]), 5, 3, device).tolist() == [0, 5, 3]
    assert class_rows(None, 5, 2, device).tolist() == [5, 5]
