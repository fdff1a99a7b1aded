"""The comparison of FIT with U-Nets compares what it says it does."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from scripts import bench_fit
from scripts import bench_fit_unets as unets


def test_widths_of_unets_grow_in_proportion_to_one_another() -> None:
    rungs = unets.ladder((1, 2, 3, 4))
    assert (64, 128, 192, 256) in rungs
    for narrow, wide in itertools.pairwise(rungs):
        assert narrow != wide
        assert all(a <= b for a, b in zip(narrow, wide, strict=True))


@pytest.mark.parametrize("kind", unets.KINDS)
def test_forecast_operations_of_a_unet_are_those_of_a_run(kind: str) -> None:
    widths, size = (32, 32, 64), unets.SIZES["tiny"]
    with torch.device("meta"):
        network = unets.unet(kind, widths, 1, size).to("meta").eval().requires_grad_(False)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        inputs = unets.Inputs.of(size, 1, "meta")
        assert unets.call_unet(network, kind, inputs).shape == inputs.x.shape
    forecast = unets.cost(kind, widths, 1, "tiny", "flops")
    assert forecast == counter.get_total_flops()
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert unets.cost(kind, widths, 1, "tiny", "parameters") == parameters


def test_a_unet_that_cannot_be_found_is_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unets, "FAMILIES", [((1, 1, 1, 1), 1)])
    monkeypatch.setattr(unets, "LARGEST", 34)
    with pytest.raises(SystemExit, match="No UNet3D has parameters within 5%"):
        unets.search("UNet3D", "tiny", "parameters", 1e4)


def test_a_tiny_run_reports_networks_of_equal_parameters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_fit, "KINDS", ("UNetSpatioTemporal",))
    path = tmp_path / "numbers.json"
    bench_fit.main(
        ["--size=tiny", "--repeats=1", "--targets", "equal parameters", "--json", str(path)]
    )
    printed = capsys.readouterr().out
    assert "4.49 forward" in printed
    assert "3.31 training" in printed
    assert "What differs" in printed
    numbers = json.loads(path.read_text())
    ours, (theirs,) = numbers["fit"], numbers["unets"]
    assert theirs["parameters"] == pytest.approx(ours["parameters"], rel=unets.CLOSE)
    for key in ("inference", "training"):
        ratio = theirs["seconds"][key] / theirs["fit_seconds"][key]
        assert theirs["ratio"][key] == pytest.approx(ratio)
        assert math.isfinite(ratio)
        assert ratio > 0
    # a step holds weights, their gradients and two averages of Adam, 4 bytes each
    assert theirs["peak_bytes"]["training"] > 16 * theirs["parameters"]
    assert theirs["peak_bytes"]["inference"] > 4 * theirs["parameters"]
