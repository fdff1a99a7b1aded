"""Rewards for pictures as judges of clips."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from genscale.errors import ConfigError
from genscale.rewards.base import Request, Reward, RewardOutput
from genscale.rewards.callable import FunctionReward
from genscale.rewards.classifier import ClassifierReward
from genscale.rewards.composite import Composite
from genscale.rewards.frames import FrameReward


class Brightness(Reward):
    """Mean grey level, less that asked for by the label; says nothing of black pictures."""

    needs = frozenset({"label"})
    differentiable = True

    def prepare(self, requests: Sequence[Request]) -> Tensor:
        return torch.tensor([float(request.label or 0) for request in requests])

    def score(self, images: Tensor, handle: Tensor, index: Tensor) -> RewardOutput:
        assert images.dim() == 4
        grey = images.mean((1, 2, 3))
        return RewardOutput(grey - handle[index], {"grey": grey, "met": grey.round()}, grey > 0)

    def compare(self, output: RewardOutput, group: Tensor) -> Tensor:
        return output.parts["grey"]


@pytest.fixture
def clips() -> Tensor:
    """Two clips of three frames, of grey levels 0.2, 0.4, 0.9 and 0.6, 0.6, 0.0."""
    levels = torch.tensor([[0.2, 0.4, 0.9], [0.6, 0.6, 0.0]])
    return levels.view(2, 1, 3, 1, 1).expand(2, 3, 3, 4, 4).contiguous()


@pytest.mark.parametrize(("pool", "grey"), [("mean", [0.5, 0.4]), ("min", [0.2, 0.0])])
def test_frames_make_one_number(clips: Tensor, pool: str, grey: list[float]) -> None:
    reward = FrameReward(Brightness(), pool)  # type: ignore[arg-type]
    handle = reward.prepare([Request(label=1), Request(label=2)])
    output = reward.score(clips, handle, torch.tensor([1, 0]))
    torch.testing.assert_close(output.value, torch.tensor(grey) - torch.tensor([2.0, 1.0]))
    torch.testing.assert_close(output.parts["grey"], torch.tensor(grey))
    # one black frame: the clip cannot be judged; nothing is met before every frame meets it
    assert output.valid is not None
    assert output.valid.tolist() == [True, False]
    assert output.parts["met"].tolist() == [0.0, 0.0]
    assert torch.equal(reward.compare(output, torch.zeros(2)), output.parts["grey"])


@pytest.mark.parametrize("pool", ["mean", "min"])
def test_gradients_reach_the_frames_that_count(clips: Tensor, pool: str) -> None:
    reward = FrameReward(Brightness(), pool)  # type: ignore[arg-type]
    handle = reward.prepare([Request(label=0)])
    moved = clips.requires_grad_()
    loss = reward.loss(moved, handle, torch.zeros(2, dtype=torch.int64))
    value = reward.score(clips.detach(), handle, torch.zeros(2, dtype=torch.int64)).value
    torch.testing.assert_close(loss.detach(), -value)
    (gradient,) = torch.autograd.grad(loss.sum(), moved)
    touched = gradient.abs().sum((1, 3, 4)) > 0
    expected = [[True] * 3] * 2 if pool == "mean" else [[True, False, False], [False, False, True]]
    assert touched.tolist() == expected


def test_it_is_what_the_reward_is() -> None:
    reward = FrameReward(Brightness())
    assert reward.clips
    assert reward.differentiable
    assert reward.potential
    assert reward.needs == {"label"}
    assert reward.label == "Brightness, mean over frames"
    assert "label" in reward.problems([Request()])[0]
    assert reward.check() == []
    assert reward.to("cpu") is reward


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"reward_frames=meen is unknown.*Did you mean 'mean'"):
        FrameReward(Brightness(), "meen")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="judges clips by itself"):
        FrameReward(FrameReward(Brightness()))
    (sentence,) = FrameReward(ClassifierReward()).check()
    assert "learns from the pictures that a run was trained on, but these are clips" in sentence


def test_a_composite_judges_one_kind(clips: Tensor) -> None:
    films = FunctionReward(lambda clips, requests: clips.mean((1, 2, 3, 4)), clips=True)
    both = Composite({"film": films, "frames": FrameReward(Brightness())})
    assert both.clips
    assert both.check() == []
    handle = both.prepare([Request(label=0)])
    value = both.score(clips, handle, torch.zeros(2, dtype=torch.int64)).value
    torch.testing.assert_close(value, 2 * torch.tensor([0.5, 0.4]))
    (sentence,) = Composite({"film": films, "picture": Brightness()}).check()
    assert "judges pictures, but others of the composite judge clips" in sentence
