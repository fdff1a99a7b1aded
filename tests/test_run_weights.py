"""Names of weights, and what a checkpoint holds under them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from genscale.errors import CheckpointError
from genscale.io.weights import read_checkpoint
from genscale.run_weights import (
    Origin,
    further_averages,
    key_of,
    main_average,
    read_weights,
)
from genscale.runs import RunFolder


@pytest.mark.parametrize("name", ["ema_0.9999", "ema_0.05", "ema_1e-05"])
def test_a_name_survives_being_a_key_of_modules(name: str) -> None:
    assert "." not in key_of(name)
    state = {f"further_averages.{key_of(name)}.blocks.0.weight": 0, "ema.blocks.0.weight": 0}
    assert further_averages(state) == {name: f"further_averages.{key_of(name)}."}


@pytest.mark.parametrize(
    ("law", "name"),
    [
        ({"decay": 0.998, "warmup": True}, "ema_0.998"),
        ({"half_life": 6000, "warmup": False}, "ema_6000"),
        ({"sigma_rel": 0.05}, "ema_0.05"),
        ({"decays": [0.999, 0.99]}, "ema_0.999"),
        ({"sigma_rels": [0.1, 0.05], "snapshot_every": 10}, "ema_0.1"),
        ({}, "ema"),
        (None, "ema"),
    ],
)
def test_the_main_average_is_named_by_its_length(law: object, name: str) -> None:
    assert main_average(law) == name


def test_an_origin_does_not_say_where_the_folder_lies(tmp_path: Path) -> None:
    run = tmp_path / "outputs" / "dimr_digits" / "2026-01-02_03-04-05"
    assert str(Origin(run, "raw", 20, run)) == "dimr_digits/2026-01-02_03-04-05 step 20 raw"
    assert str(Origin(run, "ema", None, run)) == "dimr_digits/2026-01-02_03-04-05 ema"


class TestReading:
    """A run of one average; those of several are in integration/test_averages.py."""

    def test_both_names_of_the_average_and_the_raw_weights(self, trained_run: Path) -> None:
        run = RunFolder.open(trained_run)
        file = run.checkpoint(20)
        stored = read_checkpoint(file)["state_dict"]
        for weights, prefix, public in (
            ("ema", "ema.", "ema_0.998"),
            ("ema_0.998", "ema.", "ema_0.998"),
            ("raw", "model.", "raw"),
        ):
            state, origin = read_weights(run, "latest", weights)
            assert origin == Origin(run.path, public, 20, file, str(file))
            assert state
            assert all(torch.equal(state[name], stored[prefix + name]) for name in state)

    def test_unknown_names_are_told_what_there_is(self, trained_run: Path) -> None:
        run = RunFolder.open(trained_run)
        with pytest.raises(CheckpointError, match=r"must be one of ema, raw, but 'ema_0.99' was"):
            read_weights(run, "latest", "ema_0.99")
        # this run has no snapshots that it could be made of
        with pytest.raises(CheckpointError, match=r"must be one of ema, raw, but 'posthoc_0.1'"):
            read_weights(run, "latest", "posthoc_0.1")
