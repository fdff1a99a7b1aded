"""Which pictures a trained autoencoder or upscaler is judged on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from genscale.cli.reconstructing import held_out, so_many
from genscale.data.scenes.dataset import Scenes
from genscale.errors import ConfigError


def test_they_are_those_held_out_or_all_there_are() -> None:
    train, other = Scenes(4), Scenes(3)
    assert held_out(SimpleNamespace(train=train, heldout=other)) == (other, "heldout")
    assert held_out(SimpleNamespace(train=train, heldout=None)) == (train, "train")


def test_no_more_than_there_are() -> None:
    assert so_many(Scenes(4), None, "to enlarge (train)") == 4
    assert so_many(Scenes(4), 2, "to enlarge (train)") == 2
    with pytest.raises(ConfigError, match=r"num_samples=5 .*4 pictures to enlarge \(train\)"):
        so_many(Scenes(4), 5, "to enlarge (train)")
