"""State dicts are held against models: keys, shapes, depth, settings."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from genscale.autoencoders.msvq import MSVQ
from genscale.backbones.dimr import DiMR
from genscale.backbones.dit import DiT
from genscale.backbones.lamamba import LaMamba
from genscale.backbones.uvit import UViT
from genscale.errors import CheckpointError, ConfigError
from genscale.io.converters import converter, families, families_of
from genscale.io.keys import (
    check_keys,
    check_shapes,
    count_children,
    depth_sentence,
    on_meta,
    settings_sentence,
    shapes_of,
)

# family -> settings of a small network, and the same one deeper
DEPTHS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "dit": ({"hidden_size": 8, "num_heads": 2, "depth": 2}, {"depth": 5}, "depth 2, the config s"),
    "uvit": ({"hidden_size": 8, "num_heads": 2, "depth": 3}, {"depth": 7}, "depth 3, the config s"),
    "dimr": (
        {"hidden_sizes": [8, 8], "depths": [3, 1], "patch_sizes": [2, 1], "num_heads": 2},
        {"depths": [5, 1]},
        "depth 3 of stages.0.blocks, the config says 5",
    ),
    "lamamba": (
        {
            **{"hidden_sizes": [8, 16, 32, 32], "depths": [1, 1, 0, 0], "num_heads": 2},
            **{"window_size": 2, "input_size": 8},
        },
        {"depths": [3, 1, 0, 0]},
        r"depth 1 of encoder.0.blocks, the config says 3",
    ),
}


def test_keys_are_counted_and_the_first_is_named() -> None:
    check_keys(["a", "b"], ["b", "a"], owner="Net", advice="Never said.")
    with pytest.raises(
        CheckpointError,
        match=r"^2 missing, 1 unexpected keys for Net in f\.pt \(first: b\). Do",
    ):
        check_keys(["a", "x"], ["a", "b", "c"], owner="Net", advice=lambda: "Do.", source="f.pt")


def test_some_keys_may_be_left_over() -> None:
    ignored = re.compile(r"mask\d")
    check_keys(["a", "mask3"], ["a"], owner="Net", advice="", ignored=ignored)
    with pytest.raises(CheckpointError, match=r"1 unexpected .*first: mask33"):
        check_keys(["a", "mask33"], ["a"], owner="Net", advice="", ignored=ignored)


def test_shapes_are_named() -> None:
    given = {"a": torch.zeros(2, 3), "b": torch.zeros(1)}
    check_shapes(given, shapes_of(given), owner="Net", advice="")
    with pytest.raises(
        CheckpointError, match=r"1 tensors have another shape than Net's \(first: a is \(2, 3\), ex"
    ):
        check_shapes(given, {"a": (3, 2), "b": (1,)}, owner="Net", advice="")


def test_children_are_counted_by_number() -> None:
    keys = ["blocks.0.a", "blocks.0.b", "blocks.10.a", "other.blocks.3.a", "blocks.x.a"]
    assert count_children(keys, "blocks") == 2
    assert count_children(keys, "other.blocks") == 1


def test_depths_that_are_equal_need_no_sentence() -> None:
    keys = ["blocks.0.mlp.0.weight", "blocks.1.mlp.0.weight"]
    assert depth_sentence(keys, keys) == ""
    # blocks come before other lists, whichever is first in the file
    longer = ["head.0.weight", *keys, "blocks.2.mlp.0.weight"]
    assert depth_sentence(longer, keys) == "The file looks like depth 3, the config says 2."
    assert depth_sentence(["head.0.weight", *keys], keys) == (
        "The file looks like depth 1 of head, the config says 0."
    )


@pytest.mark.parametrize("family", DEPTHS)
def test_every_family_tells_a_file_of_another_depth(family: str) -> None:
    from genscale.io.weights import load_strictly

    settings, changes, sentence = DEPTHS[family]
    backbone = converter(family).BACKBONE
    file = on_meta(backbone, settings).state_dict()
    model = on_meta(backbone, {**settings, **changes})
    with pytest.raises(CheckpointError, match=sentence):
        load_strictly(model, file, source="other.ckpt")


def test_settings_are_compared_as_far_as_the_file_tells() -> None:
    own = {"depth": 36, "num_heads": 4, "kernel_sizes": 3, "mlp_sizes": None}
    found = {"num_heads": 16, "kernel_sizes": [3, 3], "mlp_sizes": [8], "depth": 28}
    assert settings_sentence(lambda: found, own, family="DiT") == (
        "The file looks like depth 28, the config says 36. Build the model with depth=28."
    )
    same = settings_sentence(lambda: {**found, "depth": 36}, own, family="DiT")
    assert same == "The file itself is incomplete or changed. Get it again."

    def foreign() -> dict[str, Any]:
        raise CheckpointError("no DiT")

    assert "does not look like a DiT" in settings_sentence(foreign, own, family="DiT")


# the table of converters


def test_every_converter_has_the_same_functions() -> None:
    found = families()
    assert set(found) >= {"dimr", "dit", "lamamba", "msvq", "sit", "uvit"}
    assert list(found) == sorted(found)
    assert {module.BACKBONE for module in found.values()} >= {DiMR, DiT, LaMamba, MSVQ, UViT}
    for module in found.values():
        for name in (
            *("config_from_official", "config_from_state_dict", "from_official", "to_official"),
        ):
            assert callable(getattr(module, name))
    assert families_of(DiT) == ["dit", "sit"]
    assert families_of(Tensor) == []


def test_an_unknown_family_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"one of .*dimr, dit, .*'uvti' was given.* mean 'uvit'"):
        converter("uvti")
