"""A function of the user's own as a reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genscale.errors import ConfigError, DataError
from genscale.rewards.base import Request
from genscale.rewards.callable import FunctionReward, find

IMAGES = torch.tensor([0.25, 0.75])[:, None, None, None].expand(2, 3, 4, 4)
BOTH = torch.tensor([0, 1])


def nearness(images: Tensor, requests: list[Request], scale: float = 1.0) -> Tensor:
    """Return how near the brightness is to the label over ten."""
    asked = torch.tensor([float(each.label or 0) / 10 for each in requests])
    return -scale * (images.mean((1, 2, 3)) - asked).abs()


def test_it_is_called_with_pictures_requests_and_settings() -> None:
    reward = FunctionReward(nearness, settings={"scale": 2.0}, needs=["label"])
    handle = reward.prepare([Request(label=5), Request(label=8)])
    output = reward.score(IMAGES, handle, BOTH)
    torch.testing.assert_close(output.value, torch.tensor([-0.5, -0.1]))
    assert "judges by the label" in reward.problems([Request()])[0]
    assert reward.label == "Function(tests.rewards.test_function:nearness, scale=2.0)"


def test_its_gradient() -> None:
    reward = FunctionReward(nearness, differentiable=True)
    images = IMAGES.clone().requires_grad_()
    reward.loss(images, reward.prepare([Request(label=9)]), torch.zeros(2).long()).sum().backward()
    assert images.grad is not None
    torch.testing.assert_close(images.grad, torch.full_like(images, -1 / 48))


def test_by_the_name_of_a_module_or_of_a_file(tmp_path: Path) -> None:
    assert find("tests.rewards.test_function:nearness").__name__ == "nearness"
    (tmp_path / "mine.py").write_text(
        "def dark(images, requests):\n    return -images.mean((1, 2, 3))\n"
    )
    reward = FunctionReward(f"{tmp_path}/mine.py:dark")
    assert reward.check() == []
    output = reward.score(IMAGES, reward.prepare([Request(), Request()]), BOTH)
    torch.testing.assert_close(output.value, torch.tensor([-0.25, -0.75]))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (None, "function=None names no function"),
        ("nearness", "function=nearness names no function"),
        ("no_such_module_here:f", "cannot be imported: No module named 'no_such_module_here'"),
        ("/nowhere/mine.py:f", r"cannot be imported: .*No such file"),
        ("math:no_such", "'math' has no function 'no_such'"),
    ],
)
def test_a_function_that_is_not_there(name: str | None, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        find(name)
    assert len(FunctionReward(name).check()) == 1


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(2, 1), 1.0])
def test_something_else_than_a_number_a_picture(wrong: Any) -> None:
    reward = FunctionReward(lambda images, requests: wrong)
    with pytest.raises(DataError, match=r"one number a picture, of shape \(2,\)"):
        reward.score(IMAGES, reward.prepare([Request(), Request()]), BOTH)


def test_needs_that_requests_do_not_have() -> None:
    with pytest.raises(ConfigError, match="needs names 'prompt', but requests have caption, label"):
        FunctionReward(nearness, needs=["prompt"])  # type: ignore[list-item]
