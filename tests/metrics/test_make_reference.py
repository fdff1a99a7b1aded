"""The script that writes reference statistics."""

from pathlib import Path

import numpy as np
import pytest
import torch

from genscale.metrics.moments import Moments
from genscale.metrics.pixels import Pixels
from genscale.metrics.reference import read_reference
from genscale.metrics.suite import EvaluationSuite
from genscale.rng import integers, key
from scripts.make_reference import main


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    values = integers(key(1, torch.arange(40 * 8 * 8 * 3)), 256).view(40, 8, 8, 3)
    np.savez(tmp_path / "pictures.npz", arr_0=values.to(torch.uint8).numpy())
    return tmp_path / "pictures.npz"


@pytest.mark.filterwarnings("ignore:The Frechet distance of 'pixels'")  # 40 pictures are few
def test_a_reference_holds_the_moments_of_its_pictures(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--network", "pixels", "--dataset", "noise", "--features", "--out", str(tmp_path)]
    assert main([str(pictures), *words]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path.name.startswith("noise-train-8-pixels_8x8-box-")
    found = read_reference(path)
    images = torch.from_numpy(np.load(pictures)["arr_0"]).permute(0, 3, 1, 2)
    features = Pixels()(images)["pixels"]
    assert found.statistics["mu"].count == 40
    torch.testing.assert_close(
        found.statistics["mu"].covariance, Moments.of(features).covariance(), rtol=0, atol=1e-12
    )
    assert found.features is not None
    assert torch.equal(found.features, features)
    suite = EvaluationSuite(["fd_pixels", "kid_pixels"], [Pixels()], reference=str(path))
    suite.update(images)
    assert suite.compute()[0].value == pytest.approx(0.0, abs=1e-9)


def test_mistakes_are_one_line_and_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--network", "pixels", "--dataset", "noise", "--out", str(tmp_path / "out")]
    assert main([str(tmp_path / "none.npz"), *words]) == 1
    assert "There is no file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
