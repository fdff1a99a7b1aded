"""What lies in run folders and exported ones, as a pipeline is built from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from genscale.errors import CheckpointError, ConfigError
from genscale.loading import (
    EXPORTED,
    Stored,
    exported_config,
    parts_of,
    read_exported,
    read_run,
    write_exported,
)


@pytest.fixture(scope="module")
def stored(trained_run: Path) -> Stored:
    return read_run(trained_run, "latest", "ema")


def test_the_model_is_built_around_the_weights(stored: Stored) -> None:
    model = stored.model(torch.device("cpu"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, stored.state[name]), name
    stranger = Stored({"model": stored.config["model"]}, {}, stored.origin, "A hint.")
    with pytest.raises(CheckpointError, match=r"A hint\."):
        stranger.model(torch.device("cpu"))


def test_parts_are_the_arguments_of_a_pipeline(stored: Stored) -> None:
    model = stored.model(torch.device("cpu")).train()
    parts = parts_of(stored.config, model)
    assert parts["model"] is model
    assert not model.training
    assert parts["num_classes"] == 10
    assert parts["frame_rate"] is None
    assert "text" not in parts


def test_what_is_exported_is_what_sampling_needs(stored: Stored, tmp_path: Path) -> None:
    model = stored.model(torch.device("cpu"))
    write_exported(model, tmp_path, stored.config)
    again = read_exported(tmp_path)
    assert set(again.config) == set(EXPORTED)
    assert again.config == exported_config(tmp_path) == json.loads(json.dumps(again.config))
    assert again.state.keys() == model.state_dict().keys()
    for name, value in again.state.items():
        assert torch.equal(value, stored.state[name]), name
    with pytest.raises(ConfigError, match="holds the last averaged weights alone"):
        read_exported(tmp_path, "latest", "raw")
