"""A weight file of the FID Inception network with random numbers: right names, right shapes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from genscale.metrics.inception import InceptionGraph


@pytest.fixture(scope="session")
def inception_state() -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        graph = InceptionGraph()
    return graph.state_dict()


@pytest.fixture(scope="session")
def inception_file(
    tmp_path_factory: pytest.TempPathFactory, inception_state: dict[str, Tensor]
) -> Path:
    path = tmp_path_factory.mktemp("weights") / "inception-2015-12-05.safetensors"
    save_file(inception_state, path)
    return path


@pytest.fixture
def weights_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty weights folder."""
    folder = tmp_path / "weights"
    monkeypatch.setenv("GENSCALE_WEIGHTS", str(folder))
    return folder
