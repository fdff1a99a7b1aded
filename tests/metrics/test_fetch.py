"""Installing weights: checked, copied whole, listed; never downloaded."""

from pathlib import Path

import pytest
import torch

from genscale.cli.fetch import install, listing, main
from genscale.errors import CheckpointError
from genscale.metrics import weights
from genscale.metrics.inception import InceptionFID


def test_the_listing_names_what_is_missing(
    weights_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["metrics"]) == 0
    shown = capsys.readouterr().out
    assert str(weights_home) in shown
    assert "inception  missing  pt_inception-2015-12-05-6726825d.pth" in shown
    weights_home.mkdir()
    (weights_home / "inception-2015-12-05.pth").touch()
    assert "inception  there" in listing()


def test_a_right_file_of_unknown_digest_needs_a_word(
    weights_home: Path, inception_file: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"SHA-256 begins with \w{8} and that"):
        install(inception_file)
    assert not weights_home.exists()
    installed = install(inception_file, unverified=True)
    assert installed == weights_home / "inception-2015-12-05.safetensors"
    assert [path.name for path in weights_home.iterdir()] == [installed.name]
    assert InceptionFID().check() == []


def test_the_published_file_gets_its_published_name(
    weights_home: Path, inception_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from genscale.cli import fetch
    from genscale.metrics.features import file_sha256

    known = replace(weights.INCEPTION_WEIGHTS, sha256_prefix=file_sha256(str(inception_file))[:8])
    monkeypatch.setattr(fetch, "INCEPTION_WEIGHTS", known)
    assert install(inception_file).name == known.file_names[0]


def test_a_wrong_file_is_one_line_and_status_1(
    weights_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"fc.weight": torch.zeros(10, 4)}, tmp_path / "other.pth")
    for name in ("other.pth", "none.pth"):
        assert main(["metrics", "--from", str(tmp_path / name)]) == 1
        error = capsys.readouterr().err
        assert error.startswith("genscale: CheckpointError: ")
        assert error.count("\n") == 1
    assert not weights_home.exists()
