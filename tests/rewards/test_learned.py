"""What rewards with a network share: settings, files, captions."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from genscale.errors import CheckpointError, ConfigError
from genscale.metrics.features import file_sha256
from genscale.rewards.base import Request, RewardOutput
from genscale.rewards.learned import (
    LearnedReward,
    captions_of,
    check_setting,
    find_file,
    need_transformers,
    once_each,
)


class Linear(LearnedReward):
    """One layer on the mean of a picture, of a weight file."""

    def __init__(self, weights: str | None = None, precision: str = "float32") -> None:
        super().__init__(precision)  # type: ignore[arg-type]
        self.weights = weights
        self.loaded = 0

    @property
    def settings(self) -> list[str]:
        return ["mean"]

    def digests(self) -> list[str]:
        return [file_sha256(str(find_file(self.weights, "a layer")))]

    def find(self) -> None:
        find_file(self.weights, "a layer (MIT)")

    def load(self) -> nn.Module:
        self.loaded += 1
        layer = nn.Linear(1, 1)
        layer.load_state_dict(torch.load(str(self.weights), weights_only=True))
        return layer

    def score(self, images: torch.Tensor, handle: object, index: torch.Tensor) -> RewardOutput:
        with self.computing():
            return RewardOutput(self.network(images.flatten(1).mean(1, keepdim=True))[:, 0])


@pytest.fixture
def weights(tmp_path: Path) -> str:
    path = tmp_path / "layer.pt"
    torch.save({"weight": torch.tensor([[1.001]]), "bias": torch.zeros(1)}, path)
    return str(path)


def test_weights_are_read_once_when_needed_and_are_frozen(weights: str) -> None:
    reward = Linear(weights)
    assert reward.check() == []
    assert reward.label == f"Linear(mean, float32, weights {reward.fingerprint})"
    assert reward.loaded == 0
    images = torch.full((2, 1, 2, 2), 0.5, requires_grad=True)
    value = reward.score(images, None, torch.tensor([0, 0])).value
    reward.to("cpu").score(images, None, torch.tensor([0, 0]))
    assert reward.loaded == 1
    assert not reward.network.training
    torch.autograd.grad(value.sum(), images)  # the pictures have a gradient, the weights none
    assert all(not p.requires_grad for p in reward.network.parameters())


def test_the_precision_is_the_rewards_own(weights: str) -> None:
    images, index = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0])
    with torch.autocast("cpu", torch.bfloat16):
        full = Linear(weights).score(images, None, index).value
    assert full.dtype == torch.float32
    assert float(full) == pytest.approx(0.5005)
    half = Linear(weights, "bfloat16").score(images, None, index).value
    assert half.dtype == torch.bfloat16
    assert float(half) == 0.5  # 1.001 is 1 in bfloat16


def test_files_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"reward\.weights is not set, and a file is needed"):
        find_file(None, "a file")
    with pytest.raises(CheckpointError, match="none does not exist, and a file was expected"):
        find_file(str(tmp_path / "none"), "a file")
    assert "a layer (MIT) is needed" in Linear().check()[0]
    assert Linear().fingerprint == "none"


def test_settings_are_checked() -> None:
    check_setting("reward.mode", "a", ("a", "b"))
    with pytest.raises(ConfigError, match=r"reward\.mode must be one of one, two, but 'twoo' was"):
        check_setting("reward.mode", "twoo", ("one", "two"))


def test_captions() -> None:
    assert captions_of([Request("a"), Request("b", 3)]) == ["a", "b"]
    with pytest.raises(ConfigError, match="a request has none"):
        captions_of([Request("a"), Request(label=1)])
    texts, places = once_each(["b", "a", "b"])
    assert (texts, places.tolist()) == (["b", "a"], [0, 1, 0])


def test_without_transformers_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'reward Linear needs .*"genscale\[transformers\]"'):
        need_transformers(Linear())
