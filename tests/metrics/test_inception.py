"""The FID network reads right files, and says what is wrong with others without running them."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from genscale.errors import CheckpointError, ConfigError, DataError
from genscale.metrics.inception import InceptionFID, InceptionGraph
from genscale.metrics.weights import INCEPTION_WEIGHTS, find_weights, weights_folder


class _RunsCode:
    def __reduce__(self) -> tuple:
        return os.system, ("touch executed",)


def test_the_graph_has_the_published_size() -> None:
    with torch.device("meta"):
        graph = InceptionGraph()
    # 94 convolutions with batch norm (6 entries each) and the classifier's 2
    assert len(graph.state_dict()) == 566
    assert sum(p.numel() for p in graph.parameters()) == 23_850_960


def test_a_file_gives_all_taps(inception_file: Path) -> None:
    network = InceptionFID(str(inception_file))
    assert network.check() == []
    grey = torch.arange(2 * 16 * 16).view(2, 1, 16, 16).to(torch.uint8)
    taps = network(grey)
    assert {name: value.shape[1] for name, value in taps.items()} == network.taps
    assert network.num_features == 2048
    assert not network.train().training
    colour = network(grey.expand(-1, 3, -1, -1))
    assert torch.equal(colour["2048"], taps["2048"])
    bias = network.graph.fc.bias
    torch.testing.assert_close(taps["logits"], taps["logits_unbiased"] + bias)


def test_the_digest_is_of_the_weights_not_of_the_file(
    inception_file: Path, inception_state: dict, tmp_path: Path
) -> None:
    # old torch files have no batch counters; evaluation never reads them
    stripped = {k: v for k, v in inception_state.items() if not k.endswith("num_batches_tracked")}
    torch.save(stripped, tmp_path / "weights.pth")
    first, second = InceptionFID(str(inception_file)), InceptionFID(str(tmp_path / "weights.pth"))
    assert first.sha256 == second.sha256
    changed = stripped | {"fc.bias": stripped["fc.bias"] + 1}
    first.load_weights(changed, source="test")
    assert first.sha256 != second.sha256


def test_a_missing_file_is_reported_before_anything_runs(weights_home: Path) -> None:
    network = InceptionFID()
    (sentence,) = network.check()
    assert f"No weights for 'inception' in {weights_home}" in sentence
    assert "python -m genscale.cli.fetch metrics --from FILE" in sentence
    with pytest.raises(CheckpointError, match=r"expected pt_inception-2015-12-05-6726825d\.pth"):
        network.prepare()
    (sentence,) = InceptionFID("nowhere.pth").check()
    assert "at nowhere.pth" in sentence


def test_the_weights_folder_is_searched(weights_home: Path, inception_file: Path) -> None:
    assert weights_folder() == weights_home
    weights_home.mkdir()
    target = weights_home / inception_file.name
    target.symlink_to(inception_file)
    assert find_weights(INCEPTION_WEIGHTS) == target
    assert InceptionFID().check() == []


def test_a_file_that_would_run_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"fc.weight": _RunsCode()}, protocol=2))
    torch.save({"fc.weight": _RunsCode()}, tmp_path / "zip.pth")
    for name in ("plain.pth", "zip.pth"):
        with pytest.raises(CheckpointError, match=r"would run code when loaded.*Re-save it"):
            InceptionFID(str(tmp_path / name)).prepare()
    assert not (tmp_path / "executed").exists()


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"missing, 0 unexpected keys.*2015-12-05 FID"):
        InceptionFID(str(tmp_path / "other.pth")).prepare()
    whole = (tmp_path / "other.pth").read_bytes()
    for suffix in ("pth", "safetensors"):
        path = tmp_path / f"cut.{suffix}"
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(CheckpointError, match="damaged or no weight file"):
            InceptionFID(str(path)).prepare()


def test_a_classifier_of_1000_classes_is_refused(inception_state: dict) -> None:
    other = inception_state | {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    with pytest.raises(CheckpointError, match=r"fc.weight is \(1000, 2048\)"):
        InceptionFID().load_weights(other, source="torchvision.pth")


def test_mistakes_are_told_in_a_sentence(inception_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"mode='bilinear' is unknown\. Choose one of tf1"):
        InceptionFID(mode="bilinear")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"uint8 images of shape.*torch\.float32"):
        InceptionFID(str(inception_file))(torch.zeros(1, 3, 8, 8))
